"""Order, shards and batches."""

import multiprocessing
import os
import pickle
import resource
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from seg_torch.data.module import (
    EpochSampler,
    SegmentationDataModule,
    evaluation_batches,
    group_by_size,
)
from seg_torch.data.transforms import augment
from seg_torch.datasets import folder, shapes, write_folder
from seg_torch.errors import InputError
from seg_torch.files import PARTIAL
from seg_torch.images import format
from seg_torch.labels import Labels


def small_shapes(split: str):
    return shapes(split, size=32, train=11, val=5, test=3)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def epoch(module: SegmentationDataModule, number: int) -> list[torch.Tensor]:
    return [tensor for batch in loader_at(module, number) for tensor in batch]


def loader_at(module: SegmentationDataModule, epoch: int):
    loader = module.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return loader


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
    assert equal(epoch(module(cache="ram"), 3), reference)
    assert not equal(epoch(module(), 4), reference)
    assert not equal(epoch(module(seed=2), 3), reference)


def test_the_seed_of_a_run_is_that_of_its_data(compose):
    for data in ("data=shapes", "data=voc"):
        assert instantiate(compose("train", "seed=3", data).data).seed == 3


def test_validation_images_are_decoded_once_where_the_network_needs_the_cpu(monkeypatch):
    """Unless they are many, or each process has its own share."""
    read = []

    class Counted:
        labels = Labels(("a", "b"))

        def __init__(self, split):
            pass

        def __len__(self):
            return 5

        def __getitem__(self, index):
            read.append(index)
            pixels = torch.full((3, 32, 32), index, dtype=torch.uint8)
            return tv_tensors.Image(pixels), tv_tensors.Mask(pixels[0] % 2)

    def loader(memory=1 << 30, **stub):
        monkeypatch.setattr("seg_torch.data.module.total_memory", lambda device: memory)
        module = SegmentationDataModule(Counted, batch_size=2)
        module.trainer = trainer_stub(**stub)
        return module.val_dataloader()

    kept = loader()
    assert kept.num_workers == 0
    for _ in range(2):
        batches = [group for groups in kept for group in groups]
        assert [numbers for *_, numbers in batches] == [[0, 1, 2, 3], [4]]
        assert [image.amax().item() for images, *_ in batches for image in images] == [*range(5)]
        assert sorted(read) == [0, *range(5)]  # the first one also for its size
    taken = 5 * 4 * 32 * 32
    for others in ({"memory": 16 * taken}, {"num_devices": 2}, {"device": "cuda"}):
        assert loader(**others).num_workers > 0


def test_cached_samples_take_no_workers_from_a_network_on_the_cpu():
    cached = SegmentationDataModule(small_shapes, batch_size=2, cache="ram")
    assert cached.train_dataloader().num_workers == 0
    assert SegmentationDataModule(small_shapes, batch_size=2).train_dataloader().num_workers > 0


@pytest.mark.promise(8)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_shards_have_equal_full_batches_and_share_no_sample(world):
    shards = [list(EpochSampler(23, 3, 0, rank, world)) for rank in range(world)]
    assert {len(batch) for shard in shards for batch in shard} == {3}
    assert {len(shard) for shard in shards} == {23 // (3 * world)}
    seen = [index for shard in shards for batch in shard for _, index in batch]
    assert len(seen) == len(set(seen))


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


@pytest.mark.promise(13)
def test_resize_changes_images_but_never_evaluation_labels():
    module = SegmentationDataModule(small_shapes, num_workers=0, resize=(16, 24))
    images, masks = next(iter(module.train_dataloader()))
    assert images.shape[-2:] == masks.shape[-2:] == (16, 24)
    [(images, masks, _)] = next(iter(module.val_dataloader()))
    assert images.shape[-2:] == (16, 24)
    assert torch.equal(masks[0], small_shapes("val")[0][1])


def test_images_of_several_sizes_in_a_batch_are_refused_with_the_way_out():
    class Mixed:
        labels = small_shapes("train").labels

        def __len__(self):
            return 4

        def __getitem__(self, index):
            size = (32, 32 + index)
            zeros = torch.zeros(3, *size, dtype=torch.uint8)
            return tv_tensors.Image(zeros), tv_tensors.Mask(zeros[0])

    module = SegmentationDataModule(lambda split: Mixed(), num_workers=0, batch_size=4)
    with pytest.raises(InputError, match=r"data\.augment\.crop"):
        next(iter(module.train_dataloader()))


@pytest.mark.promise(18)
def test_pixel_counts_equal_numpys():
    module = SegmentationDataModule(small_shapes, num_workers=0)
    masks = np.stack([np.asarray(small_shapes("train")[i][1]) for i in range(11)])
    assert module.pixel_counts().tolist() == [int((masks == i).sum()) for i in range(6)]


def test_workers_default_to_the_cpus_there_are(monkeypatch):
    monkeypatch.setattr("seg_torch.data.module.available_cpus", lambda: 64)
    assert SegmentationDataModule(small_shapes).train_dataloader().num_workers == 8
    monkeypatch.setattr("seg_torch.data.module.available_cpus", lambda: 1)
    assert SegmentationDataModule(small_shapes).train_dataloader().num_workers == 1


def test_an_empty_split_is_refused():
    module = SegmentationDataModule(lambda root, split: [], root="photos")
    with pytest.raises(InputError, match="photos: no samples for split=val"):
        module.dataset("val")


@pytest.mark.promise(1)
def test_d11_a_bad_label_is_refused_by_the_worker_that_reads_it():
    class Bad:
        labels = small_shapes("train").labels

        def __len__(self):
            return 2

        def __getitem__(self, index):
            mask = torch.full((32, 32), 5 + index, dtype=torch.uint8)
            return tv_tensors.Image(torch.zeros(3, 32, 32, dtype=torch.uint8)), tv_tensors.Mask(
                mask
            )

    module = SegmentationDataModule(lambda split: Bad(), num_workers=1, batch_size=2)
    for loader in (module.train_dataloader(), module.val_dataloader()):
        with pytest.raises(InputError, match=r"Bad\[1\]: mask values \[6\]; allowed are 0 to 5"):
            list(loader)


def test_d23_evaluation_has_a_batch_size_of_its_own():
    def first_batch(**arguments):
        module = SegmentationDataModule(small_shapes, batch_size=8, num_workers=0, **arguments)
        module.trainer = trainer_stub()
        return next(iter(module.val_dataloader().batch_sampler))

    assert len(first_batch()) == 4
    assert len(first_batch(eval_batch_size=3)) == 3
    with pytest.raises(InputError, match=r"data\.eval_batch_size=-1"):
        first_batch(eval_batch_size=-1)


def trainer_stub(device="cpu", num_devices=1, local_rank=0, barrier=lambda: None):
    return SimpleNamespace(
        num_devices=num_devices,
        node_rank=0,
        local_rank=local_rank,
        global_rank=local_rank,
        world_size=num_devices,
        strategy=SimpleNamespace(
            root_device=torch.device(device), barrier=barrier, broadcast=lambda name: "a-name"
        ),
    )


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_a_batch_is_rebuilt_as_its_process_was_given_it(cache):
    module = SegmentationDataModule(
        small_shapes,
        batch_size=2,
        eval_batch_size=2,
        augment=augment(crop=(24, 24)),
        cache=cache,
        num_workers=0,
        resize=(40, 40),
    )
    rank = 1
    module.trainer = trainer_stub(num_devices=2, local_rank=rank)
    module.trainer.num_devices = 1  # of each of two machines
    train = [[*batch] for batch in loader_at(module, epoch=3)]
    val = [[*group[:2]] for groups in module.val_dataloader() for group in groups]
    for split, batches in (("train", train), ("val", val)):
        for index, (images, masks) in enumerate(batches):
            _, samples = module.rebuild_batch(split, 3, index, rank)
            assert torch.equal(torch.stack([image for image, _ in samples]), images)
            assert torch.equal(torch.stack([mask for _, mask in samples]), masks)


# Cached samples


def test_d24_cached_samples_reach_a_spawned_worker_through_few_files():
    module = SegmentationDataModule(
        lambda split: shapes(split, size=32, train=700), batch_size=100, cache="ram", num_workers=1
    )
    loader = module.train_dataloader()
    loader.multiprocessing_context = "spawn"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        batches = list(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(batches) == 7
    order = [index for batch in loader.batch_sampler for _, index in batch]
    expected = shapes("train", size=32, train=700)[order[-1]]
    assert equal([batches[-1][0][-1], batches[-1][1][-1]], list(expected))


def test_d24_the_processes_of_a_machine_share_one_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "seg_torch-a-name-0"

    def module(local_rank, barrier):
        module = SegmentationDataModule(small_shapes, cache="ram", num_workers=0)
        module.trainer = trainer_stub(num_devices=2, local_rank=local_rank, barrier=barrier)
        return module

    others = []

    def other_process():
        if not others:  # at the first barrier, the file is complete
            others.append(None)
            with monkeypatch.context() as patch:
                patch.setattr("seg_torch.data.module.write_samples", None)  # it reads no image
                others[0] = module(1, lambda: None)._samples("val", resize_labels=False)

    samples = module(0, other_process)._samples("val", resize_labels=False)
    assert not path.exists()
    monkeypatch.undo()
    spawned = DataLoader(others[0], None, num_workers=1, multiprocessing_context="spawn")
    assert len(pickle.dumps(others[0])) < 2000  # no copy of the samples
    for index, by_worker in enumerate(spawned):
        for sample in (samples[index], others[0][index], by_worker):
            assert equal(list(sample), list(small_shapes("val")[index]))


# Resuming


class Numbered:
    """Images that say their own index."""

    labels = small_shapes("train").labels

    def __init__(self, split):
        self.length = 14 if split == "train" else 3

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image = torch.full((3, 4, 4), index, dtype=torch.uint8)
        return tv_tensors.Image(image), tv_tensors.Mask(torch.zeros(4, 4, dtype=torch.uint8))


class Recorder(lightning.LightningModule):
    """Records the images of each step, and saves a checkpoint at each of the hooks."""

    def __init__(self, folder: Path | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder = folder
        self.seen: list[tuple[int, list[int]]] = []

    def save(self, name):
        if self.folder is not None:
            self.trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, batch[0][:, 0, 0, 0].tolist()))
        if len(self.seen) == 11:
            self.save("during-step-11")
        return self.weight * 1.0

    def validation_step(self, batch, index):
        self.save(f"during-validation-{len(self.seen)}-{index}")

    def on_train_batch_end(self, *args):
        self.save(f"after-step-{len(self.seen)}")

    def on_validation_end(self):
        self.save(f"after-validation-{len(self.seen)}")

    def on_train_epoch_end(self):
        self.save(f"after-epoch-{len(self.seen)}")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path | None = None, resume: Path | None = None) -> list[tuple[int, list[int]]]:
    """Trains three epochs of seven batches with two workers; what was seen."""
    recorder = Recorder(folder)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    data = SegmentationDataModule(Numbered, batch_size=2, eval_batch_size=1, num_workers=2, seed=3)
    trainer.fit(recorder, datamodule=data, ckpt_path=resume, weights_only=True)
    return recorder.seen


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, fit(folder)


# name of the checkpoint: steps whose result it contains
CHECKPOINTS = {
    "after-step-3": 3,
    "after-validation-7": 7,
    "after-epoch-7": 7,
    "after-step-9": 9,
    "during-step-11": 10,
    "during-validation-14-1": 14,
    "after-epoch-14": 14,
}


@pytest.mark.promise(22)
@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.filterwarnings("error:You're resuming from a checkpoint that ended before")
def test_d02_a_resumed_run_sees_what_an_undisturbed_one_would_have_seen(undisturbed, name):
    folder, seen = undisturbed
    assert [epoch for epoch, _ in seen] == [0] * 7 + [1] * 7 + [2] * 7
    for epoch in (seen[:7], seen[7:14], seen[14:]):
        assert sorted(index for _, batch in epoch for index in batch) == [*range(14)]
    assert fit(resume=folder / f"{name}.ckpt") == seen[CHECKPOINTS[name] :]


def test_d02_a_sampler_leaves_out_the_start_of_its_first_epoch_only():
    full = EpochSampler(14, 2, 0, epoch=4)
    resumed = EpochSampler(14, 2, 0, epoch=4, start=3)
    for epoch_number, start in ((4, 3), (4, 3), (5, 0), (4, 0)):
        full.set_epoch(epoch_number)
        resumed.set_epoch(epoch_number)
        assert list(resumed) == list(full)[start:]
        assert len(resumed) == len(full) == 7


@pytest.fixture
def own_folder(tmp_path) -> Path:
    """A folder of images and masks, beside the cache."""
    samples = shapes("train", size=32, train=6)
    write_folder(samples, samples.labels, tmp_path / "data")
    return tmp_path / "data"


def test_samples_on_disk_are_decoded_once_and_anew_when_a_file_changes(own_folder, monkeypatch):
    def epoch_of(read: bool) -> list:
        module = SegmentationDataModule(folder, str(own_folder), batch_size=2, cache="disk")
        with monkeypatch.context() as patch:
            if not read:
                patch.setattr("seg_torch.images.format.read_image", None)
            return epoch(module, 0)

    plain = SegmentationDataModule(folder, str(own_folder), batch_size=2, num_workers=0)
    first = epoch_of(read=True)
    assert equal(first, epoch(plain, 0))
    assert equal(epoch_of(read=False), first)

    image = sorted((own_folder / "images").iterdir())[0]
    Image.fromarray(255 - np.array(Image.open(image))).save(image)
    anew = epoch_of(read=True)
    assert not equal(anew, first)
    assert equal(anew, epoch(plain, 0))


def test_samples_on_disk_reach_a_spawned_worker_as_the_name_of_their_folder(own_folder):
    module = SegmentationDataModule(
        folder, str(own_folder), batch_size=2, cache="disk", num_workers=1
    )
    loader = module.train_dataloader()
    assert len(pickle.dumps(loader.dataset)) < 2000
    loader.multiprocessing_context = "spawn"
    plain = SegmentationDataModule(folder, str(own_folder), batch_size=2, num_workers=0)
    assert equal([part for batch in loader for part in batch], epoch(plain, 0))


def test_a_write_that_breaks_off_leaves_no_samples_on_disk(own_folder, monkeypatch):
    module = SegmentationDataModule(folder, str(own_folder), cache="disk")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            module.train_dataloader()
    assert not list((own_folder.parent / "cache/seg_torch/samples").rglob("*.bin"))
    assert len(list(module.train_dataloader())) == 1


def killed_while_decoding(root: str) -> None:
    module = SegmentationDataModule(folder, root, cache="disk", num_workers=0)
    dataset = module.dataset("train")
    read = dataset.read_mask

    def read_or_die(path):
        if path == dataset.pairs[4].mask:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path)

    # Not a new function for the dataset, by whose source the samples would get another name.
    dataset.mask = lambda index: read_or_die(dataset.pairs[index].mask)
    module.train_dataloader()


def test_what_a_killed_run_had_decoded_is_neither_used_nor_kept(own_folder):
    process = multiprocessing.get_context("fork").Process(
        target=killed_while_decoding, args=(str(own_folder),)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    cached = own_folder.parent / "cache/seg_torch/samples"
    [partial] = cached.rglob(f"{PARTIAL}*")
    module = SegmentationDataModule(folder, str(own_folder), batch_size=2, cache="disk")
    plain = SegmentationDataModule(folder, str(own_folder), batch_size=2, num_workers=0)
    assert equal(epoch(module, 0), epoch(plain, 0))
    assert not partial.exists()
    assert [path.parent for path in cached.rglob("*.bin")] == [partial.parent]


def test_of_runs_that_start_at_once_one_decodes_and_the_others_wait(own_folder, monkeypatch):
    files = []
    read = format.read_image
    monkeypatch.setattr(format, "read_image", lambda path: (files.append(path), read(path))[1])
    modules = [
        SegmentationDataModule(folder, str(own_folder), batch_size=2, cache="disk")
        for _ in range(3)
    ]
    with ThreadPoolExecutor() as pool:
        epochs = list(pool.map(lambda module: epoch(module, 0), modules))
    assert len(files) == len(set(files)) == len(modules[0].dataset("train"))
    assert equal(epochs[0], epochs[1])
    assert equal(epochs[0], epochs[2])


def test_each_size_has_samples_of_its_own_on_disk(own_folder):
    for resize in ((16, 24), (24, 16)):
        module = SegmentationDataModule(folder, str(own_folder), cache="disk", resize=resize)
        images, masks = next(iter(module.train_dataloader()))
        assert images.shape[-2:] == masks.shape[-2:] == resize
        [(images, masks, _)] = next(iter(module.val_dataloader()))
        assert images.shape[-2:] == resize
        assert masks.shape[-2:] == (32, 32)


def test_generated_samples_are_not_kept_on_disk():
    module = SegmentationDataModule(small_shapes, cache="disk")
    with pytest.raises(InputError, match=r"data\.cache=disk: this dataset is not read from files"):
        module.train_dataloader()
    with pytest.raises(InputError, match=r"data\.cache is 'memory'; use one of none, ram, disk"):
        SegmentationDataModule(small_shapes, cache="memory")
