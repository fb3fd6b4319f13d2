"""Joint transforms: labels are never invented, image and mask never part."""

import itertools

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

from seg_torch.data.transforms import (
    ColourJitter,
    RandomScaleCrop,
    augment,
    colour_matrices,
    leaves_its_input,
)
from seg_torch.errors import InputError
from seg_torch.images.resize import resize_mask

TRANSFORMS = {
    "crop": augment(crop=(40, 56), scale=None, flip=0, jitter=None),
    "enlarge": augment(crop=(40, 56), scale=(2, 2), flip=0, jitter=None),
    "shrink": augment(crop=(90, 120), scale=(0.5, 0.5), flip=0, jitter=None),
    "flip": augment(flip=1, jitter=None),
}


def sample(height: int = 64, width: int = 80) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """An image whose red channel is ten times its mask, so that both can be compared."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(1, 9, (height // 16, width // 16), generator=generator)
    mask = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1).to(torch.uint8)
    return tv_tensors.Image(torch.stack([mask * 10, mask, mask])), tv_tensors.Mask(mask)


@pytest.mark.parametrize("name", ["crop", "enlarge", "shrink", "flip"])
def test_image_and_mask_stay_aligned(name):
    image, mask = sample()
    for seed in range(20):
        torch.manual_seed(seed)
        out_image, out_mask = TRANSFORMS[name](image, mask)
        # Away from the borders of the blocks, which interpolation blurs, red is ten times the id.
        ids = out_mask[None].float()
        highest = torch.nn.functional.max_pool2d(ids, 5, 1, 2)
        lowest = -torch.nn.functional.max_pool2d(-ids, 5, 1, 2)
        inside = ((highest == lowest) & (ids != 255))[0]
        # Nor at the border of the window, where less than a pixel of a block may be left.
        inside[[0, -1]] = inside[:, [0, -1]] = False
        assert inside.sum() > 100
        assert torch.equal(out_image[0][inside], out_mask[inside] * 10)


@pytest.mark.promise(11)
def test_padding_is_ignored_and_the_rest_is_whole():
    image, mask = sample(32, 32)
    out_image, out_mask = RandomScaleCrop((96, 96), scale=None)(image, mask)
    assert (out_mask != 255).sum() == 32 * 32
    assert (out_image[:, out_mask == 255] == torch.tensor([[124], [116], [104]])).all()
    assert torch.equal(out_mask[out_mask != 255].view(32, 32), mask)


def test_scale_reaches_both_ends_of_its_range():
    transform = RandomScaleCrop((100, 100), scale=(0.5, 2.0))
    heights = [transform.make_params([torch.zeros(3, 100, 100)])["h"] for _ in range(300)]
    assert min(heights) < 60
    assert max(heights) > 180


def test_crop_reaches_every_corner():
    transform = RandomScaleCrop((10, 10), scale=None)
    places = [transform.make_params([torch.zeros(3, 12, 12)]) for _ in range(200)]
    assert {(p["top"], p["left"]) for p in places} == {(i, j) for i in range(3) for j in range(3)}


@pytest.mark.promise(11)
def test_mask_resize_takes_the_pixel_under_the_centre():
    mask = torch.arange(6, dtype=torch.uint8).view(1, 6)
    # Centres of two pixels over six lie at 1.5 and 4.5: between pixels 1 and 2, and 4 and 5.
    assert resize_mask(mask, (1, 2)).tolist() == [[1, 4]]
    assert resize_mask(mask, (1, 3)).tolist() == [[1, 3, 5]]
    assert resize_mask(mask[:, :2], (1, 6)).tolist() == [[0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_mask_resize_is_pytorchs_nearest_exact(seed):
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.integers(0, 256, rng.integers(1, 90, 2), np.uint8))
    size = [int(n) for n in rng.integers(1, 90, 2)]
    expected = torch.nn.functional.interpolate(mask[None, None], size, mode="nearest-exact")
    assert torch.equal(resize_mask(mask, size), expected[0, 0])


@pytest.mark.parametrize("seed", range(8))
def test_a_window_is_what_torchvision_pads_cuts_and_resizes(seed):
    image, mask = sample(48, 80)
    beside = tv_tensors.Image(image.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    transform = RandomScaleCrop((40, 56), scale=(0.4, 2.0))
    torch.manual_seed(seed)
    params = transform.make_params([image])
    left, top, right, bottom = params["padding"]
    window = [params[key] for key in ("top", "left", "h", "w")]
    padded = tvf.pad(image, [left, top, right, bottom], fill=[124.0, 116.0, 104.0])
    expected = tvf.resize(tvf.crop(padded, *window), [40, 56], antialias=True)
    for layout in (image, beside):
        assert torch.equal(transform.transform(layout, params), expected)
    padded = tvf.crop(tvf.pad(mask, [left, top, right, bottom], fill=255), *window)
    assert torch.equal(transform.transform(mask, params), resize_mask(padded, (40, 56)))


SYMMETRIES = [
    lambda a, k=k, m=m: np.rot90(np.fliplr(a) if m else a, k) for m in (0, 1) for k in range(4)
]


@pytest.mark.parametrize(
    ("crop", "size", "flip", "expected"),
    [
        ((48, 48), (48, 48), 0.5, range(8)),
        ((48, 48), (48, 48), 0, range(8)),  # instead of it
        ((32, 48), (32, 48), 0.5, (0, 2, 4, 6)),
        (None, (48, 48), 0.5, (0, 2, 4, 6)),  # images may have other shapes
    ],
)
def test_what_is_turned_is_each_symmetry_of_its_shape_equally_often(crop, size, flip, expected):
    image, mask = sample(*size)
    image = tv_tensors.Image(torch.stack([mask * 10, mask, mask + 1]))
    turned = augment(crop, None, flip, None, turn=True)
    before, counts = mask.numpy().copy(), np.zeros(8, int)
    torch.manual_seed(0)
    for _ in range(400):
        out_image, out_mask = turned(image, mask)
        assert out_mask.shape == size
        assert torch.equal(out_image[0], out_mask * 10)
        assert torch.equal(out_image[2], out_mask + 1)
        found = [np.array_equal(s(before), out_mask.numpy()) for s in SYMMETRIES]
        assert sum(found) == 1
        counts += found
    chosen = counts[list(expected)]
    assert chosen.sum() == 400
    share = 400 / len(chosen)
    assert ((chosen - share) ** 2 / share).sum() < 24  # by chance once in a thousand times
    assert np.array_equal(mask.numpy(), before)
    assert leaves_its_input(turned)


def test_jitter_leaves_the_mask_alone():
    image, mask = sample()
    torch.manual_seed(0)
    out_image, out_mask = augment(flip=0, jitter=0.5)(image, mask)
    assert torch.equal(out_mask, mask)
    assert not torch.equal(out_image, image)


def test_jitter_takes_brightness_contrast_and_saturation_apart():
    image, mask = sample()
    grey = tv_tensors.Image(image[:1].expand(3, -1, -1).clone())
    saturated = augment(flip=0, jitter=(0, 0, 0.5), hue=0)(grey, mask)[0].int()
    assert (saturated - grey).abs().max() <= 1  # grey has no saturation to change
    torch.manual_seed(1)
    brightened = augment(flip=0, jitter=(0.5, 0, 0), hue=0)(grey, mask)[0]
    ratios = brightened / grey
    assert abs(ratios.mean() - 1) > 0.1
    assert ratios.std() < 0.05  # one factor for all pixels, but for rounding


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_jitter_without_hue_is_torchvisions_but_for_rounding(order):
    generator = torch.Generator().manual_seed(0)
    # Neither too dark nor too bright, so that torchvision clamps nothing between its steps.
    pixels = torch.randint(90, 150, (3, 20, 30), generator=generator, dtype=torch.uint8)
    factors = (1.15, 0.8, 1.3)
    expected = pixels / 255
    for step in order:
        adjust = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation)[step]
        expected = adjust(expected, factors[step])
    matrices = colour_matrices(*factors, 0.0, order)
    jittered = ColourJitter(0, 0, 0, 0).transform(tv_tensors.Image(pixels), matrices)
    assert (jittered - expected * 255).abs().max() < 0.6


@pytest.mark.promise(25)
@pytest.mark.parametrize("seed", range(5))
def test_jitter_is_exact_so_that_no_number_of_threads_changes_it(seed):
    """As NumPy's integers have it: in float32 every product and every sum is exact."""
    torch.manual_seed(seed)
    image = tv_tensors.Image(torch.randint(0, 256, (3, 90, 70), dtype=torch.uint8))
    jitter = ColourJitter(0.5, 0.5, 0.5, 0.1)
    params = jitter.make_params([])
    pixels = image.flatten(1).numpy().astype(np.int64)
    of_pixel = np.rint(params["of_pixel"].numpy() * 4096)
    offset = np.rint(4096 * (params["of_mean"].numpy() @ pixels.mean(1) + 0.5))
    expected = (of_pixel.astype(np.int64) @ pixels + offset.astype(np.int64)[:, None]) // 4096
    jittered = jitter.transform(image, params)
    assert np.array_equal(jittered.flatten(1).numpy(), expected.clip(0, 255))


@pytest.mark.parametrize(("hue", "brightest"), [(1 / 3, 1), (-1 / 3, 2)])
def test_hue_turns_red_to_green_and_to_blue_and_leaves_grey_alone(hue, brightest):
    image = tv_tensors.Image(
        torch.tensor([[160, 90], [60, 90], [60, 90]], dtype=torch.uint8)[:, None]
    )
    turned = ColourJitter(0, 0, 0, 0.5).transform(
        image, colour_matrices(1, 1, 1, hue, (0, 1, 2, 3))
    )
    assert turned[:, 0, 0].argmax() == brightest
    assert turned[:, 0, 1].tolist() == [90, 90, 90]
    grey = torch.tensor([0.299, 0.587, 0.114])
    assert abs(grey @ turned[:, 0, 0].float() - grey @ image[:, 0, 0].float()) < 1
    back = colour_matrices(1, 1, 1, -hue, (0, 1, 2, 3))["of_pixel"]
    there = colour_matrices(1, 1, 1, hue, (0, 1, 2, 3))["of_pixel"]
    assert torch.allclose(back @ there, torch.eye(3, dtype=torch.float64))


def test_jitter_reaches_both_ends_of_its_range_in_every_order():
    jitter = ColourJitter(0.25, 0, 0, 0)
    factors = [jitter.make_params([])["of_pixel"][0, 0].item() for _ in range(300)]
    assert 0.75 <= min(factors) < 0.77
    assert 1.23 < max(factors) <= 1.25
    image = tv_tensors.Image(
        torch.tensor([[0, 200], [0, 100], [0, 100]], dtype=torch.uint8)[:, None]
    )
    strong = ColourJitter(0.9, 0.9, 0.9, 0.1)
    assert strong(image).unique().numel() > 2  # clamped, not wrapped around


@pytest.mark.parametrize("arguments", [{"jitter": -0.1}, {"hue": 0.6}])
def test_a_jitter_of_another_range_is_refused(arguments):
    with pytest.raises(InputError, match=r"augment\.jitter=.*augment\.hue="):
        augment(**arguments)


@pytest.mark.parametrize("arguments", [{"crop": 32}, {"crop": (32, 32, 3)}, {"crop": (0, 5)}])
def test_a_crop_of_another_form_is_refused(arguments):
    with pytest.raises(InputError, match=r"augment\.crop.*\[height, width\]"):
        augment(**arguments)


def test_flip_mirrors_both():
    image, mask = sample()
    out_image, out_mask = augment(flip=1, jitter=None)(image, mask)
    assert np.array_equal(out_image, np.asarray(image)[..., ::-1])
    assert np.array_equal(out_mask, np.asarray(mask)[..., ::-1])
