"""What two processes that test_folders.py starts do at the same moment, many times."""

import json
import os
import sys
import time
from pathlib import Path

from seg_torch.errors import InputError
from seg_torch.folders import claimed, new_folder

if __name__ == "__main__":
    root, mine, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    outcomes = []
    for number in range(int(sys.argv[4])):
        (root / f"{number}-{mine}").touch()
        end = time.monotonic() + 30
        while not (root / f"{number}-{other}").exists():
            assert time.monotonic() < end, "the other process has ended"
            time.sleep(0.0001)
        outcome = {"new": new_folder(str(root / f"new-{number}")), "refused": ""}
        try:
            with claimed(root / f"claimed-{number}"):
                alone = root / f"alone-{number}"
                os.close(os.open(alone, os.O_CREAT | os.O_EXCL))  # fails if both are here
                time.sleep(0.05)
                alone.unlink()
        except InputError as error:
            outcome["refused"] = str(error)
        outcomes.append(outcome)
    (root / f"outcomes-{mine}").write_text(json.dumps(outcomes), encoding="utf-8")
