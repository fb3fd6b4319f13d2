"""Classes that are merged, renamed, dropped and put in another order, against NumPy's look-ups."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight
from torchvision import tv_tensors

from seg_torch.data import SegmentationDataModule
from seg_torch.data.inspection import inspect_data
from seg_torch.datasets import eightfold, folder, write_folder
from seg_torch.datasets.base import as_dataset
from seg_torch.datasets.class_map import MappedDataset, as_text, map_classes
from seg_torch.errors import InputError
from seg_torch.labels import IGNORE_INDEX, Labels
from seg_torch.losses import class_weights

NAMES = ("sky", "Car", "truck", "road", "tree", "lane")
PALETTE = np.array([[9, 9, 200], [1, 0, 0], [2, 0, 0], [128, 0, 0], [0, 9, 0], [5, 5, 5]])
LABELS = Labels(NAMES, PALETTE)
GROUPS = {"way": ["lane", "road"], "vehicle": ["car", "truck"]}
# Of each rest the new names, and the new id of each old one in the order of NAMES.
RESTS = {
    "keep": (["way", "vehicle", "sky", "tree"], [2, 1, 1, 0, 3, 0]),
    "background": (["background", "way", "vehicle"], [0, 2, 2, 1, 0, 1]),
    "ignore": (["way", "vehicle"], [255, 1, 1, 0, 255, 0]),
}


class Own:
    """Samples of somebody else's, all ids and 255 in each mask."""

    labels = LABELS

    def __init__(self, split: str = "train", length: int = 4) -> None:
        rng = np.random.default_rng([*split.encode()])
        self.images = rng.integers(0, 256, (length, 3, 32, 40), np.uint8)
        self.masks = rng.choice(
            np.array([0, 1, 1, 2, 3, 3, 3, 4, 5, 255], np.uint8), (length, 32, 40)
        )

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image, mask = torch.from_numpy(self.images[index]), torch.from_numpy(self.masks[index])
        return tv_tensors.Image(image), tv_tensors.Mask(mask)


def looked_up(masks: np.ndarray, ids: list[int]) -> np.ndarray:
    table = np.array([*ids, *[255] * (256 - len(ids))], np.uint8)
    return table[masks]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The samples of train and val as a folder."""
    root = tmp_path_factory.mktemp("folder")
    for split in ("train", "val"):
        write_folder(Own(split), LABELS, root / split)
        (root / split / "classes.txt").rename(root / "classes.txt")
    return root


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("kind", ["own", "folder", "eightfold"])
def test_masks_are_those_of_numpys_look_up(root, rest, kind):
    make: Any = Own if kind == "own" else partial(folder, root)
    if kind == "eightfold":
        make = partial(eightfold, make, side=32)
    data = SegmentationDataModule(make, classes=GROUPS, rest=rest)
    plain = SegmentationDataModule(make).dataset("train")
    names, ids = RESTS[rest]
    dataset = data.dataset("train")
    assert [*data.labels.names] == names
    assert len(dataset) == len(plain)
    for index in range(0, len(dataset), 1 + len(dataset) // 5):
        expected = looked_up(plain[index][1].numpy(), ids)
        image, mask = dataset[index]
        assert torch.equal(image, plain[index][0])
        assert np.array_equal(mask.numpy(), expected)
        assert np.array_equal(dataset.mask(index), expected)
        assert isinstance(mask, tv_tensors.Mask)
        for what in ("name", "image_size"):
            assert getattr(dataset, what)(index) == getattr(plain, what)(index)


@pytest.mark.parametrize("rest", RESTS)
def test_statistics_and_weights_are_those_of_the_new_classes(root, rest, new_cache_folder):
    names, ids = RESTS[rest]
    for make in (Own, partial(folder, root)):
        masks = looked_up(Own().masks, ids)
        counts = [int((masks == i).sum()) for i in range(len(names))]
        data = SegmentationDataModule(make, classes=GROUPS, rest=rest)
        assert data.pixel_counts().tolist() == counts
        balanced = compute_class_weight(
            "balanced", classes=np.arange(len(names)), y=masks[masks != 255]
        )
        assert class_weights(data.pixel_counts()).numpy() == pytest.approx(balanced, rel=1e-5)
        findings = inspect_data(data)
        assert not findings["refused"]
        found = {name: row["pixels"]["train"] for name, row in findings["classes"].items()}
        assert found == dict(zip(names, counts, strict=True))
        assert findings["splits"]["train"]["unlabelled_pixels"] == int((masks == 255).sum())
        dropped = "Not labelled by data.rest=ignore: sky, tree."
        assert (dropped in findings["notes"]) == (rest == "ignore")


def test_what_is_remembered_of_one_grouping_is_not_taken_for_another(root, new_cache_folder):
    """Neither of the check nor of the decoded samples; each is remembered by itself."""
    settings = [{}, *({"classes": GROUPS, "rest": rest} for rest in RESTS)]
    settings.append({"classes": {"a": "sky", "b": ["Car", "truck", "road", "tree", "lane"]}})
    settings.append({"classes": {"a": ["sky", "Car"], "b": ["truck", "road", "tree", "lane"]}})
    all_ids = [[*range(6)], *(ids for _, ids in RESTS.values()), [0, 1, 1, 1, 1, 1]]
    all_ids.append([0, 0, 1, 1, 1, 1])
    for _ in range(2):  # the second time they are remembered
        for setting, ids in zip(settings, all_ids, strict=True):
            data = SegmentationDataModule(partial(folder, root), cache="disk", **setting)
            masks = looked_up(Own().masks, ids)
            expected = np.bincount(masks.ravel(), minlength=256)
            assert data.checked("train").pixels.tolist() == expected.tolist()
            samples = data._samples("train", resize_labels=True)
            assert all(np.array_equal(samples[i][1].numpy(), masks[i]) for i in range(4))
    assert len([*(new_cache_folder / "seg_torch/checked").iterdir()]) == len(settings)
    assert len([*new_cache_folder.glob("seg_torch/samples/*/samples.bin")]) == len(settings)


def test_a_group_of_the_name_background_takes_the_rest():
    groups = {"way": "road", "Background": ["sky"], "vehicle": ["Car"]}
    labels, table = map_classes(LABELS, groups, "background")
    assert labels.names == ("way", "Background", "vehicle")
    assert table[:6].tolist() == [1, 2, 1, 0, 1, 1]
    assert (table[6:] == IGNORE_INDEX).all()


def test_a_class_that_the_data_lacks_keeps_its_place():
    labels, table = map_classes(LABELS, {"person": [], "way": "road"}, "ignore")
    assert labels.names == ("person", "way")
    assert table[:6].tolist() == [255, 255, 255, 1, 255, 255]


def test_case_matters_only_where_two_names_differ_in_nothing_else():
    labels = Labels(("car", "Car", "ROAD"))
    assert map_classes(labels, {"a": "Car", "b": "road"}, "ignore")[1][:3].tolist() == [255, 0, 1]
    with pytest.raises(InputError, match="the data has no class CAR; did you mean car or Car\\?"):
        map_classes(labels, {"a": "CAR"}, "ignore")


def test_a_group_has_the_colour_of_its_first_class_and_no_two_have_one():
    labels, _ = map_classes(LABELS, GROUPS, "keep")
    assert labels.palette.tolist() == PALETTE[[5, 1, 0, 4]].tolist()
    labels, _ = map_classes(LABELS, GROUPS | {"person": []}, "background")
    assert labels.palette[:3].tolist() == [[0, 0, 0], *PALETTE[[5, 1]].tolist()]
    same = Labels(("a", "b", "c", "d"), np.array([[7, 7, 7]] * 4))
    for groups in ({"x": ["a", "b"], "y": ["c"]}, {f"{i}": [] for i in range(251)}):
        palette = map_classes(same, groups, "keep")[0].palette
        assert len(np.unique(palette, axis=0)) == len(palette)
        assert [224, 224, 192] not in palette.tolist()  # which stands for 255 in files


@pytest.mark.parametrize(
    ("groups", "rest", "message"),
    [
        ({"a": ["trunk"]}, "keep", "a: the data has no class trunk; did you mean truck? Its "
         "classes are sky, Car, truck, road, tree, lane"),
        ({"a": "3"}, "keep", "the data has no class 3. Its classes are sky"),
        ({"a": 3}, "keep", "the data has no class 3"),
        ({"a": ["sky"], "b": ["Sky", "road"]}, "keep", "sky is in a and in b"),
        ({"tree": ["lane"]}, "keep", "tree is a class of the data, too, and in no group. Write "
         "tree: [tree, ...]"),
        ({"a": {"b": 1}}, "keep", "expected groups such as"),
        ({"a": None}, "keep", "a: None is no name and no list of names"),
        (["sky"], "keep", "expected groups such as {vehicle: [car, truck], road: road}"),
        ({}, "ignore", "no class is left"),
        ({f"{i}": [] for i in range(255)}, "background", "256 class names"),
    ],
)  # fmt: skip
def test_groups_that_cannot_be_made_are_refused(groups, rest, message):
    with pytest.raises(InputError) as error:
        map_classes(LABELS, groups, rest)
    assert message in str(error.value)


def test_a_rest_without_groups_and_an_unknown_rest_are_refused():
    with pytest.raises(InputError, match=r"data\.rest=ignore needs data\.classes"):
        SegmentationDataModule(Own, rest="ignore")
    with pytest.raises(InputError, match=r"data\.rest is 'drop'; use one of keep, background"):
        SegmentationDataModule(Own, classes=GROUPS, rest="drop")


def test_a_value_that_is_no_class_is_refused_by_the_classes_of_the_data():
    samples = Own()
    samples.masks[2, 0, 0] = 6
    dataset = MappedDataset(as_dataset(samples), GROUPS, "ignore")
    for read in (dataset.__getitem__, dataset.mask):
        with pytest.raises(InputError, match=r"Own\[2\]: .*; allowed are 0 to 5"):
            read(2)


def test_white_that_may_be_a_class_is_asked_about_only_if_the_files_hold_it(tmp_path):
    """What a rest makes of other classes is no white."""
    masks = {"white": [0, 255], "dropped": [0, 1, 1], "merged": [0, 1, 255]}
    settings = {
        "white": ({"x": "a", "y": "b"}, "keep"),
        "dropped": ({"x": "a", "y": "c"}, "ignore"),
        "merged": ({"x": ["a", "b"], "y": "c"}, "keep"),
    }
    for name, values in masks.items():
        for i in range(2):
            for kind, content in (("images", 100), ("masks", np.resize(values, (32, 32)))):
                path = tmp_path / name / kind / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((32, 32), content, np.uint8)).save(path)
        (tmp_path / name / "classes.txt").write_text("a\nb\nc\n")
        classes, rest = settings[name]
        data = SegmentationDataModule(partial(folder, tmp_path / name), classes=classes, rest=rest)
        messages = [problem.message for problem in data.checked("train").problems]
        assert len(messages) == (name == "white")
        assert all("see what inspect says without data.classes" in text for text in messages)


def test_val_still_stands_in_for_test(root):
    data = SegmentationDataModule(partial(folder, root), classes=GROUPS)
    assert data.test_is_val
    assert data.dataset("train").base_dataset.has_same_samples(data.dataset("train"))


def test_groups_as_text_are_read_as_they_were():
    groups = {"way": ["lane", "road"], "a: b": ["it's", 'say "x"', "x,y", "Löwe 1"], "none": []}
    text = as_text(groups)
    assert yaml.load(text, yaml.BaseLoader) == groups
    assert text.startswith('{way:[lane,road],"a: b":["it\'s",')
