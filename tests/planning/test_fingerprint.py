"""What a plan goes by, on folders with known contents."""

import numpy as np
import pytest
from PIL import Image

from seg_torch.data import SegmentationDataModule
from seg_torch.datasets import folder
from seg_torch.planning.fingerprint import fingerprint


@pytest.fixture
def images(tmp_path):
    """`images(masks, pixels)` writes a folder of such masks and images, and returns its data."""

    def write(masks: list[np.ndarray], pixels: list[np.ndarray]) -> SegmentationDataModule:
        for i, (mask, image) in enumerate(zip(masks, pixels, strict=True)):
            for name, content in (("masks", mask), ("images", image)):
                (tmp_path / name).mkdir(exist_ok=True)
                Image.fromarray(content).save(tmp_path / name / f"{i}.png")
        (tmp_path / "classes.txt").write_text("ground\nline\nnever\n")
        return SegmentationDataModule(folder, str(tmp_path))

    return write


def noise(*size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)


def test_widths_shares_and_sizes(images):
    # A line four pixels wide across masks of 64 x 80, the lowest row of which is not labelled.
    mask = np.zeros((64, 80), np.uint8)
    mask[30:34], mask[63] = 1, 255
    data = images([mask] * 5, [noise(64, 80, 3)] * 5)
    found = fingerprint(data)
    assert found.images == {"train": 4, "val": 1}
    assert (found.size, found.one_size, found.channels, found.grey) == ((64, 80), True, 3, False)
    assert found.pixels.tolist() == [4 * 59 * 80, 4 * 4 * 80, 0]
    assert found.thickness[1] == pytest.approx(4.0)
    assert found.thickness[2] == np.inf
    assert found.holders.tolist() == [4, 4, 0]
    assert found.unlabelled == pytest.approx(1 / 64)
    assert found.rarest == ("line", pytest.approx(4 / 63))


def test_grey_images_of_several_shapes(images):
    sizes = [(64, 80), (80, 64), (64, 80), (48, 60), (64, 80)]
    found = fingerprint(images([np.zeros(s, np.uint8) for s in sizes], [noise(*s) for s in sizes]))
    assert found.grey
    assert not found.one_size
    assert not found.one_shape
    assert len(found.sizes) == 4


def test_images_with_a_sky_are_upright_and_micrographs_are_not(images):
    rng = np.random.default_rng(1)
    masks = [(rng.random((64, 64)) < 0.3).astype(np.uint8) for _ in range(5)]
    assert not fingerprint(images(masks, [noise(64, 64)] * 5)).upright
    bright = noise(64, 64) // 4
    bright[:32] += 150
    assert fingerprint(images(masks, [bright] * 5)).upright
    above = [np.where(np.arange(64)[:, None] < 32, mask, 0).astype(np.uint8) for mask in masks]
    assert fingerprint(images(above, [noise(64, 64)] * 5)).upright
