"""Order, shards and batches."""

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from seg_torch.data.sampling import (
    AugmentedSamples,
    Draw,
    EpochSampler,
    evaluation_batches,
    group_by_size,
)
from seg_torch.data.transforms import augment


@pytest.mark.promise(8)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_shards_have_equal_full_batches_and_share_no_sample(world):
    shards = [list(EpochSampler(23, 3, 0, rank, world)) for rank in range(world)]
    assert {len(batch) for shard in shards for batch in shard} == {3}
    assert {len(shard) for shard in shards} == {23 // (3 * world)}
    seen = [draw.image for shard in shards for batch in shard for draw in batch]
    assert len(seen) == len(set(seen))


def test_the_order_is_another_in_each_epoch_and_the_same_again_for_its_number():
    def order(seed: int, epoch: int) -> list[int]:
        batches = list(EpochSampler(12, 4, seed, epoch=epoch))
        assert {draw.epoch for batch in batches for draw in batch} == {epoch}
        return [draw.image for batch in batches for draw in batch]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in range(3)]
    assert all(sorted(each) == [*range(12)] for each in orders)
    assert len({*map(tuple, orders)}) == 6
    assert order(1, 2) == orders[5]


def test_a_sample_is_augmented_by_seed_epoch_and_index_alone():
    samples = [(torch.zeros(1), torch.zeros(1))] * 3
    keys = [(epoch, index) for epoch in range(3) for index in range(3)]

    def drawn(seed: int) -> list[float]:
        augmented = AugmentedSamples(samples, lambda *_: torch.rand(()).item(), seed)
        return [augmented[key] for key in keys]

    assert len({*drawn(0), *drawn(1)}) == 2 * len(keys)
    torch.rand(5)
    assert drawn(0) == drawn(0)


@pytest.mark.promise(27)
def test_a_dataset_smaller_than_a_batch_still_gives_each_process_one():
    assert [len(b) for b in EpochSampler(3, 8, 0, 0, 1)] == [3]
    assert [len(list(EpochSampler(1, 8, 0, rank, 2))) for rank in (0, 1)] == [1, 1]


@pytest.mark.promise(5, 27)
@pytest.mark.parametrize(("length", "world"), [(5, 2), (1, 3), (8, 2), (7, 4)])
def test_every_image_is_evaluated_exactly_once(length, world):
    shards = [evaluation_batches(length, 2, rank, world) for rank in range(world)]
    assert all(shards), "a process without a batch would leave the others waiting"
    assert sorted(i for shard in shards for batch in shard for i in batch) == [*range(length)]


def test_evaluation_groups_by_size_keeps_labels_at_theirs_and_tells_which_is_which():
    def item(size, number):
        mask = tv_tensors.Mask(torch.full((20, 20), number))
        return tv_tensors.Image(torch.zeros(3, *size)), mask, number

    groups = group_by_size([item((8, 9), 4), item((9, 8), 5), item((8, 9), 6)])
    assert [(i.shape, m.shape, numbers) for i, m, numbers in groups] == [
        ((2, 3, 8, 9), (2, 20, 20), [4, 6]),
        ((1, 3, 9, 8), (1, 20, 20), [5]),
    ]
    for _, masks, numbers in groups:
        assert masks[:, 0, 0].tolist() == numbers


def test_d02_a_sampler_leaves_out_the_start_of_its_first_epoch_only():
    full = EpochSampler(14, 2, 0, epoch=4)
    resumed = EpochSampler(14, 2, 0, epoch=4, start=3)
    for epoch_number, start in ((4, 3), (4, 3), (5, 0), (4, 0)):
        full.set_epoch(epoch_number)
        resumed.set_epoch(epoch_number)
        assert list(resumed) == list(full)[start:]
        assert len(resumed) == len(full) == 7


# An epoch that takes each image several times


@pytest.mark.parametrize(
    ("scale", "jitter", "expected"),
    [
        ((0.5, 2.0), None, "2885746dcabda83f7c930dabbe4921acc9cd80e1502b3d7500532bbbb816668f"),
        (None, 0.25, "b4b8aad7ef3fecda359200093b240d4399a3f49c1067d55f7db6373606fdeb28"),
    ],
)
def test_order_and_augmentation_are_those_of_a_run_from_before_there_was_repeat(
    scale, jitter, expected
):
    """The digests are of commit f91558a; images that are not scaled, since that may round."""
    samples = [_numbered_pixels(index) for index in range(7)]
    augmented = AugmentedSamples(samples, augment((24, 30), scale, jitter=jitter), 3)
    digest = hashlib.sha256()
    for rank, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for batch in EpochSampler(7, 2, 3, rank, 2, epoch=epoch):
            for draw in batch:
                image, mask = augmented[draw]
                digest.update(repr((draw.epoch, draw.image)).encode())
                digest.update(b"" if scale else image.numpy().tobytes())
                digest.update(mask.numpy().tobytes())
    assert digest.hexdigest() == expected


def _numbered_pixels(index: int):
    pixels = np.arange(3 * 40 * 50).reshape(3, 40, 50) * 7919 * (index + 1) % 251
    image, mask = pixels.astype(np.uint8), (pixels[0] % 6).astype(np.uint8)
    return tv_tensors.Image(torch.from_numpy(image)), tv_tensors.Mask(torch.from_numpy(mask))


def test_an_epoch_takes_each_image_so_many_times_each_in_another_order():
    batches = list(EpochSampler(12, 4, 0, epoch=2, repeat=3))
    draws = [draw for batch in batches for draw in batch]
    assert len(batches) == len(EpochSampler(12, 4, 0, repeat=3)) == 9
    assert {*draws} == {Draw(2, index, copy) for index in range(12) for copy in range(3)}
    orders = [[draw.image for draw in draws if draw.copy == copy] for copy in range(3)]
    assert len({*map(tuple, orders)}) == 3
    assert draws[:12] == [draw for batch in EpochSampler(12, 4, 0, epoch=2) for draw in batch]


@pytest.mark.parametrize(("length", "world"), [(23, 2), (3, 1), (1, 4)])
def test_repeated_images_are_shared_out_and_left_out_like_others(length, world):
    shards = [list(EpochSampler(length, 8, 0, rank, world, repeat=5)) for rank in range(world)]
    assert {len(shard) for shard in shards} == {max(1, length * 5 // (8 * world))}
    size = min(8, -(-length * 5 // world))
    assert {len(batch) for shard in shards for batch in shard} == {size}
    draws = Counter(draw for shard in shards for batch in shard for draw in batch)
    least = draws.total() // (length * 5)  # more than 1 where all there is is less than a step
    assert {*draws.values()} <= {least, least + 1} - {0}
    resumed = EpochSampler(length, 8, 0, 0, world, start=1, repeat=5)
    assert list(resumed) == shards[0][1:]


def test_each_time_that_an_epoch_takes_an_image_it_is_augmented_in_another_way():
    samples = [(torch.zeros(1), torch.zeros(1))] * 3
    augmented = AugmentedSamples(samples, lambda *_: torch.rand(()).item(), 0)
    draws = [draw for batch in EpochSampler(3, 3, 0, repeat=4) for draw in batch]
    assert len({augmented[draw] for draw in draws}) == len(draws) == 12
    assert augmented[0, 1] == augmented[Draw(0, 1, 0)] != augmented[Draw(0, 1, 1)]
