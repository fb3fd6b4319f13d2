"""The one loading rule on the way through a dataset, and what is asked of any dataset."""

from __future__ import annotations

import pickle
import shutil
import tracemalloc
from pathlib import Path

import make_data
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_copies import TinyCopies
from torchvision import tv_tensors

from seg_torch import datasets
from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets.base import as_dataset, checked_sample
from seg_torch.datasets.shapes import SHAPES_LABELS
from seg_torch.errors import InputError

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder with the tiny copy of each dataset, by name."""
    return TinyCopies(tmp_path_factory)


@pytest.fixture
def build(copies):
    """build(name, split): the dataset."""
    return copies.build


@pytest.fixture
def own(tmp_path):
    """A folder dataset to be broken by the test."""
    make_data.make_folder(tmp_path)
    return tmp_path


def only_pair(root: Path, image: Image.Image, mask: np.ndarray, **options):
    """A folder dataset whose val split is the given pair."""
    image.save(root / "images" / "z.png", **options)
    Image.fromarray(mask).save(root / "masks" / "z.png")
    make_data.write_lines(root / "train.txt", ["photo_0"])
    make_data.write_lines(root / "val.txt", ["z"])
    return datasets.folder(root, "val")


@pytest.mark.promise(19)
@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "LA", "P", "I;16"])
def test_images_of_every_mode_become_rgb(own, mode):
    picture = make_data.picture(0)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        image = picture.convert(mode)
    pixels, _ = only_pair(own, image, np.zeros((48, 64), np.uint8))[0]
    expected = np.asarray((picture if mode == "I;16" else image).convert("L"), int)
    brightness = np.asarray(Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L"), int)
    assert np.abs(brightness - expected).max() <= 1


def test_16_bit_images_are_scaled_not_clipped(own):
    values = np.full((48, 64), 32896, np.uint16)  # 128 * 257
    pixels, _ = only_pair(own, Image.fromarray(values), np.zeros((48, 64), np.uint8))[0]
    assert pixels.unique().tolist() == [128]


@pytest.mark.promise(20)
def test_a_photo_with_orientation_6_lies_under_its_mask(own):
    upright = np.zeros((64, 48), np.uint8)
    upright[5:20, 30:45] = 1
    stored = np.rot90(upright * 255, 1)  # orientation 6: to be turned clockwise for display
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels, mask = only_pair(own, Image.fromarray(stored), upright, exif=exif)[0]
    assert pixels.shape == (3, 64, 48)
    assert torch.equal(pixels[0] == 255, mask == 1)


def test_a_mask_of_another_size_is_refused_with_both_sizes(build, tmp_path, copies):
    root = tmp_path / "voc"
    shutil.copytree(copies["voc"], root)
    dataset = datasets.voc(root, "train")
    make_data.save_palette_png(np.zeros((40, 64), np.uint8), dataset.pairs[0].mask)
    with pytest.raises(InputError, match=r"2007_000000\.png.*64 x 40 .*64 x 48"):
        dataset[0]


def test_palette_masks_are_read_by_index_not_by_brightness(build):
    # The tiny copies' palette turns index i into the grey 255 - i.
    assert set(np.unique(build("voc", "train").mask(0))) == {0, 1, 2, 255}


def test_a_16_bit_mask_of_class_ids_is_read_as_they_are(own):
    mask = np.tile(np.array([0, 1, 2, 255], np.uint16), (48, 16))
    dataset = only_pair(own, make_data.picture(0), mask)
    assert np.unique(dataset.mask(0)).tolist() == [0, 1, 2, 255]


class Own:
    """A dataset that somebody wrote: one item, whatever it is."""

    labels = SHAPES_LABELS

    def __init__(self, *sample):
        self.sample = sample

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.sample


def tensors(image_size=(3, 4, 5), mask_size=(4, 5), value=0, dtype=torch.uint8):
    image = tv_tensors.Image(torch.zeros(image_size, dtype=dtype))
    return image, tv_tensors.Mask(torch.full(mask_size, value, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (tensors(value=6), r"mask values \[6\]; allowed are 0 to 5 \(the 6 classes\) and 255"),
        (
            tensors(mask_size=(5, 4)),
            r"Image torch\.uint8 \[3, 4, 5\] and Mask torch\.uint8 \[5, 4\]",
        ),
        (tensors(dtype=torch.float32), r"Image torch\.float32"),
        (tensors(image_size=(1, 3, 4, 5)), r"Image torch\.uint8 \[1, 3, 4, 5\]"),
        ((tensors()[0], torch.zeros(4, 5, dtype=torch.uint8)), r"Tensor torch\.uint8 \[4, 5\]"),
        ((np.zeros((4, 5, 3), np.uint8), tensors()[1]), r"ndarray uint8 \[4, 5, 3\]"),
        ((tensors()[0],), "tuple"),
    ],
)
def test_d11_a_sample_of_any_dataset_is_checked(sample, message):
    with pytest.raises(InputError, match=rf"Own\[0\]: (found .*)?{message}"):
        checked_sample(as_dataset(Own(*sample)), 0)


def test_d11_class_ids_and_255_are_allowed():
    for value in (0, 5, 255):
        assert checked_sample(as_dataset(Own(*tensors(value=value))), 0)[1].unique().tolist() == [
            value
        ]


def test_pairs_are_those_that_they_were_made_from():
    odd = "caf\u00e9 \n", "\udcff"  # a line break, and a byte that is not UTF-8
    expected = [datasets.Pair(n, Path("a", f"{n}.jpg"), Path("b", f"{n}.png")) for n in (*odd, "c")]
    pairs = datasets.base.Pairs(expected)
    assert list(pairs) == expected
    assert pairs[-1] == expected[2]
    assert list(pairs[1:]) == expected[1:]
    assert list(pickle.loads(pickle.dumps(pairs))) == expected
    assert pairs == datasets.base.Pairs(expected)
    assert pairs != datasets.base.Pairs(expected[:2])
    with pytest.raises(IndexError):
        pairs[3]


def test_a_pair_takes_little_more_memory_than_its_names():
    number, path = 10_000, "/data/a/folder/of/images/000000.png"
    tracemalloc.start()
    try:
        pairs = datasets.base.Pairs((f"{i:06d}", path, path) for i in range(number))
        used = tracemalloc.get_traced_memory()[0] / number
    finally:
        tracemalloc.stop()
    assert len(pairs) == number
    assert used < 1.5 * (6 + 2 * len(path) + 10)  # an offset of 8 bytes, two separators


class Wrapper:
    """Somebody's own samples, each made from one of another dataset."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices, self.labels = dataset, indices, dataset.labels

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.dataset[self.indices[index]]


def test_the_files_of_a_wrapper_are_checked_unless_it_is_a_selection(own):
    (own / "masks/photo_0.png").write_bytes(b"")
    files = datasets.folder(own, "train")
    every, some = Wrapper(files, [*range(8)] * 2), Wrapper(files, [2, 3])  # photo_0 is 1
    assert as_dataset(every).base_dataset is files
    assert as_dataset(some).base_dataset.pairs is None
    for samples, problems in ((every, 1), (some, 0)):
        data = SegmentationDataModule(lambda split, samples=samples: samples)
        assert len(data.checked("train").problems) == problems
        assert data.dataset("train").name(1) == "Wrapper[1]"


def test_anything_with_labels_length_and_items_is_a_dataset():
    image, mask = tensors(value=3)
    dataset = as_dataset(Own(image, mask))
    assert (len(dataset), dataset.labels, dataset.name(0)) == (1, SHAPES_LABELS, "Own[0]")
    assert (dataset.mask(0) == mask.numpy()).all()
    assert dataset.fingerprint() is None
    assert as_dataset(dataset) is dataset
