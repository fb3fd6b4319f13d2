"""Oxford-IIIT Pet with its trimaps as the labels."""

from pathlib import Path

from torchvision.datasets import OxfordIIITPet

from seg_torch.datasets import base
from seg_torch.labels import Labels

PET_LABELS = Labels(("pet", "background", "outline"))

SOURCE = (
    "data.download=true, or images.tar.gz and annotations.tar.gz from "
    "https://www.robots.ox.ac.uk/~vgg/data/pets/, unpacked in oxford-iiit-pet"
)

read_mask = base.mapped_masks({1: 0, 2: 1, 3: 2})


def pet(root: str | Path, split: str, download: bool = False) -> base.SegmentationDataset:
    """Return Oxford-IIIT Pet (Parkhi, Vedaldi, Zisserman, Jawahar, CVPR 2012): 3 classes.

    `root/oxford-iiit-pet` holds `images/` and `annotations/`, as torchvision lays them out.
    Train is the list `trainval.txt` (3,680 images); val and test are both `test.txt` (3,669),
    since the dataset has no third split.

    Args:
        root: The folder that holds `oxford-iiit-pet`.
        split: "train", "val" or "test".
        download: Fetch it (0.8 GB) into `root` where it is missing.

    Returns:
        The samples of the split.

    Raises:
        InputError: The split is unknown, there is no such dataset, or the download failed.
    """
    split = base.val_for_test(split, "Oxford-IIIT Pet")
    if download and not (Path(root).expanduser() / "oxford-iiit-pet/annotations").exists():
        with base.downloading("Oxford-IIIT Pet", root):
            OxfordIIITPet(Path(root).expanduser(), download=True)
    listing = "trainval.txt" if split == "train" else "test.txt"
    entries = ["images", "annotations/trimaps", f"annotations/{listing}"]
    entries = [f"oxford-iiit-pet/{entry}" for entry in entries]
    images, masks, listed = base.find(root, "Oxford-IIIT Pet", entries, SOURCE)
    # "Abyssinian_100 1 1 1": the name, then class, species and breed.
    names = [line.split()[0] for line in base.read_list(listed)]
    pairs = base.pair_files(images, masks, names=names)
    return base.SegmentationDataset(pairs, PET_LABELS, read_mask)
