"""Order, shards and batches."""

import pytest
import torch
from torchvision import tv_tensors

from seg_torch.data.sampling import (
    AugmentedSamples,
    EpochSampler,
    evaluation_batches,
    group_by_size,
)


@pytest.mark.promise(8)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_shards_have_equal_full_batches_and_share_no_sample(world):
    shards = [list(EpochSampler(23, 3, 0, rank, world)) for rank in range(world)]
    assert {len(batch) for shard in shards for batch in shard} == {3}
    assert {len(shard) for shard in shards} == {23 // (3 * world)}
    seen = [index for shard in shards for batch in shard for _, index in batch]
    assert len(seen) == len(set(seen))


def test_the_order_is_another_in_each_epoch_and_the_same_again_for_its_number():
    def order(seed: int, epoch: int) -> list[int]:
        batches = list(EpochSampler(12, 4, seed, epoch=epoch))
        assert {number for batch in batches for number, _ in batch} == {epoch}
        return [index for batch in batches for _, index in batch]

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
