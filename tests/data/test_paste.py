"""Regions of rare classes that are pasted from another image."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from batches import small_shapes
from torchvision import tv_tensors
from torchvision.transforms import v2

from seg_torch.data import rare
from seg_torch.data.module import SegmentationDataModule
from seg_torch.data.paste import MOST, Donors, PasteRegions
from seg_torch.data.sampling import AugmentedSamples
from seg_torch.data.transforms import augment
from seg_torch.errors import InputError

SHARES = torch.tensor([0.7, 0.2, 0.06, 0.03, 0.01] + [0.0] * 250 + [-1.0], dtype=torch.float64)
# An L of class 3, beside other pixels that are not to come along.
SHAPE = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 0, 1]], bool)


def donor(channels=3, dtype=torch.uint8):
    values = torch.arange(channels * 12 * 10).remainder(97).add(100).view(channels, 12, 10)
    mask = torch.ones(12, 10, dtype=torch.uint8)
    mask[5:9, 4:7] = torch.from_numpy(np.where(SHAPE, 3, 4).astype(np.uint8))
    return values.to(dtype), mask, [(3, 5, 4, 4, 3)]


def target(channels=3, dtype=torch.uint8, kind=0, height=16, width=20):
    image = torch.arange(channels * height * width).remainder(89).view(channels, height, width)
    mask = torch.full((height, width), kind, dtype=torch.uint8)
    return tv_tensors.Image(image.to(dtype)), tv_tensors.Mask(mask)


def pasting(found, scale=None, flip=0.0, probability=1.0) -> PasteRegions:
    step = PasteRegions(probability, scale, flip)
    step.draw, step.shares = lambda: found, SHARES
    return step


@pytest.mark.parametrize(
    ("channels", "dtype"), [(3, torch.uint8), (1, torch.uint8), (6, torch.float32)]
)
def test_image_and_mask_get_exactly_the_pixels_of_the_region(channels, dtype):
    found, (image, mask) = donor(channels, dtype), target(channels, dtype)
    before, places = image.clone(), set()
    for _ in range(300):
        pasted, labels = pasting(found)(image, mask)
        rows, columns = np.nonzero(labels.numpy())
        top, left = rows.min(), columns.min()
        expected_mask, expected = mask.numpy().copy(), image.numpy().copy()
        expected_mask[top : top + 4, left : left + 3][SHAPE] = 3
        expected[:, top : top + 4, left : left + 3][:, SHAPE] = found[0].numpy()[:, 5:9, 4:7][
            :, SHAPE
        ]
        assert np.array_equal(labels.numpy(), expected_mask)
        assert np.array_equal(pasted.numpy(), expected)
        assert (pasted.dtype, type(pasted), type(labels)) == (
            *(dtype, tv_tensors.Image),
            tv_tensors.Mask,
        )
        places.add((top, left))
    assert {top for top, _ in places} == {*range(16 - 4 + 1)}
    assert {left for _, left in places} == {*range(20 - 3 + 1)}
    assert torch.equal(image, before), "what is kept for the next epochs has changed"
    assert not mask.any()


@pytest.mark.parametrize("below", [4, 255])
def test_nothing_covers_a_rarer_class_or_pixels_that_are_not_labelled(below):
    image, mask = target(kind=below)
    pasted, labels = pasting(donor())(image, mask)
    assert torch.equal(pasted, image)
    assert torch.equal(labels, mask)
    mask[:, :10] = 2  # half of it may be covered
    for _ in range(50):
        pasted, labels = pasting(donor())(image, mask)
        changed = labels != mask
        assert not changed[:, 10:].any()
        assert torch.equal((pasted != image).any(0), changed)


def test_a_region_is_scaled_and_flipped_with_its_mask():
    _, labels = pasting(donor(), scale=(2.0, 2.0), flip=1.0)(*target())
    rows, columns = np.nonzero(labels.numpy())
    found = labels.numpy()[rows.min() :, columns.min() :][:8, :6] == 3
    assert np.array_equal(found, SHAPE[:, ::-1].repeat(2, 0).repeat(2, 1))
    heights = set()
    for _ in range(100):
        _, labels = pasting(donor(), scale=(0.5, 1.5))(*target())
        heights.add(int((labels == 3).any(1).sum()))
    assert heights == {2, 3, 4, 5, 6}


def test_of_a_region_larger_than_the_image_a_part_is_pasted():
    image, mask = target(height=5, width=4)
    mask[2, 2] = 255
    for _ in range(30):
        _, labels = pasting(donor(), scale=(3.0, 3.0))(image, mask)
        assert labels.shape == (5, 4)
        assert int(labels[2, 2]) == 255
        assert {*labels.unique().tolist()} <= {0, 3, 255}


def test_the_probability_is_that_of_an_image():
    step = pasting(donor(), probability=0.3)
    pasted = sum(bool(step(*target())[1].any()) for _ in range(1000))
    assert abs(pasted - 300) < 4 * (1000 * 0.3 * 0.7) ** 0.5
    image, mask = target()
    assert PasteRegions(1.0, None, 0.5)(image, mask) == (image, mask), "there are no donors"
    for wrong in (1.5, [0.1, 0.2]):
        with pytest.raises(InputError, match=r"augment\.paste=.*: expected 0 to 1"):
            augment(paste=wrong)


# Donors


def table(*rows) -> rare.Regions:
    found = np.array([(*row, 2, 2, 2, 2) for row in rows], np.int32)
    chances = np.arange(1.0, len(rows) + 1)
    shares = np.array([0.9, 0.08, 0.02] + [0.0] * 252 + [-1.0])
    return rare.Regions(found, chances / chances.sum(), np.full((4, 2), 8), shares)


def test_donors_are_other_images_by_the_chances_of_their_regions():
    regions = table((0, 1, 4), (0, 2, 4), (1, 1, 4), (3, 1, 4), (3, 2, 4), (3, 2, 4))
    samples = [(index, torch.zeros(8, 8)) for index in range(4)]
    donors, count = Donors(samples, regions), 1500
    for own in range(4):
        found = Counter(donors.draw(own)[0] for _ in range(count))
        weights = np.bincount(regions.table[:, 0], regions.chances, 4)
        weights[own] = 0
        expected = weights / weights.sum()
        error = np.sqrt(count * expected * (1 - expected))
        assert (
            np.abs(np.array([found[i] for i in range(4)]) - count * expected) <= 4.5 * error
        ).all()
    sizes = {len(donors.draw(0)[2]) for _ in range(200)}
    assert sizes == {1, 2, 3}  # image 3 has three
    assert max(sizes) <= MOST
    assert Donors(samples, table((2, 1, 4))).draw(2)[2] == []


def test_only_rare_classes_and_regions_of_at_most_half_an_image_are_pasted():
    regions = table((0, 0, 4), (0, 1, 4), (1, 2, 4), (2, 2, 4))
    regions.table[3, 5:] = 8, 5
    assert rare.rare_classes(regions.shares) == [1, 2]
    kept = rare.to_paste(regions)
    assert kept.table.tolist() == regions.table[1:3].tolist()
    assert kept.chances.tolist() == pytest.approx([2 / 5, 3 / 5])
    regions.table[3, 5:] = 8, 4
    assert len(rare.to_paste(regions).table) == 3
    even = regions._replace(shares=np.array([0.5, 0.3, 0.2] + [0.0] * 253))
    assert len(rare.to_paste(even).table) == 0


def test_what_is_pasted_is_told_and_at_the_size_that_the_network_sees(caplog):
    module = SegmentationDataModule(
        small_shapes, resize=(48, 40), augment=v2.Compose([augment(paste=1, jitter=None)])
    )
    with caplog.at_level(logging.INFO):
        module.tell_sampling()
    kinds = rare.rare_classes(module.regions.shares)
    names = ", ".join(small_shapes("train").labels.names[k] for k in kinds)
    assert kinds
    assert f"data.augment.paste pastes {names}" in caplog.text
    augmented = module.train_dataloader().dataset
    augmented.augment = v2.Compose(augmented.augment.transforms[0].transforms[:1])  # without flips
    plain, changed = augmented.samples, 0
    for index in range(11):
        image, mask = augmented[0, index]
        assert mask.shape == (48, 40)
        new = mask != plain[index][1]
        assert {*mask[new].unique().tolist()} <= {*kinds}
        assert not (image != plain[index][0]).any(0)[~new & (mask == 0)].any()
        changed += bool(new.any())
    assert changed > 5


def test_no_rare_class_is_told_and_nothing_is_pasted(caplog):
    class Even:
        labels = small_shapes("train").labels

        def __len__(self):
            return 2

        def __getitem__(self, index):
            mask = torch.zeros(8, 8, dtype=torch.uint8)
            mask[:, 4:] = 1
            image = torch.full((3, 8, 8), index, dtype=torch.uint8)
            return tv_tensors.Image(image), tv_tensors.Mask(mask)

    module = SegmentationDataModule(lambda split: Even(), augment=augment(paste=1, jitter=None))
    with caplog.at_level(logging.INFO):
        module.tell_sampling()
    assert "nothing, since no class is rare" in caplog.text
    assert module.train_dataloader().dataset[0, 1][0].unique().tolist() == [1]


def test_donor_and_place_follow_from_the_draw_alone():
    samples = [target() for _ in range(3)]
    for index, (image, mask) in enumerate(samples):
        image += index
        mask[:4, :4] = 1
    regions = table((0, 1, 16), (1, 1, 16), (2, 1, 16))
    regions.table[:, 3:] = 0, 0, 4, 4
    regions = regions._replace(sizes=np.full((3, 2), (16, 20)))

    def made(seed: int, order) -> dict:
        donors = Donors(samples, regions)
        found = AugmentedSamples(samples, augment(paste=1, jitter=None), seed, regions, donors)
        return {draw: found[draw] for draw in order}

    draws = [(e, i, copy) for e in range(2) for i in range(3) for copy in range(2)]
    first, second = made(0, draws), made(0, draws[::-1])
    for draw in draws:
        assert all(torch.equal(a, b) for a, b in zip(first[draw], second[draw], strict=True))
    assert len({mask.numpy().tobytes() for _, mask in first.values()}) == len(draws)
