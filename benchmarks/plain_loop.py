"""The peer of `python train.py` on CamVid: SMP's U-Net in the plainest loop that is fast.

bfloat16, channels_last, all data decoded and resized in memory; scored at the training size.
benchmarks/camvid.py gives train.py the same recipe.

    python benchmarks/plain_loop.py DATA/camvid EPOCHS SEED
"""

import sys
import time
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from PIL import Image

start = time.perf_counter()
root, epochs, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
size, classes, batch = (240, 176), 11, 8
torch.manual_seed(seed)


def load(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    images, masks = [], []
    for line in Path(root, f"{split}.txt").read_text().splitlines():
        image, mask = (f"{root}/{name.split('CamVid/')[1]}" for name in line.split())
        pixels = Image.open(image).convert("RGB").resize(size, Image.Resampling.BILINEAR)
        images.append(torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8))
        labels = Image.open(mask).resize(size, Image.Resampling.NEAREST)
        masks.append(torch.frombuffer(bytearray(labels.tobytes()), dtype=torch.uint8))
    x = torch.stack(images).view(-1, size[1], size[0], 3).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    y = torch.stack(masks).view(-1, size[1], size[0]).long()
    return x.contiguous(memory_format=torch.channels_last), y.where(y < classes, 255)


(x, y), (val_x, val_y) = load("train"), load("val")
model = smp.Unet("resnet18", encoder_weights=None, classes=classes)
model = model.to(memory_format=torch.channels_last)
optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
steps = len(x) // batch
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * steps)
for epoch in range(epochs):
    model.train()
    for index in torch.randperm(len(x))[: steps * batch].view(steps, batch):
        images, target = x[index], y[index]
        flipped = torch.rand(batch) < 0.5
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
        target = torch.where(flipped.view(-1, 1, 1), target.flip(-1), target)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = torch.nn.functional.cross_entropy(logits.float(), target, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    matrix = torch.zeros(classes, classes, dtype=torch.long)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for i in range(0, len(val_x), batch):
            target = val_y[i : i + batch]
            pred = model(val_x[i : i + batch]).float().argmax(1)
            pairs = (target * classes + pred)[target != 255]
            matrix += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    iou = matrix.diag() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())
    accuracy = matrix.diag().sum() / matrix.sum()
    print(f"epoch {epoch} mean_iou {iou.nanmean():.4f} pixel_accuracy {accuracy:.4f}", flush=True)
print(f"seconds {time.perf_counter() - start:.1f}")
