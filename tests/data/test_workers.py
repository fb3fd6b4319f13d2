"""How many processes prepare batches, and how long they are waited for."""

import time

import pytest
from batches import small_shapes
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from seg_torch.data.module import SegmentationDataModule
from seg_torch.data.workers import TimedLoader
from seg_torch.datasets import folder


def test_cached_samples_take_no_workers_from_a_network_on_the_cpu():
    cached = SegmentationDataModule(small_shapes, batch_size=2, cache="ram")
    assert cached.train_dataloader().num_workers == 0
    assert SegmentationDataModule(small_shapes, batch_size=2).train_dataloader().num_workers > 0


def test_workers_default_to_the_cpus_there_are(monkeypatch):
    monkeypatch.setattr("seg_torch.data.workers.available_cpus", lambda: 64)
    assert SegmentationDataModule(small_shapes).train_dataloader().num_workers == 8
    monkeypatch.setattr("seg_torch.data.workers.available_cpus", lambda: 1)
    assert SegmentationDataModule(small_shapes).train_dataloader().num_workers == 1


class Slow(Dataset):
    """Takes a while for each sample."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        time.sleep(0.02)
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_e68_a_loader_knows_how_long_its_batches_were_waited_for(workers):
    """Not what is done with them: sample sheets and checkpoints take their time, too."""
    options = {"persistent_workers": workers > 0, "batch_size": 1}
    loader = TimedLoader(Slow(), num_workers=workers, **options)
    for _ in range(2):
        loader.waited = 0.0
        begun, numbers, slept = time.perf_counter(), [], 0.0
        for number in loader:
            numbers.append(int(number))
            before = time.perf_counter()
            time.sleep(0.03)
            slept += time.perf_counter() - before
        assert numbers == list(range(6))
        assert loader.waited == pytest.approx(time.perf_counter() - begun - slept, abs=0.01)
        if workers == 0:
            assert loader.waited > 0.1
    next(iter(loader))  # left early, as with limit_train_batches
    assert [int(number) for number in loader] == list(range(6))


@pytest.mark.parametrize(
    ("batches", "expected"), [(100, (8, 2)), (16, (8, 2)), (15, (8, 1)), (3, (3, 1)), (0.5, (1, 1))]
)
def test_e63_what_workers_prepare_ahead_is_bounded_by_its_bytes(
    tmp_path, monkeypatch, batches, expected
):
    """Of the largest image, which is not the first one; an eighth of the memory is for them."""
    for i, side in enumerate([8, 100, 30, 8]):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.new(mode, (side, side)).save(tmp_path / kind / f"{i}.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("0\n1\n2\n3\n")
    monkeypatch.setattr("seg_torch.data.workers.available_cpus", lambda: 64)
    largest = 4 * 100 * 100
    for kind in ("val", "train"):
        count = 2 if kind == "val" else 1
        memory = int(8 * batches * count * largest)
        monkeypatch.setattr("seg_torch.data.workers.total_memory", lambda device, m=memory: m)
        module = SegmentationDataModule(folder, str(tmp_path), batch_size=1, eval_batch_size=2)
        loader = getattr(module, f"{kind}_dataloader")()
        assert (loader.num_workers, loader.prefetch_factor) == expected
        module = SegmentationDataModule(folder, str(tmp_path), num_workers=5, batch_size=1)
        assert getattr(module, f"{kind}_dataloader")().num_workers == 5


def test_e63_crops_take_what_they_are_and_not_what_they_are_cut_from(monkeypatch):
    monkeypatch.setattr("seg_torch.data.workers.available_cpus", lambda: 64)
    monkeypatch.setattr("seg_torch.data.workers.total_memory", lambda _: 8 * 16 * 4 * 4 * 16 * 16)
    for augment, expected in ((v2.RandomCrop(16), (8, 2)), (None, (4, 1))):
        module = SegmentationDataModule(small_shapes, batch_size=4, augment=augment)
        loader = module.train_dataloader()
        assert (loader.num_workers, loader.prefetch_factor) == expected
