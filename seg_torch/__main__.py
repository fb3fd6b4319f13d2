"""The command seg-torch: python -m seg_torch train data=folder data.root=my_data"""

from seg_torch.cli.main import main

if __name__ == "__main__":
    main()
