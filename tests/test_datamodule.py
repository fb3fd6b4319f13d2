"""Order, shards and batches."""

import json

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from seg_torch.datamodule import (
    EpochSampler,
    SegmentationDataModule,
    evaluation_batches,
    group_by_size,
)
from seg_torch.datasets import shapes
from seg_torch.errors import InputError
from seg_torch.transforms import augment


def small_shapes(split: str):
    return shapes(split, size=32, train=11, val=5, test=3)


def epoch(module: SegmentationDataModule, number: int) -> list[torch.Tensor]:
    loader = module.train_dataloader()
    loader.batch_sampler.set_epoch(number)
    return [tensor for batch in loader for tensor in batch]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_samples_depend_on_seed_and_epoch_not_on_workers_or_global_state():
    def module(**arguments):
        arguments = {"num_workers": 0, "seed": 1, **arguments}
        return SegmentationDataModule(
            small_shapes, batch_size=2, augment=augment(crop=(32, 32)), **arguments
        )

    torch.manual_seed(5)
    reference = epoch(module(), 3)
    torch.manual_seed(6)
    before = torch.random.get_rng_state()
    assert equal(epoch(module(), 3), reference)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert equal(epoch(module(num_workers=2), 3), reference)
    assert equal(epoch(module(cache=True), 3), reference)
    assert not equal(epoch(module(), 4), reference)
    assert not equal(epoch(module(seed=2), 3), reference)


def test_cached_samples_take_no_workers_from_a_network_on_the_processor():
    cached = SegmentationDataModule(small_shapes, batch_size=2, cache=True)
    assert cached.train_dataloader().num_workers == 0
    assert SegmentationDataModule(small_shapes, batch_size=2).train_dataloader().num_workers > 0


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_shards_have_equal_full_batches_and_share_no_sample(world):
    shards = [list(EpochSampler(23, 3, 0, rank, world)) for rank in range(world)]
    assert {len(batch) for shard in shards for batch in shard} == {3}
    assert {len(shard) for shard in shards} == {23 // (3 * world)}
    seen = [index for shard in shards for batch in shard for _, index in batch]
    assert len(seen) == len(set(seen))


def test_a_dataset_smaller_than_a_batch_still_gives_each_process_one():
    assert [len(b) for b in EpochSampler(3, 8, 0, 0, 1)] == [3]
    assert [len(list(EpochSampler(1, 8, 0, rank, 2))) for rank in (0, 1)] == [1, 1]


@pytest.mark.parametrize(("length", "world"), [(5, 2), (1, 3), (8, 2), (7, 4)])
def test_every_image_is_evaluated_exactly_once(length, world):
    shards = [evaluation_batches(length, 2, rank, world) for rank in range(world)]
    assert all(shards), "a process without a batch would leave the others waiting"
    assert sorted(i for shard in shards for batch in shard for i in batch) == [*range(length)]


def test_evaluation_groups_by_size_and_keeps_labels_at_theirs():
    def item(size, mask_size):
        return tv_tensors.Image(torch.zeros(3, *size)), tv_tensors.Mask(torch.zeros(mask_size))

    a, b = item((8, 9), (20, 20)), item((9, 8), (20, 20))
    groups = group_by_size([a, b, a])
    assert [(i.shape, m.shape) for i, m in groups] == [
        ((2, 3, 8, 9), (2, 20, 20)),
        ((1, 3, 9, 8), (1, 20, 20)),
    ]


def test_resize_changes_images_but_never_evaluation_labels():
    module = SegmentationDataModule(small_shapes, num_workers=0, resize=(16, 24))
    images, masks = next(iter(module.train_dataloader()))
    assert images.shape[-2:] == masks.shape[-2:] == (16, 24)
    [(images, masks)] = next(iter(module.val_dataloader()))
    assert images.shape[-2:] == (16, 24)
    assert torch.equal(masks[0], small_shapes("val")[0][1])


def test_images_of_several_sizes_in_a_batch_are_refused_with_the_way_out():
    class Mixed:
        labels = small_shapes("train").labels

        def __len__(self):
            return 4

        def __getitem__(self, index):
            size = (32, 32 + index)
            return tv_tensors.Image(torch.zeros(3, *size)), tv_tensors.Mask(torch.zeros(size))

    module = SegmentationDataModule(lambda split: Mixed(), num_workers=0, batch_size=4)
    with pytest.raises(InputError, match=r"data\.augment\.crop"):
        next(iter(module.train_dataloader()))


def test_pixel_counts_equal_numpys_and_are_cached(tmp_path):
    module = SegmentationDataModule(small_shapes, num_workers=0)
    masks = np.stack(
        [np.asarray(mask) for _, mask in (small_shapes("train")[i] for i in range(11))]
    )
    expected = [int((masks == i).sum()) for i in range(len(module.labels))]
    cache = tmp_path / "pixel_counts.json"
    assert module.pixel_counts(cache).tolist() == expected
    stored = json.loads(cache.read_text())
    stored["pixels"][0] = 7
    cache.write_text(json.dumps(stored))
    assert module.pixel_counts(cache)[0] == 7
    other = SegmentationDataModule(lambda split: shapes(split, size=32, train=3), num_workers=0)
    assert other.pixel_counts(cache)[0] != 7, "counts of other data must not be taken over"


def test_workers_default_to_the_processors_there_are(monkeypatch):
    monkeypatch.setattr("seg_torch.datamodule.available_cpus", lambda: 64)
    assert SegmentationDataModule(small_shapes).train_dataloader().num_workers == 8
    monkeypatch.setattr("seg_torch.datamodule.available_cpus", lambda: 1)
    assert SegmentationDataModule(small_shapes).train_dataloader().num_workers == 1


def test_an_empty_split_is_refused():
    module = SegmentationDataModule(lambda root, split: [], root="photos")
    with pytest.raises(InputError, match="photos: no samples for split=val"):
        module.dataset("val")
