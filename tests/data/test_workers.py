"""How many processes prepare batches."""

from batches import small_shapes

from seg_torch.data.module import SegmentationDataModule


def test_cached_samples_take_no_workers_from_a_network_on_the_cpu():
    cached = SegmentationDataModule(small_shapes, batch_size=2, cache="ram")
    assert cached.train_dataloader().num_workers == 0
    assert SegmentationDataModule(small_shapes, batch_size=2).train_dataloader().num_workers > 0


def test_workers_default_to_the_cpus_there_are(monkeypatch):
    monkeypatch.setattr("seg_torch.data.workers.available_cpus", lambda: 64)
    assert SegmentationDataModule(small_shapes).train_dataloader().num_workers == 8
    monkeypatch.setattr("seg_torch.data.workers.available_cpus", lambda: 1)
    assert SegmentationDataModule(small_shapes).train_dataloader().num_workers == 1
