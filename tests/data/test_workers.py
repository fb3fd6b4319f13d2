"""How many processes prepare batches, and how long they are waited for."""

import time

import pytest
from batches import small_shapes
from torch.utils.data import Dataset

from seg_torch.data.module import SegmentationDataModule
from seg_torch.data.workers import TimedLoader


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
