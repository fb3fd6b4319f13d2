"""What holds for every input, tried on many: the same ones each time."""

import string
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.io import savemat
from scipy.special import log_softmax
from test_inference import Pointwise, assembled, plain
from torch import Tensor
from torchvision import tv_tensors

from seg_torch.data.transforms import augment
from seg_torch.datasets.folder import split_names
from seg_torch.datasets.published import matlab
from seg_torch.datasets.published.matlab import read_mat_mask
from seg_torch.errors import InputError
from seg_torch.labels import decode_segmap, encode_segmap
from seg_torch.losses import CrossEntropyLoss, DiceLoss, WeightedSum
from seg_torch.metrics import ConfusionMatrix
from seg_torch.prediction.inference import Inference, InferenceSettings

settings.register_profile(
    "same", derandomize=True, deadline=None, database=None, max_examples=50, print_blob=False
)
settings.load_profile("same")

VOID = (224, 224, 192)  # of ignored pixels
SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(1, 40)


def ids(rng: np.random.Generator, shape: tuple[int, ...], classes: int, ignored: float) -> Tensor:
    """Random class ids, of which about so many are 255."""
    values = rng.integers(0, classes, shape).astype(np.uint8)
    values[rng.random(shape) < ignored] = 255
    return torch.from_numpy(values)


# Colours


COLOURS = st.tuples(*[st.integers(0, 255)] * 3)


@given(st.lists(COLOURS, min_size=1, max_size=255), st.booleans(), SEEDS)
@example([VOID, (0, 0, 0)], False, 0)
@example([(i, 0, 0) for i in range(255)], False, 0)
def test_class_ids_survive_as_colours_if_no_two_classes_share_one(palette, twice, seed):
    if twice:
        palette = [*palette[:254], palette[0]]
    mask = ids(np.random.default_rng(seed), (2, 5, 7), len(palette), 0.1).numpy()
    expected = np.array([*palette, *[VOID] * (256 - len(palette))], np.uint8)[mask]
    colours = decode_segmap(mask, palette)
    assert np.array_equal(colours, expected)
    if len({*palette, VOID}) == len(palette) + 1:
        assert np.array_equal(encode_segmap(colours, palette), mask)
    else:  # of whatever colour the pixels are
        with pytest.raises(InputError, match="two classes"):
            encode_segmap(colours, palette)


# Counts


@given(st.integers(2, 255), st.integers(1, 3), SIDES, SIDES, st.sampled_from([0, 0.3, 1]), SEEDS)
@example(181, 1, 9, 9, 0.3, 0)  # 16 bits hold the bins of 180 classes
def test_counts_are_those_of_a_loop_over_pixels(classes, batches, height, width, ignored, seed):
    rng = np.random.default_rng(seed)
    matrix, expected = ConfusionMatrix(classes), np.zeros((classes, classes), int)
    for _ in range(batches):
        target = ids(rng, (2, height, width), classes, ignored)
        prediction = ids(rng, (2, height, width), classes, 0)
        matrix.update(prediction, target)
        for label, guess in torch.stack([target, prediction], -1).view(-1, 2).tolist():
            if label != 255:
                expected[label, guess] += 1
    assert np.array_equal(matrix.compute().numpy(), expected)


# Losses


def cross_entropy(x: np.ndarray, t: np.ndarray, weights: object) -> float:
    """Of logits float64 [N, C, H, W] and labels [N, H, W], pixel by pixel."""
    total = divisor = 0.0
    for image, labels in zip(log_softmax(x, axis=1), t, strict=True):
        valid = labels != 255
        for y, column in np.argwhere(valid):
            label = labels[y, column]
            weight = share = 1.0
            if weights == "image":
                weight = 1 - (labels == label).sum() / valid.sum()
            elif weights is not None:
                weight = share = weights[label]
            total -= weight * image[label, y, column]
            divisor += share
    return total / divisor if divisor else 0.0


def dice(x: np.ndarray, t: np.ndarray, smooth: float) -> float:
    """Class by class, over the classes that occur."""
    valid, found = t != 255, []
    p = np.exp(log_softmax(x, axis=1)).transpose(0, 2, 3, 1)[valid]
    for label in np.unique(t[valid]):
        is_label = t[valid] == label
        intersection, size = p[is_label, label].sum(), p[:, label].sum() + is_label.sum()
        found.append((2 * intersection + smooth) / (size + smooth))
    return 1 - float(np.mean(found)) if found else 0.0


def image_dice(x: np.ndarray, t: np.ndarray, smooth: float) -> float:
    """All classes together; a pixel counts with the share of its image that is not its class."""
    numerator = denominator = smooth
    for image, labels in zip(np.exp(log_softmax(x, axis=1)), t, strict=True):
        valid = labels != 255
        for y, column in np.argwhere(valid):
            label = labels[y, column]
            weight = 1 - (labels == label).sum() / valid.sum()
            numerator += 2 * weight * image[label, y, column]
            denominator += 2 * weight
    return 1 - numerator / denominator


def loss_and_reference(kind: str, numbers: list[float]) -> tuple:
    """A loss and the same computed in another way; the numbers are class weights, or the first is
    added to numerator and denominator."""
    smooth = numbers[0]
    plain_ce, plain_dice = CrossEntropyLoss(), DiceLoss(smooth=smooth)
    return {
        "ce": (plain_ce, lambda x, t: cross_entropy(x, t, None)),
        "ce_list": (CrossEntropyLoss(weights=numbers), lambda x, t: cross_entropy(x, t, numbers)),
        "ce_image": (CrossEntropyLoss("image"), lambda x, t: cross_entropy(x, t, "image")),
        "dice": (plain_dice, lambda x, t: dice(x, t, smooth)),
        "dice_image": (DiceLoss(smooth, "image"), lambda x, t: image_dice(x, t, smooth)),
        "sum": (
            WeightedSum([plain_ce, plain_dice], [0.5, 2]),
            lambda x, t: 0.5 * cross_entropy(x, t, None) + 2 * dice(x, t, smooth),
        ),
    }[kind]


@pytest.mark.promise(3)
@pytest.mark.promise(9)
@pytest.mark.promise(10)
@pytest.mark.parametrize("kind", ["ce", "ce_list", "ce_image", "dice", "dice_image", "sum"])
@settings(max_examples=30)
@given(
    st.lists(st.floats(0.1, 10), min_size=2, max_size=6),
    st.integers(1, 3),
    st.integers(2, 5),
    st.integers(2, 5),
    st.sampled_from([0.3, 0, 1]),
    st.sampled_from([3, 0.1, 100, 10_000]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    SEEDS,
)
@example([0.5, 0.0, 2.0], 2, 4, 4, 0.3, 3, torch.float32, 0)
def test_losses_are_those_of_float64_and_blind_to_ignored_pixels(
    kind, numbers, images, height, width, ignored, scale, dtype, seed
):
    (loss, reference), classes = loss_and_reference(kind, numbers), len(numbers)
    rng = np.random.default_rng(seed)
    values = scale * rng.standard_normal((images, classes, height, width))
    logits = torch.from_numpy(values).to(dtype)
    target = ids(rng, (images, height, width), classes, ignored)
    hidden = (target == 255)[:, None]
    found = []
    for shown in (logits, torch.where(hidden, -logits, logits)):
        leaf = shown.clone().requires_grad_()
        value = loss(leaf, target)
        value.backward()
        found.append((value.detach(), leaf.grad))
    (value, gradient), (other_value, other_gradient) = found
    assert torch.equal(value, other_value)
    assert torch.equal(gradient, other_gradient)
    assert gradient.isfinite().all()
    assert not gradient.masked_select(hidden).any()
    expected = reference(logits.double().numpy(), target.numpy())
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


# Transforms


@pytest.mark.promise(11)
@given(
    SIDES,
    SIDES,
    st.none() | st.tuples(SIDES, SIDES),
    st.none() | st.tuples(st.floats(0.1, 1), st.floats(1, 8)),
    st.sampled_from([0, 0.5, 1]),
    st.sampled_from([None, 0.25]),
    SEEDS,
)
def test_no_transform_invents_a_label(height, width, crop, scale, flip, jitter, seed):
    # Labels far apart and none of them 0, so that anything else would be noticed.
    known = np.array([50, 100, 200, 255], np.uint8)
    mask = torch.from_numpy(known[np.random.default_rng(seed).integers(0, 4, (height, width))])
    image = tv_tensors.Image(torch.stack([mask] * 3))
    torch.manual_seed(seed)
    transform = augment(crop, scale, flip, jitter)
    new_image, new_mask = transform(image, tv_tensors.Mask(mask))
    assert isinstance(new_image, tv_tensors.Image)
    assert isinstance(new_mask, tv_tensors.Mask)
    assert new_image.dtype == new_mask.dtype == torch.uint8
    assert new_image.shape == (3, *new_mask.shape)
    assert new_mask.shape == (crop or mask.shape)
    assert {*new_mask.unique().tolist()} <= {*mask.unique().tolist(), 255}


# Tiles


@pytest.mark.promise(14)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([64, 96, 128, 256]), SEEDS)
@example(64, 65, 64, 0)
def test_tiles_cover_every_pixel_once_and_give_what_the_whole_gives(height, width, tile, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)
    network = plain(Pointwise())
    tiled = Inference(network, 5, settings=InferenceSettings(tile=tile, precision="32-true"))
    whole = Inference(network, 5, settings=InferenceSettings(tile=None, precision="32-true"))
    assert torch.equal(assembled(tiled, image), assembled(whole, image))


# Lists


NAMES = st.text(string.ascii_letters + string.digits + "._- äß木/", min_size=1, max_size=12)


@given(st.sets(NAMES, min_size=2, max_size=20), SEEDS, st.booleans(), st.floats(0.01, 0.99))
def test_the_splits_are_parts_of_the_whole(names, seed, with_test, fraction):
    assume(all(name == name.strip() for name in names))
    # Else "a.png" could be either of the two.
    assume(not any(f"{name}.png" in names for name in names))
    rng = np.random.default_rng(seed)
    shuffled = [str(name) for name in rng.permutation(sorted(names))]
    given_lists = {"train": shuffled[1::3], "val": shuffled[::3], "test": shuffled[2::3]}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def splits(order: list[str], *which: str) -> dict[str, list[str]]:
            return {split: split_names(root, order, split, fraction) for split in which}

        def write(split: str) -> None:
            lines = [name + ".png" * (i % 2) for i, name in enumerate(given_lists[split])]
            (root / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")

        if with_test:
            write("test")
        rest = {*names} - ({*given_lists["test"]} if with_test else set())
        if len(rest) > 1:
            found = splits(shuffled, "train", "val")
            assert sorted([*found["train"], *found["val"]]) == sorted(rest)
            assert found["train"]
            assert found["val"]
            assert found == splits(sorted(names), "train", "val")
            assert abs(len(found["val"]) - fraction * len(rest)) <= 1
        for split in given_lists:
            write(split)
        given_lists["test"] = given_lists["test"] or given_lists["val"]  # an empty list is none
        assert splits(sorted(names), "train", "val", "test") == given_lists


# Annotations


@given(
    SIDES,
    SIDES,
    st.sampled_from([*"bBhHiIlLfd"]),
    st.booleans(),
    st.sampled_from([None, "Segmentation", "a"]),
    st.integers(0, 3),
    SEEDS,
)
def test_masks_come_out_of_matlab_files_as_scipy_put_them_in(
    height, width, kind, packed, field, others, seed
):
    limit = 128 if kind == "b" else 256
    mask = np.random.default_rng(seed).integers(0, limit, (height, width)).astype(kind)
    variables: dict = {f"other{i}": np.zeros((3, i)) for i in range(others)}
    fields = {"text": "ab", **({} if field is None else {field: mask}), "more": np.ones((2, 2))}
    variables |= {"labels": mask if field is None else fields, "last": "text"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.mat")
        file = BytesIO()
        savemat(file, variables, do_compression=packed)
        path.write_bytes(file.getvalue())
        found = read_mat_mask(path, "labels", field)
        assert found.dtype == np.uint8
        assert np.array_equal(found, mask)
        with pytest.raises(InputError, match="holds no variable 'label'"):
            read_mat_mask(path, "label", field)


@pytest.mark.parametrize("value", [256, -1, 0.5, np.nan])
def test_other_numbers_than_class_ids_are_refused(tmp_path, value):
    savemat(tmp_path / "a.mat", {"labels": np.array([[0, value]])})
    with pytest.raises(InputError, match=r"a\.mat: labels is no matrix of class ids"):
        read_mat_mask(tmp_path / "a.mat", "labels")


def test_a_matlab_file_is_not_unpacked_without_end(tmp_path, monkeypatch):
    savemat(tmp_path / "a.mat", {"labels": np.zeros((50, 50))}, do_compression=True)
    monkeypatch.setattr(matlab, "LIMIT", 20_000)  # bytes, of which the values alone take as many
    with pytest.raises(InputError, match=r"a\.mat: .*would unpack to more than 20,000 bytes"):
        read_mat_mask(tmp_path / "a.mat", "labels")
