"""Datasets of annotation tools, beside the battery over all datasets in test_datasets.py."""

from __future__ import annotations

import inspect
import json
import logging
import math
import multiprocessing
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import make_data
import numpy as np
import pytest
from hydra.utils import instantiate
from matplotlib.path import Path as Outline
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch.utils.data import ConcatDataset, DataLoader

from seg_torch import datasets
from seg_torch.commands.evaluate import evaluate
from seg_torch.commands.train import train
from seg_torch.data.inspection import inspect_dataset
from seg_torch.data.module import SegmentationDataModule
from seg_torch.datasets.annotations.label_studio import decode_brush
from seg_torch.datasets.auto import recognise
from seg_torch.datasets.reading import split_of
from seg_torch.drawing.coco import coco_annotations, write_coco
from seg_torch.errors import InputError
from seg_torch.labels import Labels

FORMATS = [
    *("coco", "coco_panoptic", "cvat", "label_studio", "labelme", "labelme_voc", "roboflow"),
    "yolo",
]
HEIGHT, WIDTH = make_data.HEIGHT, make_data.WIDTH
LARGER = rle.encode(np.ones((99, 64), np.uint8, order="F"))["counts"].decode()

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture
def make(tmp_path):
    """make(name): a folder with the tiny copy of a format, to be broken by the test."""

    def make(name):
        getattr(make_data, f"make_{name}")(tmp_path)
        return tmp_path

    return make


def edit(path: Path, change) -> None:
    """Change the content of a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def every_mask(dataset) -> dict[str, np.ndarray]:
    """The masks of a dataset by the last part of their names."""
    return {Path(pair.name).name: dataset.mask(i) for i, pair in enumerate(dataset.pairs)}


def all_masks(read, root, **options) -> dict[str, np.ndarray]:
    return every_mask(read(root, "train", **options)) | every_mask(read(root, "val", **options))


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


# All of them


def test_spawned_workers_read_the_same_samples(tmp_path, table):
    parts = [datasets.hf(str(table()), "val")]
    for name in FORMATS:
        getattr(make_data, f"make_{name}")(tmp_path / name)
        parts.append(getattr(datasets, name)(tmp_path / name, "val"))
    together = ConcatDataset(parts)
    spawn = multiprocessing.get_context("spawn")
    loader = DataLoader(together, None, num_workers=1, multiprocessing_context=spawn, timeout=120)
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


# What is broken

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
        ("coco", [[1, "a", 9, 9, 3, 3]], "could not convert"),
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


# COCO


def test_coco_masks_are_those_of_its_own_api_with_the_smaller_object_on_top(make):
    root = make("coco")
    dataset = datasets.coco(root, "train")
    assert dataset.labels.names == ("background", "car", "traffic light")
    api = COCO(str(root / "annotations" / "instances_train2017.json"))
    for i, pair in enumerate(dataset.pairs):
        (number,) = (n for n, im in api.imgs.items() if im["file_name"] == pair.image.name)
        expected = np.zeros((HEIGHT, WIDTH), np.uint8)
        objects = api.loadAnns(api.getAnnIds(number))
        for each in sorted(objects, key=lambda a: (-a["iscrowd"], -int(rle.area(api.annToRLE(a))))):
            expected[api.annToMask(each) == 1] = {3: 1, 7: 2}[each["category_id"]]
        assert (dataset.mask(i) == expected).all()


def test_coco_run_lengths_may_have_holes(make):
    mask = datasets.coco(make("coco"), "train").mask(0)
    assert (mask[0:7, 50:57] == 2).sum() == 49 - 9
    assert not mask[2:5, 52:55].any()
    assert (mask[40:44, 2:8] == 1).all()


def test_a_coco_crowd_lies_below_larger_objects_and_a_missing_area_is_counted(make):
    root = make("coco")

    def change(content):
        crowd = {"size": [HEIGHT, WIDTH], "counts": [0, 48 * 10, 48 * 54]}  # ten columns
        square = [[0, 0, 40, 0, 40, 40, 0, 40]]
        content["annotations"] = [
            {"id": 1, "image_id": 100, "category_id": 3, "segmentation": square},
            {"id": 2, "image_id": 100, "category_id": 7, "segmentation": crowd, "iscrowd": 1},
            {"id": 3, "image_id": 100, "category_id": 7, "segmentation": [[1, 1, 5, 1, 5, 5]]},
        ]

    edit(root / "annotations" / "instances_train2017.json", change)
    mask = datasets.coco(root, "train").mask(0)
    assert mask[20, 5] == 1
    assert mask[45, 5] == 2
    assert mask[2, 4] == 2


def test_coco_parts_of_one_object_are_filled_together(make):
    root = make("coco")

    def change(content):
        parts = [[1, 1, 9, 1, 9, 9, 1, 9], [20, 20, 29, 20, 29, 29, 20, 29]]
        content["annotations"] = [{**content["annotations"][1], "segmentation": parts}]

    edit(root / "annotations" / "instances_train2017.json", change)
    mask = datasets.coco(root, "train").mask(0)
    assert mask[5, 5] == mask[25, 25] == 1
    assert mask[15, 15] == 0


@pytest.mark.parametrize("layout", ["cvat", "roboflow", "one"])
def test_coco_is_read_in_the_layouts_of_the_tools(tmp_path, layout):
    names = [f"photo_{i}.jpg" for i in range(6)]
    if layout == "roboflow":
        for split, part in (("train", names[:3]), ("valid", names[3:5]), ("test", names[5:])):
            content = make_data.coco_content(part)
            # The project itself, as Roboflow has it.
            content["categories"] += [{"id": 0, "name": "vehicle", "supercategory": "none"}]
            make_data.write_json(tmp_path / split / "_annotations.coco.json", content)
            for i, name in enumerate(part):
                make_data.save(make_data.picture(i), tmp_path / split / name)
        expected = [3, 2, 1]
    else:
        file = "annotations/instances_default.json" if layout == "cvat" else "result.json"
        content = make_data.coco_content(names)
        make_data.write_json(tmp_path / file, content)
        for i, name in enumerate(names):
            make_data.save(make_data.picture(i), tmp_path / "images" / "default" / name)
        expected = [5, 1, 1]
    found = [datasets.coco(tmp_path, split) for split in ("train", "val", "test")]
    assert [len(dataset) for dataset in found] == expected
    assert {dataset.labels.names for dataset in found} == {("background", "car", "traffic light")}


def test_one_file_is_split_by_lists_or_by_a_hash_that_the_seed_changes(tmp_path):
    names = [f"photo_{i}.jpg" for i in range(8)]
    make_data.write_json(tmp_path / "annotations.json", make_data.coco_content(names))
    for i, name in enumerate(names):
        make_data.save(make_data.picture(i), tmp_path / name)

    def val(**options):
        return [pair.name for pair in datasets.coco(tmp_path, "val", **options).pairs]

    assert val() == val()
    assert len(val(val_fraction=0.5)) == 4
    assert val(val_fraction=0.5) != val(val_fraction=0.5, seed=1)
    make_data.write_lines(tmp_path / "train.txt", ["photo_0.jpg"])
    make_data.write_lines(tmp_path / "val.txt", ["photo_5", "photo_2"])
    assert val() == ["photo_5", "photo_2"]


def test_what_predict_writes_as_coco_is_read_back_pixel_by_pixel(tmp_path):
    labels = Labels(("background", "car", "sky"))
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 3, (HEIGHT, WIDTH)).astype(np.uint8) for _ in range(3)]
    images = []
    for i, mask in enumerate(masks):
        make_data.save(make_data.picture(i), tmp_path / f"photo_{i}.jpg")
        images.append((f"photo_{i}.jpg", WIDTH, HEIGHT, coco_annotations(mask)))
    write_coco(str(tmp_path / "annotations.json"), images, labels)
    read = all_masks(datasets.coco, tmp_path)
    assert datasets.coco(tmp_path, "train").labels == labels
    for i, mask in enumerate(masks):
        assert (read[f"photo_{i}"] == mask).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(category_id=99), "category 99 is not in"),
        (lambda c: c["annotations"][0].update(image_id=99), "image 99 is not in the images"),
        (lambda c: c["annotations"][0].update(segmentation=[]), "no segmentation, only a box"),
        (lambda c: c["annotations"][0].pop("segmentation"), "'segmentation' is missing"),
        (lambda c: c["images"][0].pop("file_name"), "'file_name' is missing"),
        (lambda c: c["images"][0].pop("width"), "'width' is missing"),
        (lambda c: c["images"][0].update(width="wide"), "invalid literal for int"),
        (lambda c: c["annotations"].append("nothing"), "annotations: 'str' object has no"),
        (lambda c: c["categories"][0].update(id=3), "3 is 'car'"),
        (lambda c: c.pop("categories"), "hold no COCO dataset"),
    ],
)
def test_what_is_wrong_in_a_coco_file_is_said(make, change, message):
    root = make("coco")
    path = root / "annotations" / "instances_train2017.json"
    edit(path, change)
    (root / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(InputError, match=message) as error:
        datasets.coco(root, "train")
    assert path.name in str(error.value)


def test_panoptic_segments_become_classes_and_the_rest_is_not_labelled(make):
    root = make("coco_panoptic")
    for split, start in (("train", 0), ("val", 4)):
        dataset = datasets.coco_panoptic(root, split)
        assert dataset.labels.names == ("car", "sky")
        for i in range(len(dataset)):
            expected = make_data.blocks(start + i, [255, 0, 1], void=None)
            assert (dataset.mask(i) == expected).all()


def test_a_panoptic_segment_without_a_class_is_a_finding(make):
    root = make("coco_panoptic")
    path = root / "annotations" / "panoptic_train2017.json"
    edit(path, lambda content: content["annotations"][0]["segments_info"].pop())
    (problem,) = inspect_dataset(datasets.coco_panoptic, root)["problems"]
    assert "segments [70000] are not in the segments_info" in problem["message"]
    assert problem["file"].endswith("000000000000.png")


# labelme


def test_labelme_shapes_of_every_type_are_drawn(make):
    root = make("labelme")
    names = datasets.labelme(root, "train").labels.names
    assert names == ("background", "car", "pole", "sign", "traffic light")
    masks, (pole, sign) = all_masks(datasets.labelme, root), (2, 3)
    one, two, three = (masks[f"photo_{i}"] for i in (1, 2, 3))
    assert (one[2:11, 50:61] == sign).all()  # both corners belong to the rectangle
    assert not (one[11, 50:61] == sign).any()
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot(x - 10, y - 40)
    assert (one[distance < 3.5] == sign).all()
    assert not (one[(distance > 5) & (x < 40)] == sign).any()
    assert (two[10, :7] == pole).all()  # a line 10 pixels wide around x = 2
    assert not (two[10, 8:12] == pole).any()
    assert two[11, 55] == two[33, 55] == pole
    for centre in (30, 40, 50):
        assert (two[np.hypot(x - centre, y - 40) < 4.5] == sign).all()
    assert (three[1:5, 55:59] == np.where(np.eye(4) == 1, sign, 0)).all()
    assert (three[40:48, :21] == 255).all()


def test_later_labelme_shapes_lie_on_top(make):
    root = make("labelme")
    edit(root / "photo_0.json", lambda content: content["shapes"].reverse())
    masks = all_masks(datasets.labelme, root)
    assert not (masks["photo_0"] == 4).any()  # the traffic light is inside of the car
    assert (masks["photo_1"] == 4).any()


def test_labelme_images_inside_of_the_json_are_read(make):
    root = make("labelme")
    samples = {}
    for split in ("train", "val"):
        dataset = datasets.labelme(root, split)
        samples |= {pair.name: dataset[i][0] for i, pair in enumerate(dataset.pairs)}
    pixels = samples["photo_5"].permute(1, 2, 0).numpy()
    assert (pixels == np.asarray(make_data.picture(5))).all()
    assert not SegmentationDataModule(datasets.labelme, str(root)).check_files()


def test_damaged_image_data_of_labelme_is_a_finding(make):
    root = make("labelme")
    edit(root / "photo_5.json", lambda content: content.update(imageData="AAAA"))
    problems = inspect_dataset(datasets.labelme, root)["problems"]
    assert {problem["file"] for problem in problems} == {str(root / "photo_5.json")}
    assert "imageData: " in problems[0]["message"]


def test_labels_txt_gives_the_order_and_refuses_other_labels(make):
    root = make("labelme")
    listed = ["__ignore__", "_background_", "traffic light", "sign", "pole", "car"]
    make_data.write_lines(root / "labels.txt", listed)
    dataset = datasets.labelme(root, "train")
    assert dataset.labels.names == tuple(listed[1:])
    assert all_masks(datasets.labelme, root)["photo_3"][45, 5] == 255
    make_data.write_lines(root / "labels.txt", listed[:-1])
    with pytest.raises(InputError, match=r"photo_0\.json: \['car'\] are not in labels\.txt"):
        datasets.labelme(root, "train")


def test_labelme_folders_make_the_split(make, caplog):
    root = make("labelme")
    for i, folder in enumerate(["train", "train", "val", "test"]):
        (root / folder).mkdir(exist_ok=True)
        for suffix in ("jpg", "json"):
            (root / f"photo_{i}.{suffix}").rename(root / folder / f"photo_{i}.{suffix}")
    with caplog.at_level(logging.INFO, "seg_torch"):
        splits = {s: datasets.labelme(root, s) for s in ("train", "val", "test")}
    names = {split: [pair.name for pair in dataset.pairs] for split, dataset in splits.items()}
    assert "2 images are in no split of its own" in caplog.text
    assert names == {
        "train": ["train/photo_0", "train/photo_1"],
        "val": ["val/photo_2"],
        "test": ["test/photo_3"],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(shape_type="spiral"), "shapes of the type 'spiral' are not known"),
        (lambda s: s.update(shape_type="circle"), "a circle of 5 points, it has 2"),
        (lambda s: s.update(shape_type="mask", points=[[0, 0], [1, 1]], mask="AAAA"), "its mask: "),
    ],
)
def test_a_labelme_shape_of_a_wrong_kind_is_refused(make, change, message):
    root = make("labelme")
    edit(root / "photo_0.json", lambda content: change(content["shapes"][0]))
    with pytest.raises(
        InputError, match=rf"photo_0\.json: photo_0\.jpg, shape 1 \(car\): .*{message}"
    ):
        all_masks(datasets.labelme, root)


# Exports with masks


@pytest.mark.parametrize("name", ["cvat", "labelme_voc", "roboflow"])
def test_masks_of_exports_are_read_as_they_were_made(make, name):
    root = make(name)
    parts = ("train", "val", "test") if name == "roboflow" else ("train", "val")
    seen = 0
    for split in parts:
        dataset = getattr(datasets, name)(root, split)
        assert dataset.labels.names == ("background", "car", "traffic light")
        for i, pair in enumerate(dataset.pairs):
            index = int(pair.name.split("_jpg")[0].split("_")[-1])
            expected = make_data.tool_mask(index)
            expected[:2] = 255 if name == "labelme_voc" else expected[:2]
            assert (dataset.mask(i) == expected).all()
            seen += 1
    assert seen == (6 if name == "roboflow" else 5)


def test_cvat_colours_are_those_of_the_labelmap(make):
    labels = datasets.cvat(make("cvat"), "train").labels
    assert labels.palette.tolist() == [[0, 0, 0], [250, 50, 83], [51, 221, 255]]


def test_lists_of_cvat_subsets_make_the_split(make):
    root = make("cvat")
    lists = root / "ImageSets" / "Segmentation"
    (lists / "default.txt").unlink()
    make_data.write_lines(lists / "Train.txt", ["photo_0", "more/photo_3"])
    make_data.write_lines(lists / "Validation.txt", ["photo_1"])
    names = {s: [p.name for p in datasets.cvat(root, s).pairs] for s in ("train", "val", "test")}
    assert names == {"train": ["more/photo_3", "photo_0"], "val": ["photo_1"], "test": ["photo_1"]}


def test_a_cvat_export_without_images_says_how_to_export_them(make):
    root = make("cvat")
    shutil.rmtree(root / "JPEGImages")
    with pytest.raises(InputError, match=r'missing: JPEGImages(.|\n)*"Save images"'):
        datasets.cvat(root, "train")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["car:1,2"], r"the line 'car:1,2' is not name:R,G,B:parts:actions"),
        (["car:1,2,3::", "sky:1,2,3::"], r"two classes have the colour \(1, 2, 3\)"),
        (["# nothing"], "0 class names"),
        (["car:1,2,300::"], "the palette has shape"),
    ],
)
def test_a_bad_labelmap_is_refused_by_name(make, lines, message):
    root = make("cvat")
    make_data.write_lines(root / "labelmap.txt", lines)
    with pytest.raises(InputError, match=rf"labelmap\.txt: .*{message}"):
        datasets.cvat(root, "train")


def test_a_colour_that_is_not_in_the_labelmap_is_a_finding(make):
    root = make("cvat")
    make_data.save(np.full((HEIGHT, WIDTH, 3), 9, np.uint8), root / "SegmentationClass/photo_0.png")
    (problem,) = inspect_dataset(datasets.cvat, root)["problems"]
    assert problem["file"].endswith("photo_0.png")
    assert problem["pixels"] == {"(9, 9, 9)": HEIGHT * WIDTH}


def test_labelme2voc_of_older_versions_is_read_too(make):
    root = make("labelme_voc")
    (root / "SegmentationClass").rename(root / "SegmentationClassPNG")
    (root / "SegmentationClass").mkdir()
    np.save(root / "SegmentationClass" / "2011_000000.npy", make_data.tool_mask(0))
    assert len(datasets.labelme_voc(root, "train")) == 4


def test_roboflow_classes_that_differ_between_folders_are_refused(make):
    root = make("roboflow")
    path = root / "valid" / "_classes.csv"
    path.write_text(path.read_text().replace("car", "bus"))
    with pytest.raises(InputError, match=r"valid/_classes\.csv: other classes than in"):
        datasets.roboflow(root, "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("300, bus", r"pixel values \[0, 1, 2, 300\]; masks hold 0 to 255"),
        ("3, car", "class names given more than once: car"),
        ("bus", "not enough values to unpack"),
    ],
)
def test_a_bad_list_of_roboflow_classes_is_refused_by_name(make, line, message):
    root = make("roboflow")
    for path in root.rglob("_classes.csv"):
        path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(InputError, match=rf"_classes\.csv: {message}"):
        datasets.roboflow(root, "train")


def test_a_roboflow_value_that_is_no_class_is_a_finding(make):
    root = make("roboflow")
    mask = datasets.roboflow(root, "val").pairs[0].mask
    make_data.save(np.full((HEIGHT, WIDTH), 7, np.uint8), mask)
    (problem,) = inspect_dataset(datasets.roboflow, root)["problems"]
    assert (problem["file"], problem["pixels"]) == (str(mask), {"7": HEIGHT * WIDTH})


def test_a_roboflow_export_without_valid_is_split(make):
    root = make("roboflow")
    shutil.rmtree(root / "valid")
    parts = [datasets.roboflow(root, split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [2, 1, 1]
    assert parts[2].pairs[0].name.startswith("test/")


# YOLO


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2 0.2", "4 numbers are a box"),
        ("5 0.1 0.1 0.2 0.1 0.2 0.2", r"class 5 is not in the names \[0, 1\]"),
        ("0.5 0.1 0.1 0.2 0.1 0.2 0.2", r"class 0.5 is not in the names"),
        ("0 0.1 0.1 0.2 0.1 0.2", "5 numbers are no pairs"),
        ("0 0.1 zero 0.2 0.1 0.2 0.1", "could not convert string to float: 'zero'"),
    ],
)
def test_a_line_that_is_no_polygon_is_refused_with_file_and_number(make, line, message):
    root = make("yolo")
    text = root / "labels" / "train" / "photo_1.txt"
    text.write_text(f"{text.read_text()}{line}\n")
    with pytest.raises(InputError, match=rf"{text}: object 3: {message}"):
        datasets.yolo(root, "train")


def test_yolo_as_roboflow_and_cvat_write_it(make):
    root = make("yolo")
    expected = {s: every_mask(datasets.yolo(root, s)) for s in ("train", "val")}
    for kind in ("images", "labels"):
        for split, folder in (("train", "train"), ("val", "valid")):
            (root / folder).mkdir(exist_ok=True)
            (root / kind / split).rename(root / folder / kind)
    lines = ["train: ../train/images", "val: ../valid/images", "test: ../test/images", "nc: 2"]
    make_data.write_lines(root / "data.yaml", [*lines, "names: ['car', 'traffic light']"])
    for split, masks in expected.items():
        found = every_mask(datasets.yolo(root, split))
        assert found.keys() == masks.keys()
        assert all((found[name] == masks[name]).all() for name in masks)
    make_data.write_lines(root / "train.txt", [f"train/images/photo_{i}.jpg" for i in range(3)])
    make_data.write_lines(
        root / "data.yaml", ["path: ./", "train: train.txt", "names:", "  0: car", "  1: light"]
    )
    shutil.rmtree(root / "valid")
    (root / "train.txt").rename(root / "lists.txt")  # no list of a split for `folder`'s rule
    text = (root / "data.yaml").read_text().replace("train.txt", "lists.txt")
    (root / "data.yaml").write_text(text)
    assert [len(datasets.yolo(root, split)) for split in ("train", "val")] == [2, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["train: images/train"], "no names"),
        (["names: [car, traffic light]"], "no train and val"),
        (["names: [car, traffic light]", "train: pictures"], "train: pictures does not exist in"),
        (["names: [car", "train: x"], r"data\.yaml: while parsing"),
    ],
)
def test_a_data_yaml_that_says_too_little_is_refused(make, lines, message):
    root = make("yolo")
    make_data.write_lines(root / "data.yaml", lines)
    with pytest.raises(InputError, match=rf"data\.yaml: (.|\n)*{message}|{message}"):
        datasets.yolo(root, "train")


# Label Studio


def test_a_brush_is_decoded_as_label_studio_encoded_it():
    # Written by encode_rle of label_studio_sdk 2.1.2 from these opacities, each four times.
    opacity = [0, 0, 255, 255, 255, 255, 0, 7, 0, 0, 0, 0]
    content = [0, 0, 0, 48, 57, 27, 252, 224, 23, 255, 227, 0, 140, 30, 248, 0]
    assert decode_brush(content, 3, 4).ravel().tolist() == opacity


def test_a_brush_of_colours_that_differ_is_decoded():
    rgba = np.random.default_rng(0).integers(0, 256, (2, 3, 4)).astype(np.uint8)
    bits = f"{rgba.size:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}"
    bits += f"0{2:02b}{rgba.size - 1:08b}" + "".join(f"{v:08b}" for v in rgba.ravel())
    bits += "0" * (-len(bits) % 8)
    content = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    assert (decode_brush(content, 2, 3) == rgba[..., 3]).all()
    with pytest.raises(InputError, match="cut off"):
        decode_brush(content[:-3], 2, 3)
    with pytest.raises(InputError, match="a brush of 6 pixels on an image of 2 x 2"):
        decode_brush(content, 2, 2)


def test_label_studio_rectangles_ellipses_and_brushes(make):
    root = make("label_studio")
    masks = all_masks(datasets.label_studio, root)
    sign = 2  # background, car, sign, traffic light
    one = masks["00000001-photo 1"]
    assert (one[6:16, 49:56] == sign).all()
    assert not (one[2:4, 49:56] == sign).any()
    assert one[43, 13] == sign  # 20 % of 64 and 90 % of 48
    two = masks["00000002-photo 2"]
    assert (two[2:8, 50:60] == sign).all()
    assert (two[:8] == sign).sum() == 60


def test_a_turned_rectangle_turns_clockwise_about_its_corner(make):
    root = make("label_studio")
    value = {"x": 50.0, "y": 25.0, "width": 25.0, "height": 12.5, "rotation": 90}
    turned = make_data.region("rectanglelabels", "car", value)
    edit(
        next(root.glob("*.json")),
        lambda content: content[0]["annotations"][0].update(result=[turned]),
    )
    mask = all_masks(datasets.label_studio, root)["00000000-photo 0"]
    # From (32, 12): 16 pixels down and 6 to the left.
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (12, 28, 26, 32)


@pytest.mark.parametrize(
    ("place", "flags", "number"),
    [
        (1, {}, 2),
        (1, {"ground_truth": True}, 1),
        (0, {"was_cancelled": True}, 1),
        (1, {"updated_at": "2026-01-01"}, 1),
    ],
)
def test_which_annotation_of_an_image_counts(make, place, flags, number):
    root = make("label_studio")
    edit(next(root.glob("*.json")), lambda content: content[0]["annotations"][place].update(flags))
    mask = all_masks(datasets.label_studio, root)["00000000-photo 0"]
    assert mask.any() == (number == 2)  # the first one has no regions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(image_rotation=90), "the image was turned in Label Studio"),
        (lambda r: r["value"].update(polygonlabels=["a", "b"]), "2 labels, it takes one"),
        (lambda r: r.update(type="polygon"), "its label is a tag of its own"),
        (lambda r: r.pop("original_width"), "'original_width' is missing"),
        (lambda r: r.pop("value"), "'value' is missing"),
    ],
)
def test_what_cannot_be_read_of_label_studio_is_said(make, change, message):
    root = make("label_studio")
    path = next(root.glob("*.json"))
    edit(path, lambda content: change(content[1]["annotations"][0]["result"][0]))
    with pytest.raises(InputError, match=rf"{path.name}: task 2: .*{message}"):
        datasets.label_studio(root, "train")


def test_json_min_of_label_studio_is_refused(make):
    root = make("label_studio")
    path = next(root.glob("*.json"))
    path.write_text(json.dumps([{"image": "/data/upload/1/a.jpg", "id": 1, "label": []}]))
    with pytest.raises(InputError, match="hold no annotated tasks of Label Studio"):
        datasets.label_studio(root, "train")


# data=auto


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("coco", "the images, annotations and categories in annotations/instances_train2017.json"),
        ("coco_panoptic", "the segments_info in annotations/panoptic_train2017.json"),
        ("cvat", "labelmap.txt and SegmentationClass"),
        ("folder", "its folders images and masks"),
        ("label_studio", "the tasks with annotations in project-1-at-2025-02-01.json"),
        ("labelme", "the shapes and the imagePath in json/photo_4.json"),
        ("labelme_voc", "class_names.txt and SegmentationClass"),
        ("roboflow", "test/_classes.csv"),
        ("yolo", "the names and splits in data.yaml"),
    ],
)
def test_auto_says_what_it_found_and_why_and_uses_it(make, caplog, name, reason):
    root = make(name)
    with caplog.at_level(logging.INFO, "seg_torch"):
        found = datasets.auto(root, "train")
    assert f"data=auto: {root} is read as data={name}, because of {reason}" in caplog.text
    expected = getattr(datasets, name)(root, "train")
    assert found.pairs == expected.pairs
    assert found.labels == expected.labels


def test_auto_names_the_formats_where_it_finds_none(tmp_path):
    make_data.save(make_data.picture(0), tmp_path / "photo.jpg")
    make_data.write_json(tmp_path / "notes.json", {"hello": 1})
    with pytest.raises(InputError) as error:
        datasets.auto(tmp_path, "train")
    text = str(error.value)
    assert text.startswith(f"data=auto: {tmp_path} holds notes.json, photo.jpg and is in none")
    assert all(f"  {name} " in text for name in [*FORMATS, "folder", "hf"])


# Hugging Face


@pytest.fixture
def table(tmp_path):
    """table(): a folder as `save_to_disk` writes it, with 0 for what is not labelled."""
    hub = pytest.importorskip("datasets")

    def table(column="label", splits=("train", "validation"), names=("unlabeled", "car", "sky")):
        features = hub.Features(
            {"image": hub.Image(), column: hub.Image(), "caption": hub.Value("string")}
        )
        parts = {}
        for start, split in enumerate(splits):
            indices = range(5 * start, 5 * start + 5 - start)
            parts[split] = hub.Dataset.from_dict(
                {
                    "image": [make_data.picture(i) for i in indices],
                    column: [Image.fromarray(make_data.tool_mask(i)) for i in indices],
                    "caption": ["" for _ in indices],
                },
                features=features,
            )
        hub.DatasetDict(parts).save_to_disk(tmp_path / "table")
        ids = {str(i): name for i, name in enumerate(names)}
        make_data.write_json(tmp_path / "table" / "id2label.json", ids)
        return tmp_path / "table"

    return table


@pytest.mark.parametrize("column", ["label", "annotation", "mask"])
def test_tables_of_datasets_are_read(table, column):
    root = table(column)
    for split, start, count in (("train", 0, 5), ("val", 5, 4), ("test", 5, 4)):
        dataset = datasets.hf(str(root), split)
        assert dataset.labels.names == ("unlabeled", "car", "sky")
        assert len(dataset) == count
        image, mask = dataset[1]
        assert (image.permute(1, 2, 0).numpy() == np.asarray(make_data.picture(start + 1))).all()
        assert (mask.numpy() == make_data.tool_mask(start + 1)).all()


def test_an_unlabelled_id_becomes_255_and_the_others_move_down(table):
    dataset = datasets.hf(str(table()), "train", unlabelled=0)
    assert dataset.labels.names == ("car", "sky")
    expected = make_data.tool_mask(0).astype(int) - 1
    assert (dataset.mask(0) == np.where(expected == -1, 255, expected)).all()


def test_one_split_alone_is_split_by_a_hash(table):
    root = table(splits=("train",))
    train, val = (datasets.hf(str(root), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (4, 1)
    images = [{d[i][0].sum().item() for i in range(len(d))} for d in (train, val)]
    assert not images[0] & images[1]


def test_what_a_table_lacks_is_said(table, tmp_path):
    root = table("pixels")
    with pytest.raises(InputError, match=r"the columns image, pixels, caption; it takes one of"):
        datasets.hf(str(root), "train")
    root = table(names=("unlabeled", "car"))
    with pytest.raises(InputError, match=r"train\[0\] label: mask values \[0, 1, 2\]"):
        datasets.hf(str(root), "train").mask(0)
    (root / "id2label.json").write_text('{"0": "car", "300": "sky"}')
    with pytest.raises(InputError, match=r"id2label\.json: 2 ids; masks hold 0 to 255"):
        datasets.hf(str(root), "train")
    (root / "id2label.json").unlink()
    with pytest.raises(
        InputError, match=r"id2label\.json: no such file(.|\n)*data\.dataset\.id2label"
    ):
        datasets.hf(str(root), "train")
    with pytest.raises(InputError, match=r"data\.name=.*nowhere: cannot be loaded"):
        datasets.hf(str(tmp_path / "nowhere"), "train")


def test_a_run_on_a_table_is_evaluated_by_its_name(table, compose, tmp_path):
    folder = tmp_path / "run"
    line = ["data=hf", f"data.name={table()}", "model=unet_random", "data.augment.crop=[32,32]"]
    brief = ["trainer.max_epochs=1", "trainer.accelerator=cpu", "data.num_workers=0"]
    train(compose("train", f"output_dir={folder}", "logger=none", *line, *brief))
    scores = json.loads((folder / "test_metrics.json").read_text())
    assert [*scores["per_class"]] == ["unlabeled", "car", "sky"]
    assert sum(row["pixels"] for row in scores["per_class"].values()) == 4 * HEIGHT * WIDTH
    again = tmp_path / "again"
    evaluate(compose("evaluate", f"checkpoint={folder}", f"output_dir={again}", brief[1]))
    found = json.loads((again / "test_metrics.json").read_text())
    assert found["confusion_matrix"] == scores["confusion_matrix"]
    # A file that somebody sends does not make this machine download what it names.
    (tmp_path / "table").rename(tmp_path / "moved")
    line = [f"checkpoint={folder}", f"output_dir={again}", brief[1]]
    with pytest.raises(InputError, match=rf"to fetch it, give data\.name={tmp_path / 'table'}"):
        evaluate(compose("evaluate", *line))
    evaluate(compose("evaluate", *line, f"data.name={tmp_path / 'moved'}"))


def test_auto_reads_what_save_to_disk_wrote(table):
    root = table()
    assert recognise(root) == (datasets.hf, "dataset_dict.json")
    assert len(datasets.auto(root, "val")) == 4
    assert datasets.auto(root, "val", unlabelled=0).labels.names == ("car", "sky")
    with pytest.raises(InputError, match=r"data\.dataset\.background: data=hf has no such .*seed"):
        datasets.auto(root, "val", background="car")


# Names of splits


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
    ],
)
def test_which_split_a_path_stands_for(path, split):
    assert split_of(path) == split
