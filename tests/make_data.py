"""Tiny copies of each dataset in its exact format on disk, with made-up images.

`make_NAME(root)` writes what `seg_torch.datasets.NAME(root, split)` reads.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_matrix

HEIGHT, WIDTH = 48, 64
VOID = 255


def picture(index: int, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth colours with some grain, RGB."""
    rng = np.random.default_rng(index)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray(
        (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype("uint8")
    )


def blocks(
    index: int, ids: list[int], void: int | None = VOID, height: int = HEIGHT, width: int = WIDTH
) -> np.ndarray:
    """A mask of three vertical bands, with a rim of void between them, uint8 [H, W]."""
    mask = np.zeros((height, width), np.uint8)
    for band in range(3):
        mask[:, band * width // 3 :] = ids[(3 * index + band) % len(ids)]
    if void is not None:
        mask[:, width // 3 - 1 : width // 3 + 1] = void
    return mask


def save(image: Image.Image | np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path)


def save_palette_png(mask: np.ndarray, path: Path) -> None:
    """As VOC's masks: indices with a palette whose colours have nothing to do with their value."""
    image = Image.fromarray(mask)
    image.putpalette(bytes(range(255, -1, -1)) * 3)
    save(image, path)


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def make_folder(root: Path) -> None:
    """Ten pairs, one of them in a subfolder, with three classes as grey indices."""
    names = [f"photo_{i}" for i in range(9)] + ["more/photo_9"]
    for i, name in enumerate(names):
        save(picture(i), root / "images" / f"{name}.jpg")
        save(blocks(i, [0, 1, 2]), root / "masks" / f"{name}.png")
    write_lines(root / "classes.txt", ["# my classes", "", "background", "traffic light", "car"])


def make_camvid(root: Path) -> None:
    for split, count in (("train", 4), ("val", 3)):
        lines = []
        for i in range(count):
            name = f"0001TP_{i:06}.png"
            save(picture(i), root / split / name)
            save(blocks(i, list(range(11)), void=11), root / f"{split}annot" / name)
            prefix = "/SegNet/CamVid"
            lines.append(f"{prefix}/{split}/{name} {prefix}/{split}annot/{name}")
        write_lines(root / f"{split}.txt", lines)


# Two of train, one of val and two of test, in the standard split.
CAMVID32_FRAMES = (
    "0001TP_008520",
    "0016E5_08640",
    "0016E5_07961",
    "0001TP_008550",
    "Seq05VD_f00000",
)


def make_camvid32(root: Path) -> None:
    colours = np.array([(128, 64, 128), (128, 128, 128), (0, 0, 0), (64, 192, 0)], np.uint8)
    for i, name in enumerate(CAMVID32_FRAMES):
        save(picture(i), root / "701_StillsRaw_full" / f"{name}.png")
        mask = colours[blocks(i, [0, 1, 2, 3], void=None)]
        save(mask, root / "LabeledApproved_full" / f"{name}_L.png")


def make_clothing(root: Path) -> None:
    """Six annotated photos and one without annotation, as most of the real ones are."""
    for i in range(1, 8):
        save(picture(i, 64, 48), root / "photos" / f"{i:04}.jpg")
    annotations = root / "annotations" / "pixel-level"
    annotations.mkdir(parents=True)
    for i in range(1, 7):
        mask = blocks(i, [0, 19, 41, 58], void=None, height=64, width=48)
        savemat(annotations / f"{i:04}.mat", {"groundtruth": mask})


def make_voc(root: Path) -> None:
    voc = root / "VOCdevkit" / "VOC2012"
    for split, start, count in (("train", 0, 4), ("val", 4, 5)):
        names = [f"2007_{i:06}" for i in range(start, start + count)]
        for i, name in enumerate(names, start):
            save(picture(i), voc / "JPEGImages" / f"{name}.jpg")
            save_palette_png(blocks(i, list(range(21))), voc / "SegmentationClass" / f"{name}.png")
        write_lines(voc / "ImageSets" / "Segmentation" / f"{split}.txt", names)


def make_voc_sbd(root: Path) -> None:
    """SBD as its archive unpacks: one image of VOC train, one of VOC val, three of its own."""
    make_voc(root)
    sbd = root / "benchmark_RELEASE" / "dataset"
    train = ["2007_000001", "2007_000005", "2008_000001"]
    val = ["2008_000002", "2008_000003"]
    (sbd / "cls").mkdir(parents=True)
    for i, name in enumerate(train + val):
        save(picture(20 + i), sbd / "img" / f"{name}.jpg")
        edges = np.empty((20, 1), object)
        edges[:, 0] = [csc_matrix((HEIGHT, WIDTH), dtype=np.uint8) for _ in range(20)]
        mask = blocks(i, [0, 7, 20], void=None)
        fields = {
            "Boundaries": edges,
            "Segmentation": mask,
            "CategoriesPresent": np.array([[7], [20]], np.uint8),
        }
        savemat(sbd / "cls" / f"{name}.mat", {"GTcls": fields})
    write_lines(sbd / "train.txt", train)
    write_lines(sbd / "val.txt", val)


def make_pet(root: Path) -> None:
    pet = root / "oxford-iiit-pet"
    for listing, start, count in (("trainval", 1, 4), ("test", 5, 3)):
        names = [f"Abyssinian_{i}" for i in range(start, start + count)]
        for i, name in enumerate(names, start):
            save(picture(i), pet / "images" / f"{name}.jpg")
            mask = blocks(i, [1, 2, 3], void=None)
            save(mask, pet / "annotations" / "trimaps" / f"{name}.png")
        write_lines(pet / "annotations" / f"{listing}.txt", [f"{name} 1 1 1" for name in names])


def make_cityscapes(root: Path) -> None:
    ids = [0, 1, 4, 7, 8, 11, 23, 24, 26, 33]
    for split, city, count in (("train", "aachen", 3), ("val", "lindau", 2), ("test", "bonn", 1)):
        for i in range(count):
            name = f"{city}_{i:06}_000019"
            save(picture(i), root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
            mask = blocks(i, ids if split != "test" else [3], void=None)
            home = root / "gtFine" / split / city
            save(mask, home / f"{name}_gtFine_labelIds.png")
            save(mask, home / f"{name}_gtFine_instanceIds.png")


def make_ade20k(root: Path) -> None:
    home = root / "ADEChallengeData2016"
    for split, short, count in (("training", "train", 3), ("validation", "val", 2)):
        for i in range(count):
            name = f"ADE_{short}_{i + 1:08}"
            save(picture(i), home / "images" / split / f"{name}.jpg")
            save(blocks(i, [1, 2, 75, 150], void=0), home / "annotations" / split / f"{name}.png")


def make_coco_stuff(root: Path) -> None:
    for split, count in (("train2017", 3), ("val2017", 2)):
        for i in range(count):
            name = f"{i + 139:012}"
            save(picture(i), root / "images" / split / f"{name}.jpg")
            mask = blocks(i, [0, 10, 12, 89, 91, 181])
            save(mask, root / "stuffthingmaps" / split / f"{name}.png")
