import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from seg_torch import labels
from seg_torch.errors import InputError
from seg_torch.labels import IGNORE_INDEX, VOC_PALETTE, Labels, decode_segmap, encode_segmap

# The table printed in the VOC 2012 development kit's documentation.
PUBLISHED_VOC_COLOURS = [
    (0, 0, 0),
    (128, 0, 0),
    (0, 128, 0),
    (128, 128, 0),
    (0, 0, 128),
    (128, 0, 128),
    (0, 128, 128),
    (128, 128, 128),
    (64, 0, 0),
    (192, 0, 0),
    (64, 128, 0),
    (192, 128, 0),
    (64, 0, 128),
    (192, 0, 128),
    (64, 128, 128),
    (192, 128, 128),
    (0, 64, 0),
    (128, 64, 0),
    (0, 192, 0),
    (128, 192, 0),
    (0, 64, 128),
]
THREE = Labels(("sky", "road", "car"), np.array([(10, 20, 30), (0, 0, 0), (255, 0, 1)]))

NUMPY_TYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
TORCH_TYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def test_the_default_palette_starts_with_the_published_voc_colours():
    assert VOC_PALETTE[:21].tolist() == [list(colour) for colour in PUBLISHED_VOC_COLOURS]


@pytest.mark.parametrize(
    ("class_id", "colour"),
    [
        (21, (128, 64, 128)),  # 0b010101: red 1 then 0, green 0 then 1, blue 1 then 0
        (63, (192, 192, 192)),  # all six low bits: two bits for each channel
        (64, (32, 0, 0)),  # bit 6 is the third bit of red
        (255, (224, 224, 192)),  # eight bits: three for red and green, two for blue
    ],
)
def test_the_palette_deals_the_bits_of_the_id_to_the_channels(class_id, colour):
    assert tuple(VOC_PALETTE[class_id]) == colour


def test_all_256_colours_differ():
    assert len({tuple(colour) for colour in VOC_PALETTE}) == 256


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
def test_any_numpy_integer_is_decoded_and_encoded_back(dtype):
    mask = np.arange(21).reshape(3, 7).astype(dtype)
    colours = decode_segmap(mask)
    assert colours.dtype == np.uint8
    assert colours.tolist() == np.array(PUBLISHED_VOC_COLOURS).reshape(3, 7, 3).tolist()
    assert encode_segmap(colours).tolist() == mask.tolist()


@pytest.mark.parametrize("dtype", TORCH_TYPES)
def test_any_torch_integer_is_decoded_and_encoded_back(dtype):
    mask = torch.arange(21).reshape(3, 7).to(dtype)
    colours = decode_segmap(mask)
    assert colours.tolist() == np.array(PUBLISHED_VOC_COLOURS).reshape(3, 7, 3).tolist()
    assert encode_segmap(torch.from_numpy(colours)).tolist() == mask.tolist()


def test_decoding_equals_the_loop_over_classes():
    mask = np.random.default_rng(0).integers(0, 3, (2, 9, 11))
    expected = np.zeros((2, 9, 11, 3), np.uint8)
    for class_id, colour in enumerate([(10, 20, 30), (0, 0, 0), (255, 0, 1)]):
        expected[mask == class_id] = colour
    assert (decode_segmap(mask, THREE) == expected).all()


def test_a_batch_gives_the_same_as_its_masks_one_by_one():
    batch = np.random.default_rng(0).integers(0, 21, (3, 5, 7), np.uint8)
    one_by_one = np.stack([decode_segmap(mask) for mask in batch])
    assert (decode_segmap(batch) == one_by_one).all()
    assert (encode_segmap(one_by_one) == batch).all()


def test_a_mask_that_is_not_contiguous_is_decoded_as_it_is_seen():
    mask = np.arange(6, dtype=np.uint8).reshape(2, 3).T
    expected = [[list(PUBLISHED_VOC_COLOURS[i]) for i in row] for row in ([0, 3], [1, 4], [2, 5])]
    assert decode_segmap(mask).tolist() == expected


def test_ignored_pixels_are_cream_and_come_back_as_255():
    colours = decode_segmap(np.array([[0, 255]], np.uint8), THREE)
    assert colours.tolist() == [[[10, 20, 30], [224, 224, 192]]]
    assert encode_segmap(colours, THREE).tolist() == [[0, 255]]


@pytest.mark.parametrize("value", [3, -1, 254, 256, 1000])
def test_an_id_without_a_colour_is_refused_by_name(value):
    with pytest.raises(InputError, match=rf"holds ids \[{value}\].*0 to 2"):
        decode_segmap(np.array([[0, value]]), THREE)


def test_floats_are_no_class_ids():
    with pytest.raises(InputError, match=r"integers.*float32"):
        decode_segmap(np.zeros((2, 2), np.float32))


def test_a_colour_without_a_class_is_named_with_its_place_and_count():
    rgb = decode_segmap(np.zeros((4, 4), np.uint8), THREE)
    rgb[2, 1:3] = (1, 2, 3)
    with pytest.raises(InputError, match=r"\(1, 2, 3\) at position \(2, 1\).*2 pixels"):
        encode_segmap(rgb, THREE)


def test_one_colour_for_two_classes_cannot_be_encoded():
    with pytest.raises(InputError, match=r"\(5, 5, 5\) to two classes"):
        encode_segmap(np.zeros((1, 1, 3), np.uint8), np.array([(5, 5, 5), (5, 5, 5)]))


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.uint8), np.zeros((2, 2, 3), np.float32)])
def test_encoding_takes_8_bit_rgb_only(array):
    with pytest.raises(InputError, match="expected uint8"):
        encode_segmap(array)


def test_labels_survive_the_way_through_plain_data():
    assert set(THREE.to_dict()) == {"names", "palette"}
    # Checkpoints of earlier versions say which id is ignored, too.
    copy = Labels.from_dict({**THREE.to_dict(), "ignore_index": 254})
    assert copy == THREE
    assert copy.palette.tolist() == [[10, 20, 30], [0, 0, 0], [255, 0, 1]]
    assert len(copy) == 3


def test_d13_the_ignored_id_is_a_constant_not_a_setting():
    assert IGNORE_INDEX == 255
    with pytest.raises(TypeError, match="ignore_index"):
        Labels(("sky",), ignore_index=254)


def test_d29_labels_are_imported_without_torch():
    # A bare package in place of the real one, whose __init__ may import more.
    code = (
        "import sys, types; package = types.ModuleType('seg_torch'); sys.modules['seg_torch'] = "
        f"package; package.__path__ = [{str(Path(labels.__file__).parent)!r}]; "
        "import seg_torch.labels; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("names", "palette", "message"),
    [
        ((), None, "0 class names"),
        (("a", "b", "a"), None, "more than once: a"),
        (tuple(map(str, range(256))), None, "256 class names"),
        (("a", "b"), np.zeros((3, 3)), "palette has shape"),
        (("a",), np.array([(0, 0, 256)]), "values 0 to 256"),
    ],
)
def test_impossible_labels_are_refused(names, palette, message):
    with pytest.raises(InputError, match=message):
        Labels(names, palette)
