"""What the data module gives to training and evaluation, and where it goes on."""

from functools import partial
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from batches import epoch, equal, loader_at, small_shapes, trainer_stub
from hydra.utils import instantiate
from PIL import Image
from torchvision import tv_tensors

from seg_torch.data.module import SegmentationDataModule
from seg_torch.data.transforms import augment
from seg_torch.datasets import folder, write_folder
from seg_torch.errors import InputError


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


@pytest.mark.promise(13)
def test_resize_changes_images_but_never_evaluation_labels():
    module = SegmentationDataModule(small_shapes, num_workers=0, resize=(16, 24))
    images, masks = next(iter(module.train_dataloader()))
    assert images.shape[-2:] == masks.shape[-2:] == (16, 24)
    [(images, masks, _)] = next(iter(module.val_dataloader()))
    assert images.shape[-2:] == (16, 24)
    assert torch.equal(masks[0], small_shapes("val")[0][1])


def under_centre(mask, height, width):
    """Each pixel of the smaller mask is the one under its centre."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip((height, width), mask.shape, strict=True)
    )
    return mask[rows][:, columns]


# Size of a photograph -> at which it is seen with max_side=50.
REDUCED = {(100, 80): (50, 40), (80, 100): (40, 50), (40, 50): (40, 50), (45, 33): (45, 33)}


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    samples = [
        (torch.from_numpy(rng.integers(0, 256, (3, *size), np.uint8)), torch.full(size, index))
        for index, size in enumerate(REDUCED)
    ]
    for _, mask in samples:
        mask[: len(mask) // 3] = 4
    samples = [(image, mask.to(torch.uint8)) for image, mask in samples]
    write_folder(samples, small_shapes("train").labels, tmp_path)
    names = "\n".join(f"{index:04d}" for index in range(len(samples)))
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.txt").write_text(names)
    return tmp_path, [mask.numpy() for _, mask in samples]


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_photographs_of_both_shapes_are_reduced_and_keep_their_shape(photographs, cache):
    root, masks = photographs
    options = {"batch_size": 1, "num_workers": 0, "max_side": 50, "cache": cache}
    module = SegmentationDataModule(folder, str(root), **options)
    found = {}
    for images, seen in module.train_dataloader():
        number = min(seen.unique().tolist())
        found[masks[number].shape] = tuple(images.shape[-2:])
        expected = under_centre(masks[number], *REDUCED[masks[number].shape])
        assert np.array_equal(seen[0].numpy(), expected)
    assert found == REDUCED
    (groups,) = module.val_dataloader()
    assert len(groups) == 4, "two images of one size have labels of two"
    for images, labels, (number,) in groups:
        assert tuple(images.shape[-2:]) == REDUCED[masks[number].shape]
        assert np.array_equal(labels[0].numpy(), masks[number]), "labels keep their size"
    for split, training in (("train", True), ("val", False)):
        samples = module._samples(split, training)
        sizes = [sum(part.nbytes for part in samples[index]) for index in range(4)]
        assert [samples.nbytes(index) for index in range(4)] == sizes


def test_reduced_photographs_are_padded_to_the_crop_and_make_a_batch(photographs):
    root, _ = photographs
    crop = augment((60, 60), None, 0, None)
    module = SegmentationDataModule(folder, str(root), 4, num_workers=0, max_side=50, augment=crop)
    ((images, labels),) = module.train_dataloader()
    assert images.shape == (4, 3, 60, 60)
    assert labels.shape == (4, 60, 60)
    padded = sorted((labels == 255).sum((1, 2)).tolist())
    assert padded == sorted(3600 - height * width for height, width in REDUCED.values())


def test_max_side_together_with_resize_is_refused():
    with pytest.raises(InputError, match=r"max_side=64 together with data\.resize=\[32, 32\]"):
        SegmentationDataModule(small_shapes, resize=(32, 32), max_side=64)


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
        repeat=2,
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
def test_d02_a_resumed_run_sees_what_an_undisturbed_one_would_have_seen(undisturbed, name):
    folder, seen = undisturbed
    assert [epoch for epoch, _ in seen] == [0] * 7 + [1] * 7 + [2] * 7
    for steps in (seen[:7], seen[7:14], seen[14:]):
        assert sorted(index for _, batch in steps for index in batch) == [*range(14)]
    assert fit(resume=folder / f"{name}.ckpt") == seen[CHECKPOINTS[name] :]


@pytest.mark.parametrize("split", ["train", "val"])
def test_e38_a_split_without_labels_is_told_before_training(tmp_path, split, new_cache_folder):
    samples = [[*small_shapes("train")[i]] for i in range(4)]
    write_folder(samples, small_shapes("train").labels, tmp_path)
    names = {"train": ("0000", "0001"), "val": ("0002", "0003")}
    for part, listed in names.items():
        (tmp_path / f"{part}.txt").write_text("\n".join(listed))
    for name in names[split]:
        Image.new("L", (32, 32), 255).save(tmp_path / f"masks/{name}.png")
    module = SegmentationDataModule(partial(folder, root=tmp_path), num_workers=0)
    message = (
        f"no pixel of the 2 images of {split} is labelled: all masks, such as .*{names[split][0]}"
    )
    with pytest.raises(InputError, match=message):
        module.check_files()
