"""Decoded samples that are kept."""

import multiprocessing
import os
import pickle
import resource
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import epoch, equal, small_shapes, trainer_stub
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from seg_torch.data import transforms
from seg_torch.data.module import SegmentationDataModule
from seg_torch.data.sampling import AugmentedSamples
from seg_torch.datasets import folder, shapes, write_folder
from seg_torch.errors import InputError
from seg_torch.files import PARTIAL
from seg_torch.images import format
from seg_torch.labels import Labels

pytestmark = pytest.mark.usefixtures("new_cache_folder")


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

    def loader(memory=1 << 30, cache=None, **stub):
        monkeypatch.setattr("seg_torch.data.cache.total_memory", lambda device: memory)
        module = SegmentationDataModule(Counted, batch_size=2, cache=cache)
        module.trainer = trainer_stub(**stub)
        return module.val_dataloader()

    kept = loader()
    assert kept.num_workers == 0
    for _ in range(2):
        batches = [group for groups in kept for group in groups]
        assert [numbers for *_, numbers in batches] == [[0, 1, 2, 3], [4]]
        assert [image.amax().item() for images, *_ in batches for image in images] == [*range(5)]
        assert sorted(read) == sorted([*range(5), *range(5)])  # once for its size: it has no header
    taken = 5 * 4 * 32 * 32
    for others in ({"memory": 16 * taken}, {"num_devices": 2}, {"device": "cuda"}):
        assert loader(**others).num_workers > 0
    for none in ("none", False):  # really none
        assert loader(cache=none).num_workers > 0


def test_e27_none_keeps_nothing(tmp_path, monkeypatch):
    """As it is written on the command line and in YAML."""
    samples = shapes("train", size=32, train=6)
    write_folder(samples, samples.labels, tmp_path)
    read, decode = [], format.read_image
    monkeypatch.setattr(
        format, "read_image", lambda path, **_: (read.append(path), decode(path))[1]
    )
    for none in ("none", False):
        module = SegmentationDataModule(folder, str(tmp_path), cache=none, num_workers=0)
        module.trainer = trainer_stub()
        loader = module.val_dataloader()
        read.clear()
        for number in (1, 2, 3):
            assert len([*loader]) == 1
            assert len(read) == number * len(module.dataset("val")) > 0


@pytest.mark.parametrize("large_first", [True, False])
def test_e31_images_are_kept_by_what_all_of_them_take(tmp_path, monkeypatch, large_first):
    """Whatever the first one is: a thumbnail, or the only large one."""
    sides = [200, 8, 8, 8] if large_first else [8, 8, 8, 200]
    for i, side in enumerate(sides):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.new(mode, (side, side)).save(tmp_path / kind / f"{i}.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("0\n1\n2\n3\n")
    total = 4 * (200 * 200 + 3 * 8 * 8)
    read = []
    for memory, kept in ((16 * total + 16, True), (16 * total, False)):
        with monkeypatch.context() as patch:
            patch.setattr("seg_torch.data.cache.total_memory", lambda device, m=memory: m)
            module = SegmentationDataModule(folder, str(tmp_path), check=False)
            module.trainer = trainer_stub()
            if not kept:
                patch.setattr(format, "read_image", lambda path, **_: read.append(path))
            assert (module.val_dataloader().num_workers == 0) == kept
    assert not read  # the headers have the sizes


@pytest.mark.parametrize("cache", ["ram", "disk"])
@pytest.mark.parametrize("kind", ["image", "mask"])
def test_e10_what_works_in_place_does_not_change_what_is_kept(own_folder, cache, kind):
    def darken(image, mask):
        (image if kind == "image" else mask).div_(2, rounding_mode="floor")
        return image, mask

    kept, plain = (
        SegmentationDataModule(
            folder, str(own_folder), batch_size=2, cache=c, num_workers=0, augment=darken
        )
        for c in (cache, "none")
    )
    kept, plain = kept.train_dataloader(), plain.train_dataloader()
    for _ in range(3):
        batches, expected = ([part for batch in b for part in batch] for b in (kept, plain))
        assert equal(batches, expected)


def test_e10_our_own_augmentation_is_given_no_copies(own_folder):
    """It changes nothing in place, and the copy of a large image takes longer than its crop."""
    for augment, copied in (
        (transforms.augment([16, 16]), False),
        (transforms.augment(None, None), False),
        (v2.Compose([transforms.augment(), v2.RandomErasing(inplace=True)]), True),
    ):
        given = []
        samples = AugmentedSamples(
            SegmentationDataModule(folder, str(own_folder), cache="ram")._samples("train", True),
            augment,
            0,
        )
        before = samples.samples.content.clone()
        samples.augment = lambda *parts, given=given: given.append(parts[0].data_ptr())
        samples[0, 0]
        inside = (
            samples.samples.content.data_ptr()
            <= given[0]
            < (samples.samples.content.data_ptr() + samples.samples.content.nbytes)
        )
        assert inside != copied
        samples.augment = augment
        if not copied:
            for epoch in range(20):
                samples[epoch, 0]
            assert torch.equal(samples.samples.content, before)


def test_d24_cached_samples_reach_a_spawned_worker_through_few_files(anew):
    module = SegmentationDataModule(
        lambda split: shapes(split, size=32, train=700), batch_size=100, cache="ram", num_workers=1
    )
    loader = module.train_dataloader()
    loader.multiprocessing_context = anew
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        batches = list(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(batches) == 7
    order = [draw.image for batch in loader.batch_sampler for draw in batch]
    expected = shapes("train", size=32, train=700)[order[-1]]
    assert equal([batches[-1][0][-1], batches[-1][1][-1]], list(expected))


def test_d24_the_processes_of_a_machine_share_one_copy(anew, tmp_path, monkeypatch):
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
                patch.setattr("seg_torch.data.cache.write_samples", None)  # it reads no image
                others[0] = module(1, lambda: None)._samples("val", resize_labels=False)

    samples = module(0, other_process)._samples("val", resize_labels=False)
    assert not path.exists()
    monkeypatch.undo()
    spawned = DataLoader(others[0], None, num_workers=1, multiprocessing_context=anew)
    assert len(pickle.dumps(others[0])) < 2000  # no copy of the samples
    for index, by_worker in enumerate(spawned):
        for sample in (samples[index], others[0][index], by_worker):
            assert equal(list(sample), list(small_shapes("val")[index]))


# On disk


@pytest.fixture
def own_folder(tmp_path) -> Path:
    """A folder of images and masks."""
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


def test_samples_on_disk_reach_a_spawned_worker_as_the_name_of_their_folder(anew, own_folder):
    module = SegmentationDataModule(
        folder, str(own_folder), batch_size=2, cache="disk", num_workers=1
    )
    loader = module.train_dataloader()
    assert len(pickle.dumps(loader.dataset)) < 2000
    loader.multiprocessing_context = anew
    plain = SegmentationDataModule(folder, str(own_folder), batch_size=2, num_workers=0)
    assert equal([part for batch in loader for part in batch], epoch(plain, 0))


def test_a_write_that_breaks_off_leaves_no_samples_on_disk(
    own_folder, new_cache_folder, monkeypatch
):
    module = SegmentationDataModule(folder, str(own_folder), cache="disk")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            module.train_dataloader()
    assert not list((new_cache_folder / "seg_torch/samples").rglob("*.bin"))
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


def test_what_a_killed_run_had_decoded_is_neither_used_nor_kept(own_folder, new_cache_folder):
    process = multiprocessing.get_context("fork").Process(
        target=killed_while_decoding, args=(str(own_folder),)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    cached = new_cache_folder / "seg_torch/samples"
    [partial] = cached.rglob(f"{PARTIAL}*")
    module = SegmentationDataModule(folder, str(own_folder), batch_size=2, cache="disk")
    plain = SegmentationDataModule(folder, str(own_folder), batch_size=2, num_workers=0)
    assert equal(epoch(module, 0), epoch(plain, 0))
    assert not partial.exists()
    assert [path.parent for path in cached.rglob("*.bin")] == [partial.parent]


def test_of_runs_that_start_at_once_one_decodes_and_the_others_wait(own_folder, monkeypatch):
    files = []
    read = format.read_image
    monkeypatch.setattr(format, "read_image", lambda path, **_: (files.append(path), read(path))[1])
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
