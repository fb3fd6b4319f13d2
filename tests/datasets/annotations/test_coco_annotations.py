"""COCO's JSON, and COCO panoptic."""

from __future__ import annotations

import logging
from functools import partial

import make_data
import numpy as np
import pytest
from annotation_copies import (
    HEIGHT,
    WIDTH,
    all_masks,
    edit,
    tiny_copy,
)
from pycocotools import mask as rle
from pycocotools.coco import COCO

from seg_torch import datasets
from seg_torch.data.check import check
from seg_torch.data.inspection import inspect_data, inspect_dataset
from seg_torch.data.module import SegmentationDataModule
from seg_torch.drawing.regions import coco_annotations, write_coco
from seg_torch.errors import InputError
from seg_torch.labels import Labels

pytestmark = pytest.mark.usefixtures("new_cache_folder")


@pytest.fixture
def make(tmp_path):
    """make(name): a folder with the tiny copy of a format, to be broken by the test."""
    return partial(tiny_copy, tmp_path)


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
        (
            lambda c: c["images"][0].update(width="wide"),
            "image 100: its width is 'wide', which is no number",
        ),
        (lambda c: c["annotations"].append("nothing"), "annotations: 'nothing' is no object"),
        (lambda c: c["categories"][0].update(id=3), "the id 3 is that of traffic light and car"),
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


def box(x: float, y: float, side: float = 10) -> list[list[float]]:
    """A square as COCO has a segmentation."""
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def content_of(images: list[dict], objects: list[dict], categories: dict[int, str]) -> dict:
    """A COCO dataset; of images and objects what is not given is made up."""
    sizes = {"width": WIDTH, "height": HEIGHT}
    return {
        "images": [sizes | image for image in images],
        "annotations": [{"id": i + 1} | each for i, each in enumerate(objects)],
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
    }


def write_coco_files(root, names=("a.jpg", "b.jpg", "c.jpg"), **files: dict) -> None:
    """Images, and a JSON file of each content."""
    for i, name in enumerate(names):
        make_data.save(make_data.picture(i), root / "images" / name)
    for name, content in files.items():
        make_data.write_json(root / f"{name}.json", content)


@pytest.mark.parametrize("ids", [{"car": 1, "tree": 2}, {"car": 1, "tree": 1}])
def test_e06_a_file_for_each_class_over_the_same_images_is_united(tmp_path, ids):
    images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("abc")]
    places = {"car": (2, 2), "tree": (30, 20)}
    contents = {
        name: content_of(
            images,
            [
                {"image_id": i, "category_id": ids[name], "segmentation": box(*places[name])}
                for i in range(3)
            ],
            {ids[name]: name},
        )
        for name in places
    }
    write_coco_files(tmp_path, **contents)
    masks = all_masks(datasets.coco, tmp_path)
    assert datasets.coco(tmp_path, "val").labels.names == ("background", "car", "tree")
    assert sorted(masks) == ["a", "b", "c"]
    for mask in masks.values():
        assert (mask[4, 4], mask[24, 34]) == (1, 2)


def test_e06_an_image_in_a_file_of_all_and_in_one_of_a_split_belongs_to_the_split(tmp_path):
    images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("abc")]
    objects = [{"image_id": i, "category_id": 1, "segmentation": box(2, 2)} for i in range(3)]
    write_coco_files(
        tmp_path,
        all=content_of(images, objects, {1: "car"}),
        val=content_of(images[2:], objects[2:], {1: "car"}),
    )
    names = {s: [p.name for p in datasets.coco(tmp_path, s).pairs] for s in ("train", "val")}
    assert names == {"train": ["images/a", "images/b"], "val": ["images/c"]}


def test_e06_two_images_with_one_id_are_refused(tmp_path):
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}]
    objects = [{"image_id": 1, "category_id": 1, "segmentation": box(2, 2)}]
    write_coco_files(tmp_path, instances=content_of(images, objects, {1: "car"}))
    with pytest.raises(
        InputError, match=r"instances\.json: images: the id 1 is that of a\.jpg and b"
    ):
        datasets.coco(tmp_path, "train")


def test_e06_images_that_differ_in_their_suffix_alone_are_all_read(tmp_path):
    names = ("0.jpg", "0.png", "1.jpg", "1.png")
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    objects = [
        {"image_id": i, "category_id": 1, "segmentation": box(4 + 10 * i, 4, 8)} for i in range(4)
    ]
    write_coco_files(tmp_path, names, instances=content_of(images, objects, {1: "car"}))
    pairs = [*datasets.coco(tmp_path, "train").pairs, *datasets.coco(tmp_path, "val").pairs]
    assert sorted(pair.name for pair in pairs) == [f"images/{name}" for name in names]
    masks = all_masks(datasets.coco, tmp_path)
    for i, name in enumerate(names):
        assert masks[name][8, 8 + 10 * i] == 1
    make_data.write_lines(tmp_path / "train.txt", ["images/0.jpg", "images/1.png"])
    make_data.write_lines(tmp_path / "val.txt", ["images/0.png"])
    assert [p.image.name for p in datasets.coco(tmp_path, "train").pairs] == ["0.jpg", "1.png"]


def test_e07_only_test_images_are_not_trained_on(tmp_path):
    images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("abc")]
    write_coco_files(tmp_path, test=content_of(images, [], {1: "car"}))
    assert len(datasets.coco(tmp_path, "test")) == 3
    with pytest.raises(InputError, match="only test images"):
        datasets.coco(tmp_path, "train")


def test_folders_of_the_images_make_the_split_where_the_file_does_not(tmp_path):
    names = ("train/a.jpg", "train/b.jpg", "valid/c.jpg")
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    write_coco_files(tmp_path, names, annotations=content_of(images, [], {1: "car"}))
    found = {s: [p.image.stem for p in datasets.coco(tmp_path, s).pairs] for s in ("train", "val")}
    assert found == {"train": ["a", "b"], "val": ["c"]}


def test_e16_a_corrected_panoptic_file_is_checked_anew(make):
    root = make("coco_panoptic")
    before = check(datasets.coco_panoptic(root, "train"))
    path = root / "annotations" / "panoptic_train2017.json"

    def all_cars(content):
        for annotation in content["annotations"]:
            for info in annotation["segments_info"]:
                info["category_id"] = 3

    edit(path, all_cars)
    dataset = datasets.coco_panoptic(root, "train")
    after = check(dataset)
    counts = sum(np.bincount(dataset.mask(i).ravel(), minlength=256) for i in range(len(dataset)))
    assert before.pixels[1] > 0
    assert (after.pixels == counts).all()


@pytest.mark.parametrize("far", [1e9, -1e9, 1e300])
def test_e32_a_polygon_far_outside_without_area_is_a_finding(make, far):
    root = make("coco")
    path = root / "annotations" / "instances_train2017.json"

    def change(content):
        del content["annotations"][1]["area"]
        content["annotations"][1]["segmentation"] = [[1, 1, 9, 1, far, far]]

    edit(path, change)
    problems = inspect_dataset(datasets.coco, root)["problems"]
    assert [problem["file"] for problem in problems] == [str(path)]
    assert "annotation 2: the point" in problems[0]["message"]
    assert "is outside of the image of 64 x 48 pixels" in problems[0]["message"]


@pytest.mark.parametrize("used", [True, False])
def test_e75_a_category_that_is_its_own_supercategory_is_a_class_with_and_without_objects(
    tmp_path, used
):
    images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("abc")]
    objects = [{"image_id": 0, "category_id": 1 + used, "segmentation": box(2, 2)}]
    content = content_of(images, objects, {1: "car", 2: "tree", 3: "plant"})
    for category, group in zip(content["categories"], ("car", "plant", "plant"), strict=True):
        category["supercategory"] = group
    write_coco_files(tmp_path, instances=content)
    names = datasets.coco(tmp_path, "train").labels.names
    assert names == ("background", "car", "tree", "plant")


E81 = [
    ({"segmentation": 7}, "annotation 1: its segmentation is 7; polygons are expected"),
    ({"segmentation": "a"}, 'annotation 1: its segmentation is "a"; polygons are expected'),
    ({"segmentation": [[1, 1, 9, 9]]}, "annotation 1: 2 points, but it takes at least 3"),
    ({"segmentation": [[]]}, "annotation 1: 0 points, but it takes at least 3"),
    ({"segmentation": [[[1, 1, 9]]]}, r"annotation 1: .*not pairs of x and y: \[\[1, 1, 9\]\]"),
    (
        {"segmentation": {"size": [48, 64]}},
        r'annotation 1: its segmentation is {"size": \[48, 64\]}',
    ),
    (
        {"segmentation": {"size": [48, 64], "counts": [-9, 3081]}},
        "annotation 1: its segmentation is",
    ),
    ({"category_id": "car"}, "annotation 1: the id 'car' is no whole number"),
    ({"image_id": "x"}, "annotation 1: image x is not in the images"),
    ({"area": "big"}, "annotation 1: its area is 'big', which is no number"),
    ({"iscrowd": "no"}, "annotation 1: its iscrowd is 'no', which is no number"),
]


@pytest.mark.parametrize(("change", "message"), E81)
@pytest.mark.parametrize("area", [True, False])
def test_e81_an_odd_annotation_is_named_with_what_is_there(tmp_path, change, message, area):
    images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("abc")]
    objects = [{"image_id": i, "category_id": 1, "segmentation": box(2, 2)} for i in range(3)]
    objects[0] |= ({"area": 100.0} if area else {}) | change
    write_coco_files(tmp_path, instances=content_of(images, objects, {1: "car"}))
    (problem,) = inspect_dataset(datasets.coco, tmp_path)["problems"]
    with pytest.raises(InputError, match=rf"instances\.json: .*{message}"):
        raise InputError(problem["message"])


def test_e81_ids_as_texts_and_a_polygon_without_the_outer_list_can_only_mean_one_thing(tmp_path):
    images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("abc")]
    objects = [
        {"image_id": str(i), "category_id": "1", "segmentation": box(2, 2)[0]} for i in range(3)
    ]
    content = content_of(images, objects, {1: "car"})
    content["categories"][0]["id"] = "1"
    write_coco_files(tmp_path, instances=content)
    masks = all_masks(datasets.coco, tmp_path)
    assert all(mask[5, 5] == 1 and not mask[20:].any() for mask in masks.values())


def test_e78_coco_of_label_studio_with_a_task_that_nobody_annotated(tmp_path):
    # As label_studio_sdk 2.1.2 writes it.
    images = [
        {"width": WIDTH, "height": HEIGHT, "id": 0, "file_name": "images/a.jpg"},
        {"width": None, "height": None, "id": 1, "file_name": "images\\b.jpg"},
        {"width": None, "height": None, "id": 2, "file_name": "/data/upload/1/c.jpg"},
    ]
    objects = [
        {
            **{"id": 0, "image_id": 0, "category_id": 0, "segmentation": box(6.4, 4.8)},
            **{"bbox": [6.4, 4.8, 10, 10], "ignore": 0, "iscrowd": 0, "area": 100.0},
        }
    ]
    write_coco_files(tmp_path, result=content_of(images, objects, {0: "car", 1: "light"}))
    masks = all_masks(datasets.coco, tmp_path)
    assert masks["a"][8, 8] == 1
    assert not masks["b"].any()
    assert not masks["c"].any()


def panoptic_files(root, places: dict[str, str], categories: dict[int, str]) -> dict:
    """PNG maps of a car above a tree, and what a panoptic JSON says of them.

    `places` are the paths of the maps by the names of their images.
    """
    for png in places.values():
        segments = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        segments[:20] = (1, 1, 0)  # 257
        segments[20:40] = (2, 0, 0)
        make_data.save(segments, root / png)

    def infos():
        rest = {"iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1]}
        return [{"id": 257, "category_id": 1, **rest}, {"id": 2, "category_id": 2, **rest}]

    return {
        **content_of(
            [{"id": name.split(".")[0], "file_name": name} for name in places], [], categories
        ),
        "annotations": [
            {
                "image_id": name.split(".")[0],
                "file_name": png.split("/")[-1],
                "segments_info": infos(),
            }
            for name, png in places.items()
        ],
    }


def test_e78_panoptic_of_datumaro_whose_images_are_png_too(tmp_path):
    # As datumaro 1.13 writes it; an image without segments is not annotated.
    for split, names in (("train", "abc"), ("val", "d")):
        for i, name in enumerate(names):
            make_data.save(make_data.picture(i), tmp_path / "images" / split / f"{name}.png")
        places = {
            f"{name}.png": f"annotations/panoptic_{split}/{name}.png"
            for name in names
            if name != "c"
        }
        content = panoptic_files(tmp_path, places, {1: "car", 2: "tree"})
        if split == "train":
            content["images"].append({"id": "c", "file_name": "c.png", "width": 64, "height": 48})
        make_data.write_json(tmp_path / "annotations" / f"panoptic_{split}.json", content)
    train, val = (datasets.coco_panoptic(tmp_path, split) for split in ("train", "val"))
    assert train.labels.names == ("car", "tree")
    assert [pair.image.parent.name for pair in train.pairs] == ["train", "train"]
    for dataset in (train, val):
        assert (dataset.mask(0)[[5, 25, 45], 3] == [0, 1, 255]).all()


def test_e78_mapillary_vistas_has_its_maps_beside_the_json(tmp_path):
    for split, names in (("training", "ab"), ("validation", "c")):
        for kind in ("labels", "instances"):  # PNG files of the same names
            for name in names:
                png = tmp_path / split / "v2.0" / kind / f"{name}.png"
                make_data.save(np.zeros((HEIGHT, WIDTH), np.uint8), png)
        for i, name in enumerate(names):
            make_data.save(make_data.picture(i), tmp_path / split / "images" / f"{name}.jpg")
        places = {f"{name}.jpg": f"{split}/v2.0/panoptic/{name}.png" for name in names}
        content = panoptic_files(tmp_path, places, {1: "car", 2: "tree"})
        content["annotations"][0]["segments_info"][1]["category_id"] = 0  # no class
        make_data.write_json(tmp_path / split / "v2.0" / "panoptic" / "panoptic_2020.json", content)
    train, val = (datasets.coco_panoptic(tmp_path, split) for split in ("train", "val"))
    assert [pair.name for pair in train.pairs] == ["training/images/a", "training/images/b"]
    assert [pair.name for pair in val.pairs] == ["validation/images/c"]
    assert (train.mask(0)[[5, 25, 45], 3] == [0, 255, 255]).all()
    assert (train.mask(1)[[5, 25, 45], 3] == [0, 1, 255]).all()


def test_e06_two_panoptic_files_of_one_image_are_refused(tmp_path):
    make_data.save(make_data.picture(0), tmp_path / "images" / "a.jpg")
    for version in ("v1.2", "v2.0"):
        place = {"a.jpg": f"{version}/panoptic/a.png"}
        content = panoptic_files(tmp_path, place, {1: "car", 2: "tree"})
        make_data.write_json(tmp_path / version / "panoptic" / "panoptic_all.json", content)
    with pytest.raises(InputError, match=r"a\.jpg is annotated in .*v1\.2/panoptic/a\.png, too"):
        datasets.coco_panoptic(tmp_path, "train")


def test_e70_what_a_coco_folder_holds_and_is_not_read_is_counted(make, caplog):
    root = make("coco")
    make_data.save(make_data.picture(0), root / "test2017" / "more.jpg")
    with caplog.at_level(logging.INFO, "seg_torch"):
        datasets.coco(root, "train")
    assert "left out: 1 images without annotation (test2017/more.jpg)" in caplog.text
    assert "not read are annotations/captions_train2017.json" in caplog.text


def test_objects_of_the_first_class_alone_are_no_white_masks(make):
    root = make("coco")

    def only_cars(content):
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 3]

    for path in (root / "annotations").glob("instances_*.json"):
        edit(path, only_cars)
    dataset = partial(datasets.coco, background=None)
    assert dataset(root, "train").labels.names == ("car", "traffic light")
    assert not inspect_data(SegmentationDataModule(dataset, str(root)))["problems"]


def test_e74_the_task_of_the_other_format_is_named(make):
    root = make("coco_panoptic")
    with pytest.raises(InputError, match="it has segments_info, so this is data=coco_panoptic"):
        datasets.coco(root, "train")
    root = make("coco")
    for path in (root / "annotations").glob("panoptic_*.json"):
        path.unlink()
    with pytest.raises(InputError, match="it has no segments_info, so this may be data=coco"):
        datasets.coco_panoptic(root, "train")
