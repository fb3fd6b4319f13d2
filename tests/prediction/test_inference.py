"""From images to class ids at the size of the labels: whole, tiled and augmented."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PYTHONPATH
from forked import Forked
from PIL import Image
from torch import Tensor, nn
from torchvision.models.segmentation._utils import _SimpleSegmentationModel

from seg_torch import hardware
from seg_torch import upsample as upsampling
from seg_torch.errors import InputError
from seg_torch.images.resize import resize_image
from seg_torch.models import unet
from seg_torch.models.network import Network
from seg_torch.prediction import inference
from seg_torch.prediction.inference import Inference, InferenceSettings, decide, upsample


class Pointwise(nn.Module):
    """Each pixel's logits depend on that pixel alone: 5 classes."""

    def forward(self, x: Tensor) -> Tensor:
        red, green, blue = x.unbind(1)
        return torch.stack([red, green.square(), 3 * blue - red, red * green, 0.3 - blue], 1)


class Blurred(nn.Module):
    """Each pixel's logits depend on the 21 x 21 pixels around it, as far as there are any."""

    def forward(self, x: Tensor) -> Tensor:
        return Pointwise()(F.avg_pool2d(x, 21, 1, 10, count_include_pad=False))


class Strided(nn.Module):
    """Logits at a quarter of the size, as most networks give them."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": 5 * Pointwise()(F.avg_pool2d(x, 4, 4, ceil_mode=True))}


class LeftRight(nn.Module):
    """Class 1 grows more likely to the right, whatever the image shows."""

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.linspace(-2, 1, x.shape[-1]).expand(x.shape[0], 1, *x.shape[-2:])
        return torch.cat([-ramp, ramp], 1)


def plain(model: nn.Module) -> Network:
    """A network that gives the model values in [0, 1]."""
    return Network(model, mean=(0, 0, 0), std=(1, 1, 1)).eval()


@pytest.fixture(scope="module")
def landscape() -> Tensor:
    """Smooth colours: uint8 [3, 331, 487]."""
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 256, (19, 31, 3), np.uint8))
    large = np.array(small.resize((487, 331), Image.Resampling.BICUBIC))
    return torch.from_numpy(large).permute(2, 0, 1).contiguous()


def tuned(network: Network, num_classes: int, **settings) -> Inference:
    return Inference(network, num_classes, settings=InferenceSettings(**settings))


def assembled(inference: Inference, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """The logits of all blocks, [N, C, H, W]; every pixel has to come exactly once."""
    size = size or images.shape[-2:]
    whole = torch.full((len(images), inference.num_classes, *size), math.nan)
    times = torch.zeros(len(images), *size, dtype=torch.int)
    with torch.no_grad():
        for index, rows, columns, logits in inference.blocks(images, size):
            assert logits.shape == whole[index, :, rows, columns].shape
            whole[index, :, rows, columns] = logits
            times[index, rows, columns] += 1
    assert (times == 1).all()
    return whole


# Upsampling, and what is decided after it


def bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[C, h, w] -> float64 [C, *size]; centres of pixels are at halves, the border is repeated."""

    def weights(old: int, new: int) -> np.ndarray:
        matrix = np.zeros((new, old))
        for i in range(new):
            place = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
            low = math.floor(place)
            matrix[i, low] += 1 - (place - low)
            matrix[i, min(low + 1, old - 1)] += place - low
        return matrix

    rows, columns = weights(values.shape[1], size[0]), weights(values.shape[2], size[1])
    return np.einsum("ih,chw,jw->cij", rows, values.astype(np.float64), columns)


SIZES = [(70, 101), (33, 47), (31, 97), (40, 20), (1, 1)]


@pytest.mark.promise(13)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_d09_logits_are_upsampled_in_float32_whatever_they_come_in(size, dtype):
    logits = (5 * torch.randn(2, 7, 33, 47)).to(dtype)
    found = upsample(logits, size).float()
    expected = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
    assert torch.equal(found, expected)
    for one, values in zip(found.numpy(), logits.float().numpy(), strict=True):
        assert np.abs(one - bilinear(values, size)).max() < 1e-4


@pytest.mark.promise(13)
def test_d09_upsampling_in_bf16_would_decide_otherwise():
    logits = torch.randn(1, 19, 16, 32).bfloat16()
    rounded = F.interpolate(logits, (128, 256), mode="bilinear").argmax(1)
    exact = bilinear(logits[0].float().numpy(), (128, 256)).argmax(0)
    assert (rounded[0].numpy() != exact).mean() > 0.001, "nothing to compare"
    assert (decide(upsample(logits, (128, 256))[0])[0].numpy() != exact).mean() < 1e-4


@pytest.mark.parametrize("size", [(64, 96), (61, 99), (33, 32)])
def test_masks_are_those_of_torchvisions_own_pipeline(landscape, size):
    """Normalised, through backbone and head, upsampled, argmax."""
    torch.manual_seed(0)
    backbone, head = nn.Conv2d(3, 8, 7, stride=8, padding=3), nn.Conv2d(8, 21, 1)

    class WithKey(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": backbone(x)}

    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    image = landscape[:, : size[0], : size[1]]
    normalised = (image / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = _SimpleSegmentationModel(WithKey(), head)(normalised[None])["out"].argmax(1)[0]
    network = Network(nn.Sequential(backbone, head), mean.tolist(), std.tolist())
    logits = assembled(tuned(network, 21, precision="32-true"), image[None])
    assert torch.equal(decide(logits[0])[0].long(), expected)


def reference(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Class ids and softmax by NumPy in float64."""
    values = logits.float().numpy().astype(np.float64)
    exponentials = np.exp(values - values.max(0))
    return values.argmax(0), exponentials / exponentials.sum(0)


@pytest.mark.parametrize("most", [1, 3000, 1 << 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 4, 5), (2, 1, 1), (5, 31, 97), (150, 37, 53), (256, 5, 7)])
def test_the_first_of_the_most_probable_classes_wins(shape, dtype, most, monkeypatch):
    """Logits of few levels, so that ties are the rule; in chunks of rows and at once."""
    monkeypatch.setattr(hardware, "CACHE_VALUES", most)
    torch.manual_seed(0)
    logits = (torch.randn(shape) * 2).round().to(dtype)
    if shape[0] > 2:
        logits[2] = -math.inf  # a class that is never predicted
    expected, softmax = reference(logits)
    probabilities = torch.empty(shape, dtype=torch.float16)
    ids, total = decide(logits, confidence=True, probabilities=probabilities)
    assert ids.dtype == torch.uint8
    assert np.array_equal(ids.numpy(), expected)
    assert total.item() / ids.numel() == pytest.approx(softmax.max(0).mean(), rel=1e-5)
    assert np.abs(probabilities.numpy() - softmax).max() < 5e-4  # float16 has 11 bits
    # Neither does it matter in which order the memory lies, nor what else is asked for.
    strided = logits.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(decide(strided)[0], ids)
    assert decide(logits)[1] == 0


def test_of_a_large_image_rows_are_decided_as_those_of_the_whole(landscape, monkeypatch):
    images = torch.stack([landscape, landscape.flip(1)])
    whole = assembled(Inference(plain(Strided()), 5), images, (403, 501))
    monkeypatch.setattr(upsampling, "WHOLE_IMAGE", 5 * 403 * 501 - 1)
    monkeypatch.setattr(upsampling, "CPU_CHUNK", 5 * 501 * 7)
    engine = Inference(plain(Strided()), 5)
    assert len(list(engine.blocks(images, (403, 501)))) == 2 * 58  # 7 of 403 rows in each
    rows = assembled(engine, images, (403, 501))
    assert (rows.argmax(1) != whole.argmax(1)).float().mean() < 1e-5


# Tiles


EDGES = [(331, 487), (64, 64), (65, 97), (63, 33), (20, 400), (129, 128), (96 * 3 - 7, 64 * 3 - 7)]


@pytest.mark.promise(14)
@pytest.mark.parametrize("tile", [64, 96, 160, 320])
@pytest.mark.parametrize("size", EDGES)
def test_for_a_pointwise_model_tiled_equals_whole_to_the_last_bit(landscape, size, tile):
    images = torch.stack([landscape, landscape.flip(1)])[..., : size[0], : size[1]]
    whole = assembled(tuned(plain(Pointwise()), 5, tile=None), images)
    tiled = assembled(tuned(plain(Pointwise()), 5, tile=tile), images)
    assert torch.equal(tiled, whole)


class Watched(nn.Module):
    """Remembers the shapes that go through a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape))
        return self.model(x)


@pytest.mark.parametrize("tile", [64, 96])
def test_tiles_in_batches_are_those_that_go_through_one_by_one(landscape, tile, monkeypatch):
    images = torch.stack([landscape, landscape.flip(1)])
    single = Watched(Blurred())
    expected = assembled(tuned(plain(single), 5, tile=tile), images)
    monkeypatch.setattr(Inference, "batch_size", lambda self, height, width: 4)
    batched = Watched(Blurred())
    assert torch.equal(
        assembled(tuned(plain(batched), 5, tile=tile), images),
        expected,
    )
    assert {shape[0] for shape in single.seen} == {1}
    assert max(shape[0] for shape in batched.seen) == 4
    assert sum(shape[0] for shape in batched.seen) == len(single.seen)


@pytest.mark.promise(14)
def test_at_seams_tiles_disagree_with_the_whole_in_few_pixels_and_by_little(landscape):
    """The network sees 10 pixels around each; half a tile's 32 pixels of fading see them all."""
    whole, tiled = (
        assembled(tuned(plain(Blurred()), 5, tile=tile), landscape[None]).softmax(1)
        for tile in (None, 128)
    )
    assert (tiled.argmax(1) != whole.argmax(1)).float().mean() < 0.002
    difference = (tiled - whole).abs()
    assert 0 < difference.max() < 0.02
    # Away from the seams there is none.
    assert difference[..., :80, :80].max() == 0


def test_tiles_see_no_less_than_a_tile_and_begin_where_strides_do(landscape):
    watched = Watched(Pointwise())
    assembled(tuned(plain(watched), 5, tile=96), landscape[None])
    for _, _, height, width in watched.seen:
        assert 96 <= height < 96 + 32
        assert 96 <= width < 96 + 32


@pytest.fixture(scope="module")
def trained(landscape) -> tuple[Network, Tensor]:
    """A U-Net that has learnt the classes of a pointwise model, so that its masks mean something.

    Returns:
        The network, and what it was to learn, uint8 [331, 487].
    """
    torch.manual_seed(0)
    target = decide(assembled(Inference(plain(Pointwise()), 5), landscape[None])[0])[0]
    network = Network(unet(5, "resnet18", None, decoder_channels=(64, 32, 32, 16, 16)))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(30):
        corners = [(torch.randint(331 - 96, ()), torch.randint(487 - 96, ())) for _ in range(4)]
        windows = [(..., slice(y, y + 96), slice(x, x + 96)) for y, x in corners]
        logits = network(torch.stack([landscape[window] for window in windows]))["out"]
        labels = torch.stack([target[window] for window in windows])
        optimizer.zero_grad()
        F.cross_entropy(logits, labels.long()).backward()
        optimizer.step()
    return network.eval(), target


def test_tiles_of_a_trained_network_agree_with_the_whole(landscape, trained):
    network, target = trained
    whole, tiled = (
        decide(assembled(tuned(network, 5, tile=tile), landscape[None])[0])[0]
        for tile in (None, 192)
    )
    assert (whole == target).float().mean() > 0.7, "it has not learnt enough to compare"
    assert (whole == tiled).float().mean() > 0.9


def test_in_float32_masks_do_not_depend_on_how_many_images_go_through_together(landscape, trained):
    images = torch.stack([landscape[:, y : y + 160, 3 * y : 3 * y + 200] for y in (0, 30, 60, 90)])
    engine = tuned(trained[0], 5, precision="32-true")
    together = assembled(engine, images)
    for image, logits in zip(images, together, strict=True):
        alone = assembled(engine, image[None])[0]
        assert torch.equal(decide(alone)[0], decide(logits)[0])


# Memory


def memory_of_tiles(folder: Path) -> None:
    """Prints what tiles take at most above what was in use before, in megabytes."""
    hardware.reuse_memory()  # as predict.py does
    network = Network(nn.Conv2d(3, 64, 1))
    inference = tuned(network, 64, tile=128, precision="bf16-mixed")
    images = torch.zeros(1, 3, 128 + 96, 16384, dtype=torch.uint8)
    freed = torch.ones(240 << 18)  # 240 MB, as decoding a file takes them
    above = torch.ones(1 << 18)
    del freed
    status = Path("/proc/self/status")
    used = int(re.findall(r"VmRSS:\s+(\d+)", status.read_text())[0]) // 1024 - 240
    with torch.no_grad():
        for number, block in enumerate(inference.blocks(images, images.shape[-2:])):
            if number == 0:
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            del block
    peak = int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) // 1024
    print("megabytes", peak - used)
    del above


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tiles_take_what_the_edges_between_them_do(tmp_path):
    """64 classes of 32 x 16,384 logits of bfloat16: 64 MB. What reading took was given back."""
    # Not forked: what the allocator has of the other process would count as the tiles' own.
    code = "import pathlib, test_inference; test_inference.memory_of_tiles(pathlib.Path.cwd())"
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    new = [sys.executable, "-c", code]
    output = subprocess.check_output(new, cwd=tmp_path, env=environment, text=True, timeout=300)
    assert int(output.split("megabytes ")[1]) < 110


def test_images_go_through_in_tiles_where_memory_asks_for_them(landscape, monkeypatch):
    """With a memory of 512 MB, four million pixels are too many and a thousand are not."""
    monkeypatch.setattr(hardware, "total_memory", lambda device: 512 << 20)
    watched = Watched(Pointwise())
    assembled(Inference(plain(watched), 5), landscape[None, :, :30, :40])
    assert watched.seen == [(1, 3, 30, 40)]
    watched.seen.clear()
    assembled(Inference(plain(watched), 5), torch.zeros(1, 3, 2000, 2000, dtype=torch.uint8))
    assert len(watched.seen) == 9
    assert max(max(shape) for shape in watched.seen) < 768 + 32


def test_as_many_images_go_through_together_as_memory_holds(landscape, monkeypatch):
    """100 x 100 pixels take 10 MB, of 10 and of 30 for the whole of the images."""
    engine = tuned(plain(Pointwise()), 5, precision="32-true")
    for memory, expected in ((10, 1), (45, 1), (90, 2), (400, 9), (4000, 16)):
        monkeypatch.setattr(hardware, "total_memory", lambda device, m=memory: m * 1000**2)
        with monkeypatch.context() as patch:
            patch.setattr(Inference, "device", torch.device("cuda"))
            assert engine.batch_size(100, 100) == expected
        assert engine.batch_size(100, 100) == 1
    images = landscape[None, :, :100, :100].repeat(5, 1, 1, 1)
    for together, expected in ((1, [1] * 5), (2, [2, 2, 1])):
        monkeypatch.setattr(Inference, "batch_size", lambda *_, n=together: n)
        watched = Watched(Pointwise())
        assembled(Inference(plain(watched), 5), images)
        assert [shape[0] for shape in watched.seen] == expected


def test_with_a_larger_scale_tiles_come_earlier(landscape, monkeypatch):
    """At twice the size an image takes four times the memory: 10 MB fit, 40 do not."""
    monkeypatch.setattr(hardware, "total_memory", lambda device: 4 * 20 * 1000**2)
    monkeypatch.setattr(inference, "DEFAULT_TILE", 64)
    for scale, tiled in ((1.0, False), (2.0, True)):
        watched = Watched(Pointwise())
        engine = tuned(plain(watched), 5, scales=(scale,))
        assembled(engine, landscape[None, :, :100, :100])
        assert (len(watched.seen) > 1) == tiled


EVALUATION = """
import sys
from pathlib import Path
import torch
from omegaconf import OmegaConf
from torchvision import tv_tensors
from seg_torch.data.module import SegmentationDataModule
from seg_torch.prediction.inference import Inference, InferenceSettings
from seg_torch.labels import Labels
from seg_torch.models import unet
from seg_torch.models.network import Network
from seg_torch.distributed import Processes
from seg_torch.evaluation.scorer import Scorer, score
from seg_torch.training.trainer import build_trainer

class Large:
    labels = Labels(tuple(f"class {i}" for i in range(19)))
    def __init__(self, split):
        pass
    def __len__(self):
        return int(sys.argv[4])
    def __getitem__(self, index):
        image = torch.full((3, 1024, 2048), 100 * index, dtype=torch.uint8)
        mask = torch.zeros(1024, 2048, dtype=torch.uint8)
        return tv_tensors.Image(image), tv_tensors.Mask(mask)
    def mask(self, index):
        return self[index][1]

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024

tile, batch_size, folder = int(sys.argv[1]) or None, int(sys.argv[2]), Path(sys.argv[3])
network = Network(unet(19, "resnet18", weights=None))
data = SegmentationDataModule(
    Large, batch_size=8, eval_batch_size=batch_size or None, num_workers=0
)
settings = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": "32-true"}
cfg = OmegaConf.create({"trainer": settings})
trainer = build_trainer(cfg, Processes(cfg.trainer), folder)
settings = InferenceSettings(tile=tile, precision="32-true")
engine = Inference(network, 19, settings=settings)
before = peak()
score(trainer, Scorer(engine, Large.labels), data, folder, "test")
print("took", peak() - before)
"""


def megabytes_of_evaluation(tile: int, batch_size: int, folder: Path, images: int) -> int:
    """The growth of memory while images of 2048 x 1024 are scored; 0 stands for `None`."""
    numbers = (str(tile), str(batch_size), str(folder), str(images))
    (folder / "evaluation.py").write_text(EVALUATION)
    code, output = Forked([folder / "evaluation.py", *numbers], folder).finish()
    assert code == 0, output
    return int(output.split("took ")[1])


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.promise(14)
@needs_linux
def test_d23_in_tiles_evaluation_takes_memory_for_a_tile_not_for_the_image(tmp_path):
    """Logits of 19 classes alone are 159 MB an image; whole, it took 900 MB."""
    assert megabytes_of_evaluation(512, 0, tmp_path, 1) < 500


@needs_linux
@pytest.mark.slow
def test_d23_whole_images_are_evaluated_one_at_a_time(tmp_path):
    one, two = (megabytes_of_evaluation(0, size, tmp_path, 2) for size in (0, 2))
    assert one < 0.8 * two


# Test-time augmentation


def test_flipping_changes_nothing_for_a_pointwise_model(landscape):
    image = landscape[None, :, :100, :151]
    straight, flipped = (
        assembled(tuned(plain(Pointwise()), 5, flip=flip), image).softmax(1)
        for flip in (False, True)
    )
    assert (straight - flipped).abs().max() < 1e-6


def test_flipping_averages_the_probabilities_of_both_views():
    image = torch.zeros(1, 3, 40, 64, dtype=torch.uint8)
    probabilities = LeftRight()(torch.zeros(1, 3, 40, 64)).softmax(1)
    found = assembled(tuned(plain(LeftRight()), 2, flip=True), image).softmax(1)
    assert (found - (probabilities + probabilities.flip(-1)) / 2).abs().max() < 1e-6


def test_with_flipping_a_mirrored_image_gives_the_mirrored_logits(landscape, trained):
    engine = tuned(trained[0], 5, flip=True, tile=192)
    image = landscape[None, :, :160, :160]
    assert torch.equal(assembled(engine, image.flip(-1)).flip(-1), assembled(engine, image))


@pytest.mark.parametrize("model", [Blurred, Strided])
def test_scales_and_flips_average_probabilities_at_the_size_of_the_image(landscape, model):
    """All by plain PyTorch; 0.5 of 331 x 487 is 165.5 x 243.5, rounded to even."""
    size = landscape.shape[-2:]
    views = [
        (resize_image(landscape, [166, 244]), False),
        (landscape, False),
        (resize_image(landscape, [166, 244]).flip(-1), True),
        (landscape.flip(-1), True),
    ]
    total = torch.zeros(1, 5, *size)
    for view, mirrored in views:
        logits = model()(view[None] / 255)
        logits = logits["out"] if isinstance(logits, dict) else logits
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        total += (logits.flip(-1) if mirrored else logits).softmax(1)
    engine = Inference(
        plain(model()),
        5,
        settings=InferenceSettings(scales=(0.5, 1.0), flip=True, precision="32-true"),
    )
    found = assembled(engine, landscape[None]).softmax(1)
    assert (found - total / 4).abs().max() < 1e-5


def test_tiles_take_part_in_augmentation(landscape):
    """Away from the seams, each tile's probabilities are those of the whole image."""
    whole, tiled = (
        assembled(
            tuned(plain(Blurred()), 5, tile=tile, flip=True),
            landscape[None],
        ).softmax(1)
        for tile in (None, 128)
    )
    assert (whole - tiled).abs()[..., :80, :80].max() < 1e-6
    assert (whole.argmax(1) != tiled.argmax(1)).float().mean() < 0.002


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ([1.0], False)),
        ([], ([1.0], False)),
        ("flip", ([1.0], True)),
        (["flip", 0.75, 1], ([0.75, 1.0], True)),
        ("flip, 0.75,1.0", ([0.75, 1.0], True)),
        (1.25, ([1.25], False)),
    ],
)
def test_augmentation_is_read_as_users_write_it(given, expected):
    settings = InferenceSettings.parse("auto", given, 32)
    assert (settings.scales, settings.flip) == expected


@pytest.mark.parametrize("given", ["flop", ["flip", "x"], True, ""])
def test_other_augmentation_is_refused_with_an_example(given):
    with pytest.raises(InputError, match=r"tta=.*expected flip.*such as tta=\[flip"):
        InferenceSettings.parse("auto", given, 32)


# Precision


class Bits(nn.Module):
    """A convolution that needs more than the 8 bits of bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("settings", [{}, {"tile": 64}, {"flip": True, "scales": (0.5, 1)}])
def test_float32_is_float32_inside_a_bf16_autocast(landscape, settings):
    """Validation in float32 of a network that Lightning trains in bfloat16."""
    images = landscape[None, :, :100, :130]
    exact = tuned(plain(Bits()), 5, precision="32-true", **settings)
    expected = assembled(exact, images)
    with torch.autocast("cpu", torch.bfloat16):
        found = assembled(exact, images)
        blocks = list(exact.blocks(images, images.shape[-2:]))
    assert all(block.logits.dtype == torch.float32 for block in blocks)
    assert torch.equal(found, expected)
    rounded = assembled(
        tuned(plain(Bits()), 5, precision="bf16-mixed", **settings),
        images,
    )
    assert (rounded - expected).abs().max() > 1e-4, "nothing to tell them apart by"
    assert (rounded - expected).abs().max() < 0.05


def test_the_fastest_precision_of_the_device_is_the_default(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for supported, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda s=supported: s)
        assert Inference(plain(Bits()), 5).precision == expected


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 100}, "multiple of 32"),
        ({"tile": 32}, "64 or more"),
        ({"tile": "automatic"}, "expected auto"),
        ({"scales": (0.0, 1.0)}, "above 0"),
        ({"scales": ()}, "above 0"),
        ({"precision": "bf17"}, "use one of auto, 32-true, bf16-mixed"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        tuned(plain(Pointwise()), 5, **settings)


def test_a_network_that_sees_one_size_is_never_tiled(landscape, monkeypatch):
    with pytest.raises(InputError, match="nothing to tile"):
        Inference(plain(Pointwise()), 5, (32, 32), InferenceSettings(tile=64))
    monkeypatch.setattr(hardware, "total_memory", lambda device: 1)
    watched = Watched(Pointwise())
    engine = Inference(plain(watched), 5, resize=(100, 100))
    found = assembled(engine, landscape[None, :, :100, :100], (331, 487))
    assert watched.seen == [(1, 3, 100, 100)]
    assert found.shape == (1, 5, 331, 487)
