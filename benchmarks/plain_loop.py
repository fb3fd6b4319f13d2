"""The peer of `python train.py` on CamVid: SMP's U-Net in the plainest loop that is fast.

bfloat16, channels_last, all data decoded and resized in memory; scored at the training size.
benchmarks/same_recipe.py gives train.py the same recipe.

    python benchmarks/plain_loop.py DATA/camvid EPOCHS SEED [WEIGHTS]

With timm's weights of tf_efficientnet_lite0 that is the encoder, images have 264 x 352 pixels, and
the scores are those at the labels' own size, for benchmarks/camvid.py. The seconds of an epoch are
those of all training steps so far; validation does not count.
"""

import sys
import time
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from PIL import Image
from safetensors.torch import load_file

start = time.perf_counter()
root, epochs, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
weights = sys.argv[4] if len(sys.argv) > 4 else None
encoder = "tu-tf_efficientnet_lite0" if weights else "resnet18"
size, own_size, classes, batch = (352, 264) if weights else (240, 176), (480, 360), 11, 8
# Of the images with which the encoder was trained.
means, deviations = ([0.5] * 3,) * 2 if weights else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
torch.manual_seed(seed)


def load(split: str, label_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    images, masks = [], []
    for line in Path(root, f"{split}.txt").read_text().splitlines():
        image, mask = (f"{root}/{name.split('CamVid/')[1]}" for name in line.split())
        pixels = Image.open(image).convert("RGB").resize(size, Image.Resampling.BILINEAR)
        images.append(torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8))
        labels = Image.open(mask).resize(label_size, Image.Resampling.NEAREST)
        masks.append(torch.frombuffer(bytearray(labels.tobytes()), dtype=torch.uint8))
    x = torch.stack(images).view(-1, size[1], size[0], 3).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(means), torch.tensor(deviations)
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    y = torch.stack(masks).view(-1, label_size[1], label_size[0]).long()
    return x.contiguous(memory_format=torch.channels_last), y.where(y < classes, 255)


x, y = load("train", size)
val_x, val_y = load("val", own_size if weights else size)
model = smp.Unet(encoder, encoder_weights=None, classes=classes)
if weights:
    missing, _ = model.encoder.model.load_state_dict(load_file(weights), strict=False)
    assert not missing, missing
model = model.to(memory_format=torch.channels_last)
optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
steps = len(x) // batch
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * steps)
clock = 0.0
for epoch in range(epochs):
    epoch_start = time.perf_counter()
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
    clock += time.perf_counter() - epoch_start
    model.eval()
    matrix = torch.zeros(classes, classes, dtype=torch.long)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for i in range(0, len(val_x), batch):
            target = val_y[i : i + batch]
            logits = model(val_x[i : i + batch]).float()
            pred = torch.nn.functional.interpolate(
                logits, target.shape[1:], mode="bilinear"
            ).argmax(1)
            pairs = (target * classes + pred)[target != 255]
            matrix += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    iou = matrix.diag() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())
    accuracy = matrix.diag().sum() / matrix.sum()
    scores = f"mean_iou {iou.nanmean():.4f} pixel_accuracy {accuracy:.4f}"
    print(f"epoch {epoch} {scores} after {clock:.1f} s", flush=True)
print(f"seconds {time.perf_counter() - start:.1f}")
