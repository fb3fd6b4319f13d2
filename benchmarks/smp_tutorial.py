"""A peer in benchmarks/planning.py: the loop of SMP's CamVid tutorial, with what it sets.

SMP's U-Net in float32, Dice loss, Adam at 2e-4 down to 1e-5 along a cosine, batches of 32, crops of
320 x 320 after a flip, a change of scale by a half and a shift by a tenth. What differs: encoder
and weights are those of the other sides, padding is ignored, images are normalised as the encoder
expects, and the tutorial's perspective, blur and noise are left out, which take time on a CPU.

    python benchmarks/smp_tutorial.py ROOT WEIGHTS MINUTES SEED OUTPUT

ROOT is laid out for `data=folder`. The clock starts with the first step; nothing is validated.
Then a mask of each image of val is written to OUTPUT, at the image's size.
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

ENCODER = "tf_efficientnet_lite0"
NOTHING = {tv_tensors.Image: 0, tv_tensors.Mask: 255}
AUGMENT = v2.Compose(
    [
        v2.RandomHorizontalFlip(0.5),
        v2.RandomAffine(0, translate=(0.1, 0.1), scale=(0.5, 1.5), fill=NOTHING),
        v2.RandomCrop((320, 320), pad_if_needed=True, fill=NOTHING),
        v2.ColorJitter(0.2, 0.2, 0.2, 0.05),
    ]
)


class Samples(Dataset):
    def __init__(self, root: Path, split: str) -> None:
        self.masks = root / "masks"
        names = (root / f"{split}.txt").read_text().split()
        files = {file.stem: file for file in (root / "images").iterdir()}
        self.files = [files[name] for name in names]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = v2.functional.pil_to_tensor(Image.open(self.files[index]).convert("RGB"))
        mask = np.array(Image.open(self.masks / f"{self.files[index].stem}.png"))
        return AUGMENT(tv_tensors.Image(image), tv_tensors.Mask(mask))


def main() -> None:
    root, weights, output = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[5])
    limit, seed = 60 * float(sys.argv[3]), int(sys.argv[4])
    torch.manual_seed(seed)
    classes = len((root / "classes.txt").read_text().strip().splitlines())
    model = smp.Unet(f"tu-{ENCODER}", encoder_weights=None, classes=classes)
    missing, _ = model.encoder.model.load_state_dict(load_file(weights), strict=False)
    assert not missing, missing
    loader = DataLoader(Samples(root, "train"), batch_size=32, shuffle=True)
    criterion = smp.losses.DiceLoss("multiclass", from_logits=True, ignore_index=255)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    start, steps = time.perf_counter(), 0
    while (gone := (time.perf_counter() - start) / limit) < 1:
        for images, masks in loader:
            for group in optimizer.param_groups:
                group["lr"] = 1e-5 + (2e-4 - 1e-5) * (1 + math.cos(math.pi * gone)) / 2
            loss = criterion(model(images / 127.5 - 1), masks.long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if (gone := (time.perf_counter() - start) / limit) >= 1:
                break
    print(f"{steps} steps in {time.perf_counter() - start:.1f} s")
    output.mkdir(parents=True, exist_ok=True)
    model.eval()
    for file in Samples(root, "val").files:
        pixels = v2.functional.pil_to_tensor(Image.open(file).convert("RGB"))
        height, width = pixels.shape[-2:]
        padded = F.pad(pixels / 127.5 - 1, (0, -width % 32, 0, -height % 32))
        with torch.inference_mode():
            found = model(padded[None])[0, :, :height, :width].argmax(0)
        Image.fromarray(found.to(torch.uint8).numpy()).save(output / f"{file.stem}.png")


if __name__ == "__main__":
    main()
