"""What all formats of annotation tools have in common."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from functools import partial
from multiprocessing.reduction import ForkingPickler

import make_data
import numpy as np
import pytest
from annotation_copies import (
    FORMATS,
    HEIGHT,
    WIDTH,
    all_masks,
    edit,
    saved_table,
    tiny_copy,
)
from hydra.utils import instantiate
from matplotlib.path import Path as Outline
from pycocotools import mask as rle
from torch.utils.data import ConcatDataset, DataLoader

from seg_torch import datasets
from seg_torch.data.check import check
from seg_torch.data.inspection import inspect_dataset
from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets import base
from seg_torch.datasets.base import split_of
from seg_torch.errors import InputError

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture
def make(tmp_path):
    """make(name): a folder with the tiny copy of a format, to be broken by the test."""
    return partial(tiny_copy, tmp_path)


@pytest.fixture
def table(tmp_path):
    """table(): a folder as `save_to_disk` writes it, with 0 for what is not labelled."""
    pytest.importorskip("datasets")
    return partial(saved_table, tmp_path / "table")


LARGER = rle.encode(np.ones((99, 64), np.uint8, order="F"))["counts"].decode()


def inside(points, grow: float = 0.0) -> np.ndarray:
    """Which centres of pixels are inside of a polygon, bool [H, W], by matplotlib."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    centres = np.stack([x.ravel(), y.ravel()], axis=1)
    # Outward or inward by so many pixels (matplotlib goes half as far as it is told, and in a
    # direction that depends on that of the outline), for what different fillers make of the rim.
    grown = Outline(points).contains_points(centres, radius=2 * grow)
    shrunk = Outline(points[::-1]).contains_points(centres, radius=2 * grow)
    return (grown | shrunk if grow > 0 else grown & shrunk).reshape(HEIGHT, WIDTH)


def assert_drawn(mask: np.ndarray, number: int, value: int, index: int) -> None:
    """The object has its value well inside of its outline, where nothing lies on top of it."""
    own = inside(make_data.polygon(index, number), -1.5)
    if number == 0:
        own &= ~inside(make_data.polygon(index, 1), 1.5)
    assert own.sum() >= 8
    assert (mask[own] == value).all()


def test_spawned_workers_read_the_same_samples(anew, tmp_path, table):
    parts = [datasets.hf(str(table()), "val")]
    for name in FORMATS:
        getattr(make_data, f"make_{name}")(tmp_path / name)
        parts.append(getattr(datasets, name)(tmp_path / name, "val"))
    together = ConcatDataset(parts)
    loader = DataLoader(together, None, num_workers=1, multiprocessing_context=anew, timeout=120)
    for (image, mask), (expected_image, expected_mask) in zip(loader, together, strict=True):
        assert (image == expected_image).all()
        assert (mask == expected_mask).all()


def test_a_worker_gets_no_copy_of_the_annotations(make):
    root = make("coco")
    content = make_data.coco_content([f"{i:012}.jpg" for i in range(4)])
    for annotation in content["annotations"]:
        if isinstance(annotation["segmentation"], list):
            annotation["segmentation"] *= 100
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    dataset = datasets.coco(root, "train")
    assert sum(len(json.dumps(dataset.shapes(i))) for i in range(4)) > 25_000
    assert len(ForkingPickler.dumps(dataset)) < 10_000


@pytest.mark.parametrize("name", ["coco", "labelme", "label_studio", "yolo"])
def test_annotations_are_read_once_for_all_splits_until_one_changes(make, monkeypatch, name):
    root = make(name)
    calls = []
    module = __import__(f"seg_torch.datasets.annotations.{name}", fromlist=["_read"])
    read = module._read
    monkeypatch.setattr(module, "_read", lambda *args: calls.append(1) or read(*args))
    for split in ("train", "val", "test"):
        getattr(datasets, name)(root, split)
    assert len(calls) == 1
    suffix = ".txt" if name == "yolo" else ".json"
    path = next(p for p in root.rglob(f"*{suffix}") if "captions" not in p.name)
    path.write_text(path.read_text() + "\n\n")
    getattr(datasets, name)(root, "train")
    assert len(calls) == 2


def test_val_stands_in_for_test_where_the_format_makes_the_split_without_one(make):
    root = make("coco")
    (root / "test.txt").write_text("of another tool\n")
    assert datasets.coco(root, "test").pairs == datasets.coco(root, "val").pairs


@pytest.mark.parametrize("name", ["coco", "label_studio", "labelme", "yolo"])
def test_without_a_background_the_rest_is_not_labelled(make, name):
    read, root = getattr(datasets, name), make(name)
    with_it, without = read(root, "train"), read(root, "train", background=None)
    assert with_it.labels.names == ("background", *without.labels.names)
    expected = with_it.mask(0).astype(int) - 1
    assert (without.mask(0) == np.where(expected == -1, 255, expected)).all()
    assert with_it.fingerprint() != without.fingerprint()


@pytest.mark.parametrize("name", ["coco", "label_studio", "labelme", "yolo"])
def test_the_same_objects_are_drawn_from_every_format(make, name):
    masks = list(all_masks(getattr(datasets, name), make(name)).items())
    names = getattr(datasets, name)(make(name), "train").labels.names
    drawn = 0
    for file, mask in masks:
        index = int(file[-1])
        if name == "yolo" and index == 4:
            assert not mask.any()  # the image without a text file
            continue
        for number, label in enumerate(make_data.NAMES):
            assert_drawn(mask, number, names.index(label), index)
        far = ~inside(make_data.polygon(index, 0), 1.5) & ~inside(make_data.polygon(index, 1), 1.5)
        if name != "coco":  # which has more of these classes
            assert not np.isin(mask[far], [names.index(n) for n in make_data.NAMES]).any()
        drawn += 1
    assert drawn >= 4


@pytest.mark.parametrize("name", ["coco", "label_studio", "labelme", "yolo"])
def test_more_than_255_classes_are_refused(make, name):
    root = make(name)
    many = [f"class {i}" for i in range(300)]
    if name == "coco":
        for path in root.rglob("instances_*.json"):
            more = [{"id": 100 + i, "name": label} for i, label in enumerate(many)]
            edit(path, lambda content, more=more: content["categories"].extend(more))
    elif name == "labelme":
        make_data.write_lines(root / "labels.txt", [*many, *make_data.NAMES, "sign", "pole"])
        edit(root / "photo_3.json", lambda content: content["shapes"].pop())
    elif name == "yolo":
        make_data.write_lines(
            root / "data.yaml", ["train: images/train", "val: images/val", f"names: {many}"]
        )
    else:
        value = {"points": [[1, 1], [9, 1], [9, 9]]}
        regions = [make_data.region("polygonlabels", label, value) for label in many]
        edit(
            next(root.glob("*.json")),
            lambda content: content[0]["annotations"][0]["result"].extend(regions),
        )
    with pytest.raises(InputError, match=r"30\d class names: masks are 8 bit") as error:
        getattr(datasets, name)(root, "train")
    assert str(root) in str(error.value)


@pytest.mark.parametrize("name", FORMATS)
def test_batches_are_loaded_with_the_settings_of_each_configuration(make, compose, name):
    line = f"data={name}", f"data.root={make(name)}", "data.num_workers=0", "data.batch_size=2"
    data = instantiate(compose("train", *line).data, _convert_="all")
    data.check_files()
    images, masks = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 352, 480)
    assert masks.shape == (2, 352, 480)
    assert masks.unique().numel() > 1
    defaults = {**data.make_dataset.keywords}
    signature = inspect.signature(getattr(datasets, name)).parameters
    assert defaults == {key: signature[key].default for key in [*signature][2:]}


BROKEN = {
    "coco": "annotations/instances_train2017.json",
    "coco_panoptic": "annotations/panoptic_train2017.json",
    "label_studio": "project-1-at-2025-02-01.json",
    "labelme": "photo_0.json",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_cut_off_is_named_with_the_place(make, name):
    path = make(name) / BROKEN[name]
    path.write_text(path.read_text()[:90])
    with pytest.raises(InputError, match=rf"{path.name}: no valid JSON: .*line \d+, column \d+"):
        getattr(datasets, name)(path.parents[BROKEN[name].count("/")], "train")


@pytest.mark.parametrize("name", FORMATS)
def test_an_image_that_is_missing_is_named(make, name):
    root = make(name)
    image = getattr(datasets, name)(root, "train").pairs[0].image
    image.unlink()
    if name == "yolo":  # whose images are those that exist: only a list can name another
        make_data.write_lines(root / "train.txt", ["images/train/photo_0.jpg"])
        text = (root / "data.yaml").read_text().replace("images/train", "train.txt")
        (root / "data.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        getattr(datasets, name)(root, "train")
    assert image.name.split(".")[0][-7:] in str(error.value).replace("%20", " ")


@pytest.mark.parametrize(
    ("name", "points", "message"),
    [
        ("coco", [[1, 1, 9, 9]], "2 points, but it takes at least 3"),
        ("coco", [[1, 1, 9, 9, 640, 5]], r"the point \(640, 5\) is outside of .* 64 x 48"),
        ("coco", {"size": [9, 9], "counts": [81]}, r"size of the run lengths is \[9, 9\]"),
        ("coco", {"size": [48, 64], "counts": [5, 5]}, "add up to 10 pixels"),
        ("coco", {"size": [48, 64], "counts": LARGER}, "Invalid RLE"),
        ("coco", [[1, "a", 9, 9, 3, 3]], r"annotation 2: .* not pairs of x and y: \[1, 'a', 9"),
        ("labelme", [[1, 1], [9, 9]], "2 points, but it takes at least 3"),
        ("labelme", [[1, 1], [9, 9], [5, -30]], r"the point \(5, -30\) is outside of"),
        ("labelme", [[1, 1], [9, 9], [5, math.nan]], r"the point \(5, nan\) is outside of"),
        ("labelme", [[1, 1, 1], [9, 9, 1]], "its points are not pairs of x and y"),
        ("label_studio", [[1, 1], [9, 9]], "2 points, but it takes at least 3"),
        ("label_studio", [[1, 1], [9, 9], [300, 50]], r"the point \(192, 24\) is outside of"),
        ("yolo", "0 0.1 0.1 0.2 0.2 0.3 0.3 5.5 0.2", r"the point \(352, 9.6\) is outside of"),
    ],
)
def test_a_shape_that_cannot_be_drawn_is_a_finding_with_its_file(make, name, points, message):
    root = make(name)
    if name == "coco":
        path = root / BROKEN[name]

        def change(content):
            content["annotations"] = [{**content["annotations"][1], "segmentation": points}]
    elif name == "labelme":
        path = root / BROKEN[name]

        def change(content):
            content["shapes"][0]["points"] = points
    elif name == "label_studio":
        path = root / BROKEN[name]

        def change(content):
            content[0]["annotations"][0]["result"][0]["value"]["points"] = points

    if name == "yolo":
        path = root / "labels" / "train" / "photo_0.txt"
        make_data.write_lines(path, [points])
    else:
        edit(path, change)
    report = inspect_dataset(getattr(datasets, name), root)
    assert report["refused"]
    (problem,) = report["problems"]
    assert problem["file"] == str(path)
    with pytest.raises(InputError, match=message) as error:
        raise InputError(problem["message"])
    assert str(path) in str(error.value)
    assert "shape 1" in str(error.value)


@pytest.mark.parametrize("name", ["coco", "labelme", "label_studio"])
def test_an_image_of_another_size_than_annotated_is_a_finding(make, name):
    root = make(name)
    pair = getattr(datasets, name)(root, "train").pairs[0]
    make_data.save(make_data.picture(0, 20, 30), pair.image)
    (problem,) = inspect_dataset(getattr(datasets, name), root)["problems"]
    assert f"{pair.image} of 64 x 48 pixels, the file has 30 x 20" in problem["message"]
    assert problem["message"].startswith(str(pair.mask))


def test_points_a_little_outside_are_cut_off(make):
    root = make("labelme")
    outside = [[-2, -2], [66, -2], [66, 50], [-2, 50]]
    shape = make_data.labelme_shape("car", outside, "polygon")
    edit(root / "photo_0.json", lambda content: content.update(shapes=[shape]))
    dataset = datasets.labelme(root, "train")
    masks = all_masks(datasets.labelme, root)
    assert (masks["photo_0"] == dataset.labels.names.index("car")).all()


@pytest.mark.parametrize(
    ("path", "split"),
    [
        *(("train2017/x", "train"), ("valid", "val"), ("validation", "val"), ("Testing", "test")),
        *(
            ("instances_val2017.json", "val"),
            ("latest", ""),
            ("trainer", ""),
            ("a/test_2/", "test"),
        ),
        ("annotations/instances_default.json", ""),
        ("instances_train_val.json", ""),
        ("test/train_1/photo.jpg", "train"),
        *(("test_drive/", ""), ("train_station/a.json", ""), ("val_images/", "val")),
        *(("my_train/a.json", "train"), ("train_val/", ""), ("train/test_photo/", "train")),
    ],
)
def test_which_split_a_path_stands_for(path, split):
    assert split_of(path) == split


@pytest.mark.parametrize("name", FORMATS)
def test_e73_hidden_files_and_folders_are_no_data(make, name):
    root = make(name)
    read = getattr(datasets, name)
    splits = ("train", "val", "test")
    expected = {split: read(root, split).pairs for split in splits}
    for path in [path for path in root.rglob("*") if path.is_file()]:
        copies = path.parent / ".ipynb_checkpoints"
        copies.mkdir(exist_ok=True)
        shutil.copy(path, copies / f"{path.stem}-checkpoint{path.suffix}")
        shutil.copy(path, copies / path.name)
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7 of macOS")
        below = root / "__MACOSX" / path.relative_to(root)
        below.parent.mkdir(parents=True, exist_ok=True)
        below.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7 of macOS")
        shutil.copy(path, below)
    assert {split: read(root, split).pairs for split in splits} == expected
    assert {split: datasets.auto(root, split).pairs for split in splits} == expected


@pytest.mark.parametrize("name", ["coco", "label_studio", "labelme", "yolo"])
def test_e06_images_of_one_name_and_other_suffixes_are_told_apart(make, name):
    root = make(name)
    before = [len(getattr(datasets, name)(root, split)) for split in ("train", "val")]
    pair = getattr(datasets, name)(root, "train").pairs[0]
    twin = pair.image.with_suffix(".png")
    make_data.save(make_data.picture(9), twin)
    if name == "yolo":
        return  # see there: both have one text file
    if name == "labelme":
        content = json.loads(pair.mask.read_text()) | {"imagePath": twin.name}
        make_data.write_json(root / "other.json", content)
    else:

        def change(content):
            if name == "coco":
                content["images"].append({**content["images"][0], "id": 1, "file_name": twin.name})
            else:
                data = {"image": f"/data/upload/1/{twin.name}"}
                content.append({**content[0], "id": 99, "data": data})

        edit(pair.mask, change)
    parts = [getattr(datasets, name)(root, split).pairs for split in ("train", "val")]
    assert sum(map(len, parts)) == sum(before) + 1
    names = [pair.name for part in parts for pair in part]
    assert len({*names}) == len(names)


def test_e16_what_an_older_reader_found_is_not_used(make, monkeypatch, tmp_path):
    root = make("labelme")
    package = tmp_path / "seg_torch"
    shutil.copytree(base.Path(base.__file__).parents[1], package)
    monkeypatch.setattr(base, "__file__", str(package / "datasets" / "base.py"))
    base.readers_source.cache_clear()
    dataset = datasets.labelme(root, "train")
    first = dataset.fingerprint()
    check(dataset)
    assert None is not first == dataset.fingerprint()
    # A line of a helper that the reader calls, far from the function itself.
    path = package / "datasets" / "annotations" / "annotated.py"
    path.write_text(path.read_text().replace("MARGIN = 0.05", "MARGIN = 0.01"))
    base.readers_source.cache_clear()
    read, zeros = [], np.zeros((HEIGHT, WIDTH), np.uint8)
    monkeypatch.setattr(type(dataset), "mask", lambda self, i: read.append(i) or zeros)
    check(dataset)
    assert dataset.fingerprint() != first
    assert read
    base.readers_source.cache_clear()


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_e16_kept_samples_are_those_of_the_corrected_annotations(make, cache):
    root = make("coco_panoptic")

    def masks():
        data = SegmentationDataModule(datasets.coco_panoptic, str(root), cache=cache, num_workers=0)
        return next(iter(data.val_dataloader()))[0][1].numpy(), data.pixel_counts().tolist()

    (before, counts), path = masks(), root / "annotations" / "panoptic_{}2017.json"
    for split in ("train", "val"):

        def all_cars(content):
            for annotation in content["annotations"]:
                for info in annotation["segments_info"]:
                    info["category_id"] = 3

        edit(base.Path(str(path).format(split)), all_cars)
    after, corrected = masks()
    assert {*np.unique(before)} == {0, 1, 255}
    assert (after == np.where(before == 1, 0, before)).all()
    assert corrected == [sum(counts), 0]
