"""Rare classes: the chances of regions, the exposure of classes, draws and windows that aim."""

from collections import Counter

import numpy as np
import pytest
import torch
from batches import epoch, equal, small_shapes, trainer_stub
from torchvision import tv_tensors
from torchvision.transforms import v2

from seg_torch.data import rare
from seg_torch.data.check import check
from seg_torch.data.module import SegmentationDataModule
from seg_torch.data.sampling import AugmentedSamples, EpochSampler
from seg_torch.data.transforms import RandomScaleCrop, augment, for_sample
from seg_torch.datasets.eightfold import EightFold
from seg_torch.errors import InputError

# Image, class, pixels, top, left, height, width.
TABLE = np.array(
    [
        (0, 0, 900, 0, 0, 30, 30),
        (0, 1, 4, 2, 2, 2, 2),
        (0, 1, 16, 9, 9, 4, 4),
        (1, 0, 900, 0, 0, 30, 30),
        (2, 0, 900, 0, 0, 30, 30),
        (2, 1, 25, 3, 3, 5, 5),
        (2, 2, 9, 20, 20, 3, 3),
        (3, 0, 900, 0, 0, 30, 30),
    ],
    np.int32,
)
SHARES = np.array([0.9, 0.09, 0.01] + [0.0] * 252 + [-1.0])


def chances_by_hand(table, shares, length):
    """With loops: the class, an image that holds it, a region in it."""
    classes = sorted({int(row[1]) for row in table})
    weights = {k: shares[k] ** -0.5 for k in classes}
    holding = {k: sorted({int(row[0]) for row in table if row[1] == k}) for k in classes}
    total = sum(weights.values())
    capped = {k: min(weights[k] / total, 2 * 4 * len(holding[k]) / length) for k in classes}
    found = []
    for image, kind, pixels, *_ in table.tolist():
        sides = [row[2] ** 0.5 for row in table.tolist() if row[:2] == [image, kind]]
        of_class = capped[kind] / sum(capped.values())
        found.append(of_class / len(holding[kind]) * pixels**0.5 / sum(sides))
    return np.array(found)


def made_regions(length: int = 4) -> rare.Regions:
    chances = rare.region_chances(TABLE, SHARES, length)
    return rare.Regions(TABLE, chances, np.full((length, 2), 30), SHARES)


@pytest.mark.parametrize("length", [4, 50])  # of 50 the only image of class 2 comes too often
def test_a_region_is_drawn_by_its_class_its_image_and_its_size(length):
    chances = rare.region_chances(TABLE, SHARES, length)
    np.testing.assert_allclose(chances, chances_by_hand(TABLE, SHARES, length))
    assert chances.sum() == pytest.approx(1)
    of_class = np.bincount(TABLE[:, 1], chances)
    if length == 4:
        assert of_class[1:] / of_class[:-1] == pytest.approx([10**0.5, 9**0.5])
    else:
        assert of_class[2] < of_class[1]


def test_exposures_are_those_of_every_draw_enumerated_and_of_a_long_simulation():
    regions, times = made_regions(), 1500
    holds = {(int(image), int(kind)) for image, kind in TABLE[:, :2]}
    usual, aimed = np.zeros(3), np.zeros(3)
    for kind in range(3):
        for image in range(4):
            usual[kind] += ((image, kind) in holds) / 4
        for row, chance in zip(TABLE, chances_by_hand(TABLE, SHARES, 4), strict=True):
            aimed[kind] += chance * ((int(row[0]), kind) in holds)
    found = rare.exposures(regions, draws=12, aimed=6)
    np.testing.assert_allclose(found[0][:3], 12 * usual)
    np.testing.assert_allclose(found[1][:3], 6 * usual + 6 * aimed)
    assert not found[1][3:].any()
    of_class = np.bincount(TABLE[:, 1], chances_by_hand(TABLE, SHARES, 4))
    np.testing.assert_allclose(found[2][:3], 6 * of_class)

    draws = np.zeros((times, 3))
    for number in range(times):
        sampler = EpochSampler(4, 4, 0, epoch=number, repeat=3, regions=regions)
        images = [draw.image for batch in sampler for draw in batch]
        draws[number] = [sum((image, kind) in holds for image in images) for kind in range(3)]
    error = draws.std(axis=0) / times**0.5
    assert (np.abs(draws.mean(axis=0) - found[1][:3]) <= 4 * error + 1e-9).all()
    factors = found[1][:3] / found[0][:3]
    assert (np.diff(factors) > 0).all(), "the rarer, the more exposure is added"


def test_half_of_the_draws_aim_and_they_depend_on_seed_and_epoch_alone():
    regions = made_regions()

    def drawn(number: int, **options):
        sampler = EpochSampler(4, 2, 7, epoch=number, repeat=4, regions=regions, **options)
        return [draw for batch in sampler for draw in batch]

    for number in range(5):
        draws = drawn(number)
        aiming = [draw for draw in draws if draw.region >= 0]
        assert (len(draws), len(aiming)) == (16, 8)
        assert all(TABLE[draw.region, 0] == draw.image for draw in aiming)
        assert len({draw[:3] for draw in draws}) == 16, "each copy has a number of its own"
        shares = [drawn(number, rank=rank, world=2) for rank in range(2)]
        assert Counter(shares[0] + shares[1]) == Counter(draws)
        assert drawn(number, start=3) == draws[6:]
        assert drawn(number, overfit=True) == drawn(0)
    assert drawn(1) != drawn(2)


# Windows


def scene(height=60, width=80, kind=2, box=(10, 50, 6, 9)):
    mask = torch.zeros(height, width, dtype=torch.uint8)
    top, left, tall, wide = box
    mask[top : top + tall, left : left + wide] = kind
    image = torch.arange(height * width).remainder(251).byte().view(1, height, width)
    return tv_tensors.Image(image.repeat(3, 1, 1)), tv_tensors.Mask(mask), (kind, *box)


def test_a_window_that_aims_shows_the_whole_region_anywhere_in_it():
    image, mask, aim = scene()
    crop = for_sample(RandomScaleCrop((20, 24), None), 0, aim, None)
    places = set()
    for _ in range(400):
        part = crop(image, mask)[1]
        rows, columns = (part == 2).nonzero(as_tuple=True)
        assert len(rows) == 6 * 9
        places.add((int(rows[0]), int(columns[0])))
    assert {row for row, _ in places} == {*range(20 - 6 + 1)} - {*range(11, 15)}  # of row 10
    assert {column for _, column in places} == {*range(24 - 9 + 1)}


def test_a_window_smaller_than_the_region_shows_some_of_its_class():
    _, mask, _ = scene(box=(0, 0, 1, 1))
    mask[5:55, 3], mask[54, 3:70] = 4, 4  # an L whose box is mostly something else
    image = tv_tensors.Image(torch.zeros(3, 60, 80, dtype=torch.uint8))
    crop = for_sample(RandomScaleCrop((16, 16), (1.0, 1.5)), 0, (4, 5, 3, 50, 67), None)
    shown = [bool((crop(image, mask)[1] == 4).any()) for _ in range(200)]
    assert all(shown)


def test_an_image_smaller_than_the_window_is_shown_whole():
    image, mask, aim = scene(20, 20, box=(3, 3, 4, 4))
    crop = for_sample(RandomScaleCrop((40, 50), None), 0, aim, None)
    for _ in range(20):
        assert int((crop(image, mask)[1] != 255).sum()) == 400


def test_a_region_is_found_in_a_resized_mask():
    for old, new in (((30, 40), (17, 90)), ((31, 47), (8, 8)), ((20, 20), (20, 20))):
        row = np.array([[0, 1, 0, 7, 5, 11, 13]], np.int32)
        regions = rare.Regions(row, np.ones(1), np.array([old]), SHARES)
        mask = torch.zeros(old)
        mask[7:18, 5:18] = 1
        resized = torch.nn.functional.interpolate(mask[None, None], new, mode="nearest-exact")[0, 0]
        kind, top, left, height, width = regions.box(0, new)
        box = resized[top : top + height, left : left + width]
        assert kind == 1
        assert box.sum() == resized.sum() > 0
        assert (height - 2) * (width - 2) <= resized.sum() <= height * width


def test_somebody_elses_augmentation_is_called_as_before():
    calls = []

    def own(*sample):
        calls.append(len(sample))
        return sample

    image, mask, _ = scene()
    own_crop = RandomScaleCrop((20, 24), None)
    for transform in (own, v2.Compose([own, v2.Compose([own_crop]), own])):
        samples = AugmentedSamples([(image, mask)], transform, 0, made_regions())
        samples[0, 0, 0, 6]
    assert calls == [2, 2, 2]
    assert own_crop.aim is None


# The data module


def shapes_module(**options) -> SegmentationDataModule:
    options = {"augment": augment((24, 24), paste=0.7), "sample": "rare", **options}
    return SegmentationDataModule(small_shapes, batch_size=4, repeat=2, num_workers=0, **options)


def test_workers_processes_and_caches_draw_and_paste_the_same():
    reference = epoch(shapes_module(), 1)
    assert equal(epoch(shapes_module(cache="ram", check=False), 1), reference)
    module = shapes_module()
    module.num_workers = 2
    assert equal(epoch(module, 1), reference)
    assert not equal(epoch(shapes_module(sample=None), 1), reference)
    resumed = shapes_module()
    resumed.load_state_dict({"epoch": 1, "batch": 2})
    rest = [tensor for batch in resumed.train_dataloader() for tensor in batch]
    assert equal(rest, reference[4:])
    shares = []
    for rank in range(2):
        module = shapes_module()
        module.batch_size = 2
        module.trainer = trainer_stub(num_devices=2, local_rank=rank)
        shares.append(epoch(module, 1))
        rebuilt = module.rebuild_batch("train", 1, 0, rank)[1]
        assert equal([*shares[-1][0]], [image for image, _ in rebuilt])
    for both, first, second in zip(reference, *shares, strict=True):
        assert torch.equal(torch.stack([first, second], 1).flatten(0, 1), both)


def test_regions_are_those_of_the_samples_of_a_set_that_is_made_of_another():
    """Of `EightFold` the files are an eighth of the samples."""
    made = EightFold(small_shapes("train"), 32)
    module = SegmentationDataModule(lambda split: made, sample="rare", num_workers=0)
    images = module.regions.table[:, 0]
    assert (images.min(), images.max()) == (0, 8 * 11 - 1)
    assert np.array_equal(module.regions.sizes, np.full((88, 2), 32))
    found = check(small_shapes("train")).regions
    plain = SegmentationDataModule(small_shapes, sample="rare", num_workers=0)
    assert sorted(map(tuple, plain.regions.table)) == sorted(map(tuple, found))


def test_the_table_of_exposures_fits_60_columns(capsys):
    shapes_module().tell_sampling()
    printed = capsys.readouterr().out
    assert "Of 22 draws, those with each class" in printed
    assert all(name in printed for name in small_shapes("train").labels.names)
    assert max(map(len, printed.splitlines())) <= 60
    shapes_module(sample=None, augment=None).tell_sampling()
    assert capsys.readouterr().out == ""


def test_another_way_of_sampling_is_refused():
    with pytest.raises(InputError, match=r"data\.sample is .Rare.; use one of rare"):
        shapes_module(sample="Rare")
    with pytest.raises(InputError, match=r"data\.repeat=0: expected at least 1"):
        SegmentationDataModule(small_shapes, repeat=0)
