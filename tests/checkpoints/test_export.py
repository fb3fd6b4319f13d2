"""Export: one file from images to class ids, compared with the network that it came from."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_command
from models_for_tests import EXTRAS, MASK_MODELS, MODELS
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from seg_torch import Labels, Segmenter
from seg_torch.checkpoints import checkpoint, exported
from seg_torch.checkpoints.comparison import compare
from seg_torch.checkpoints.exported import Graph, load_network, open_exported, write
from seg_torch.datasets import shapes
from seg_torch.datasets.shapes import SHAPES_LABELS
from seg_torch.errors import InputError
from seg_torch.images.resize import Resize
from seg_torch.models.network import Network

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
DATA = {
    "_target_": "seg_torch.data.SegmentationDataModule",
    "dataset": {
        "_target_": "seg_torch.datasets.shapes",
        "_partial_": True,
        **{"size": 96, "train": 3, "val": 5, "test": 3},
    },
    "num_workers": 0,
}


class Tiny(nn.Module):
    """Logits at a quarter of the size."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 5, stride=4, padding=2)
        self.classifier = nn.Conv2d(8, num_classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.convolution(x).relu())


def saved(folder: Path, resize: Resize = None) -> Path:
    """A checkpoint of `Tiny`."""
    torch.manual_seed(0)
    network = Network(Tiny(len(SHAPES_LABELS)), MEAN, STD)
    model = {"_target_": f"{__name__}.Tiny"}
    about = checkpoint.describe(network, SHAPES_LABELS, model, DATA, resize)
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, checkpoint.KEY: about}, folder / "a.ckpt")
    return folder / "a.ckpt"


def reference(path: Path, images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Class ids and probabilities, from the weights alone."""
    state = torch.load(path)["state_dict"]
    model = Tiny(len(SHAPES_LABELS))
    model.load_state_dict(
        {k.removeprefix("network.model."): v for k, v in state.items() if "model" in k}
    )
    x = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        logits = F.interpolate(model(x), size, mode="bilinear", align_corners=False)
    return logits.argmax(1), logits.softmax(1)


def jaccard(masks: Tensor, classes: Tensor) -> float:
    """The mean over the classes that occur."""
    return jaccard_score(masks.numpy(), classes.numpy(), average="macro", zero_division=0)


def random_images(*shape: int) -> Tensor:
    """Smooth, so that masks have regions."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(*shape[:2], 9, 9, generator=generator)
    return (255 * F.interpolate(coarse, shape[2:], mode="bicubic").clamp(0, 1)).to(torch.uint8)


def exported_to(folder: Path, format: str, *settings: str) -> Path:
    path = folder / f"b{exported.FORMATS[format].suffix}"
    line = f"export checkpoint=a.ckpt format={format} output={path.name} trust=[{__name__}]"
    assert run_command(" ".join([line, *settings]), folder) == 0
    assert path.is_file()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and what it is as ONNX, with probabilities."""
    folder = tmp_path_factory.mktemp("export")
    saved(folder)
    exported_to(folder, "onnx", "probabilities=true")
    return folder


def check_outputs(folder: Path, path: Path) -> None:
    """The outputs are those of the weights, for any number and size of images."""
    run, _ = open_exported(path)
    for shape in ((1, 3, 33, 47), (3, 3, 128, 100)):
        images = random_images(*shape)
        classes, probabilities = reference(folder / "a.ckpt", images, shape[2:])
        found, logits = run(images, ["classes", "logits"])
        assert found.dtype == torch.uint8
        assert found.shape == classes.shape
        assert len(classes.unique()) > 2
        assert (found == classes).double().mean() > 0.999
        enlarged = F.interpolate(logits, shape[2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(enlarged.softmax(1), probabilities, rtol=0, atol=1e-5)


def test_an_onnx_file_gives_the_ids_and_probabilities_of_its_network(folder):
    check_outputs(folder, folder / "b.onnx")
    images = random_images(2, 3, 50, 40)
    session = onnxruntime.InferenceSession(folder / "b.onnx")
    (found,) = session.run(["probabilities"], {"images": images.numpy()})
    _, expected = reference(folder / "a.ckpt", images, (50, 40))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def openvino_file(folder: Path) -> Path:
    pytest.importorskip("openvino")
    return exported_to(folder, "openvino")


def test_an_openvino_file_gives_the_ids_of_its_network(folder, openvino_file):
    check_outputs(folder, openvino_file)


def runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """As a program would run it that has neither torch nor seg_torch."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        return lambda images: session.run(["classes"], {"images": images})[0]
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(openvino.Core().read_model(path), "CPU", settings)
    return lambda images: compiled(images)["classes"].copy()


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_e62_whatever_the_docs_promise_of_sizes_and_arrays_holds(folder, format, request):
    path = folder / "b.onnx" if format == "onnx" else request.getfixturevalue("openvino_file")
    run = runner(path)
    for shape in ((1, 3, 32, 32), (5, 3, 32, 32), (2, 3, 32, 133), (1, 3, 95, 33)):
        images = random_images(*shape)
        classes, _ = reference(folder / "a.ckpt", images, shape[2:])
        assert len(classes.unique()) > 2
        assert (run(images.numpy()) == classes.numpy()).mean() > 0.999, shape
    images = random_images(2, 3, 60, 44)
    expected = reference(folder / "a.ckpt", images, (60, 44))[0].numpy()
    plain = images.numpy()
    padded = np.pad(plain, ((0, 0), (0, 0), (3, 5), (7, 9)))
    views = {
        "transposed": np.ascontiguousarray(plain.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        "a crop": padded[:, :, 3:-5, 7:-9],
        "mirrored": np.ascontiguousarray(plain[..., ::-1])[..., ::-1],
        "channels last": images.contiguous(memory_format=torch.channels_last).numpy(),
    }
    for name, view in views.items():
        assert np.array_equal(view, plain)
        assert not view.flags.c_contiguous
        assert (run(view) == expected).mean() > 0.999, name
    if format == "onnx":
        with pytest.raises(Exception, match="Unexpected input data type"):
            run(plain.astype(np.float32))
    else:
        assert (run(plain.astype(np.float32)) == expected).mean() > 0.999


def test_e62_the_documented_sizes_are_those_that_are_compared(capsys):
    docs = " ".join((ROOT / "docs/export.md").read_text(encoding="utf-8").split())
    (sentence,) = re.findall(r"compared with the network on (.*?)\.", docs)
    graph = Graph(Network(Tiny(3), MEAN, STD).eval(), None)
    shapes = []

    def run(images: Tensor, outputs: list[str]) -> tuple[Tensor, ...]:
        shapes.append(tuple(images.shape))
        return graph(images)

    assert compare(graph, run) == 1
    sizes = list(dict.fromkeys(shapes))
    assert sizes[0] == (2, 3, 32, 32), "the smallest size, and several images"
    assert [f"{height} x {width}" for _, _, height, width in sizes] == re.findall(
        r"\d+ x \d+", sentence
    )
    assert "2 x 32 x 32" in capsys.readouterr().out


def test_e58_an_export_does_not_replace_its_checkpoint(folder, capsys):
    """OpenVINO's second file has the suffix of many a checkpoint."""
    pytest.importorskip("openvino")
    shutil.copy(folder / "a.ckpt", folder / "model.bin")
    before = (folder / "model.bin").read_bytes()
    (folder / "same.bin").symlink_to("model.bin")
    for name in ("model", "same"):
        line = f"export checkpoint=model.bin format=openvino output={name}.xml trust=[{__name__}]"
        assert run_command(line, folder) == 2
        assert (
            f"output={name}.xml: would replace the checkpoint model.bin" in capsys.readouterr().err
        )
    assert (folder / "model.bin").read_bytes() == before
    assert not (folder / "model.xml").exists()


def test_e44_packages_are_looked_for_before_the_checkpoint_is_opened(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    line = "export checkpoint=b.onnx format=openvino int8=true"
    assert run_command(line, folder) == 2
    assert "format=openvino needs nncf: pip install" in capsys.readouterr().err


def test_a_file_says_what_it_is(folder):
    model = onnxruntime.InferenceSession(folder / "b.onnx")
    about = json.loads(model.get_modelmeta().custom_metadata_map["seg_torch"])
    assert about["labels"] == SHAPES_LABELS.to_dict()
    assert about["preprocessing"]["mean"] == pytest.approx(MEAN)
    assert about["preprocessing"]["std"] == pytest.approx(STD)
    assert about["preprocessing"]["resize"] is None
    assert about["versions"]["torch"] == version("torch")
    assert about["versions"]["onnx"] == version("onnx")
    (image,) = model.get_inputs()
    assert (image.name, image.type) == ("images", "tensor(uint8)")
    assert image.shape[1] == 3
    assert all(isinstance(image.shape[axis], str) for axis in (0, 2, 3))  # free


def test_predict_writes_the_masks_of_the_checkpoint_tiles_and_augmentation_included(folder):
    pixels = random_images(1, 3, 150, 200)[0].permute(1, 2, 0).numpy()
    (folder / "photos").mkdir()
    Image.fromarray(pixels).save(folder / "photos/a.png")
    for settings in ("tile=64", "tta=[flip,0.75,1.0]"):
        masks = []
        for name in ("a.ckpt", "b.onnx"):
            line = f"predict input=photos output=out checkpoint={name} resume=false save=[mask] "
            line += f"trainer.accelerator=cpu trainer.precision=32 trust=[{__name__}] {settings}"
            assert run_command(line, folder) == 0
            masks.append(np.asarray(Image.open(folder / "out/mask/a.png")))
        assert len(np.unique(masks[0])) > 2
        assert (masks[0] == masks[1]).mean() > 0.999


def test_evaluate_scores_an_exported_file_on_the_data_of_its_checkpoint(folder):
    matrices = []
    for name in ("a.ckpt", "b.onnx"):
        line = f"evaluate checkpoint={name} output_dir=scores trainer.accelerator=cpu "
        assert run_command(f"{line} trust=[{__name__}]", folder) == 0
        scores = json.loads((folder / "scores/test_metrics.json").read_text())
        matrices.append(np.array(scores["confusion_matrix"]))
    assert matrices[0].sum() > 0.9 * 3 * 96 * 96  # the others have no label
    assert np.abs(matrices[0] - matrices[1]).sum() <= 10  # pixels


def test_the_example_of_the_docs_runs_without_torch(folder):
    docs = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(import json.*?)```", docs, re.DOTALL)
    assert len(example.strip().splitlines()) <= 15
    # A second environment would take minutes: in this one, torch and seg_torch cannot be imported.
    blocked = "import sys; sys.modules.update(torch=None, seg_torch=None)\n"
    images = random_images(1, 3, 70, 90)
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(folder / "photo.png")
    run = subprocess.run(
        [sys.executable, "-I", "-c", blocked + example, "b.onnx", "photo.png", "mask.png"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "star" in run.stdout
    classes, _ = reference(folder / "a.ckpt", images, (70, 90))
    with Image.open(folder / "mask.png") as mask:
        assert mask.getpalette()[:18] == SHAPES_LABELS.palette.flatten().tolist()
        assert (np.asarray(mask) == classes[0].numpy()).mean() > 0.999


def test_a_graph_resizes_images_as_the_network_saw_them(tmp_path):
    path = saved(tmp_path, resize=(48, 64))
    network = Segmenter.load(exported_to(tmp_path, "onnx"), device="cpu").network
    image = random_images(1, 3, 100, 150)
    (mask,) = network.run(image, ["classes"])
    segmenter = Segmenter.load(path, trust=[__name__], device="cpu", precision="32")
    expected = segmenter.predict(image[0])
    assert mask.shape == (1, 100, 150)
    assert (mask[0].numpy() == expected.mask).mean() > 0.995  # integers round differently
    again = Segmenter.load(tmp_path / "b.onnx", device="cpu", flip=True).predict(image[0])
    flipped = Segmenter.load(path, trust=[__name__], device="cpu", precision="32", flip=True)
    assert (again.mask == flipped.predict(image[0]).mask).mean() > 0.999
    scaled = Segmenter.load(tmp_path / "b.onnx", device="cpu", scales=[0.5, 1.0])
    with pytest.raises(InputError, match="scales of tta"):
        scaled.predict(image[0])


def test_a_graph_of_openvino_reduces_images_of_every_shape(tmp_path):
    """That of ONNX is in tests/runs/test_max_side.py."""
    pytest.importorskip("openvino")
    path = saved(tmp_path, resize=64)
    network, _, about = load_network(path, [__name__])
    write(Graph(network.eval(), 64), tmp_path / "b.xml", "openvino", about)
    run, _ = open_exported(tmp_path / "b.xml")
    for size, seen in {
        (100, 150): (43, 64),
        (150, 100): (64, 43),
        (50, 40): (50, 40),
        (64, 64): (64, 64),
        (65, 64): (64, 63),
        (90, 400): (32, 64),
    }.items():
        image = random_images(1, 3, *size)
        (mask,) = run(image, ["classes"])
        small = F.interpolate(image.float(), seen, mode="bilinear", antialias=True).round()
        expected, _ = reference(path, small, size)
        assert (mask == expected).double().mean() > 0.999, size


def test_int8_is_calibrated_and_scored_with_the_validation_images(folder, capsys):
    pytest.importorskip("nncf")
    path = exported_to(folder, "openvino", "int8=true")
    text = capsys.readouterr()
    (found,) = re.findall(
        r"int8 on (\d+) validation.*: ([\d.]+) %.* IoU ([\d.]+), in float32 ([\d.]+)",
        text.out + text.err,
    )
    numbers = [float(n) for n in found]
    # By scikit-learn, over all pixels of the five images that have a label.
    samples = [shapes("val", size=96, val=5)[i] for i in range(5)]
    images = torch.stack([image for image, _ in samples])
    masks = torch.stack([mask for _, mask in samples])
    expected = [reference(folder / "a.ckpt", images, (96, 96))[0]]
    expected.append(open_exported(path)[0](images, ["classes"])[0])
    known = masks != 255
    ious = [jaccard(masks[known], classes[known]) for classes in expected]
    same = 100 * (expected[0] == expected[1]).double().mean().item()
    assert numbers[:2] == pytest.approx([5, same], abs=0.01)
    assert numbers[2:] == pytest.approx([ious[1], ious[0]], abs=1e-4)
    assert abs(numbers[2] - numbers[3]) > 3e-4  # so that they cannot be exchanged
    assert "FakeQuantize" in path.read_text(encoding="utf-8")
    images = random_images(1, 3, 96, 96)
    (classes,) = open_exported(path)[0](images, ["classes"])
    expected, _ = reference(folder / "a.ckpt", images, (96, 96))
    assert 0.9 < (classes == expected).double().mean() < 1


def test_a_file_that_differs_from_its_network_does_not_take_the_place_of_another(
    folder, capsys, monkeypatch
):
    (folder / "old.onnx").write_text("before")
    good = exported.open_exported

    def shifted(path):
        run, about = good(path)
        return (lambda *arguments: [o.roll(1, -1) for o in run(*arguments)]), about

    monkeypatch.setattr(exported, "open_exported", shifted)
    line = f"export checkpoint=a.ckpt output=old.onnx trust=[{__name__}]"
    assert run_command(line, folder) == 2
    assert "% of the pixels differ" in capsys.readouterr().err
    assert (folder / "old.onnx").read_text() == "before"
    assert not list(folder.glob(".partial-*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("format=tflite", "format is 'tflite'; use one of onnx, openvino"),
        ("format=torch", "format is 'torch'; use one of onnx, openvino"),
        ("int8=true", "int8=true needs format=openvino"),
        ("output=model.pb", "is called NAME.onnx"),
        ("checkpoint=b.onnx", "exported already"),
    ],
)
def test_what_cannot_be_exported_is_said_at_once(folder, capsys, settings, message):
    line = f"export checkpoint=a.ckpt trust=[{__name__}] {settings}"
    line = line.replace("checkpoint=a.ckpt", "") if "checkpoint" in settings else line
    assert run_command(line, folder) == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    graph = Graph(Network(Tiny(3)), None)
    with pytest.raises(InputError, match=r"needs onnx, onnxscript, onnxruntime: pip install"):
        write(graph, tmp_path / "a.onnx", "onnx", {})
    (tmp_path / "a.onnx").touch()
    with pytest.raises(InputError, match=r"needs onnxruntime: pip install -e '.*\[onnx\]'"):
        load_network(tmp_path / "a.onnx")


def test_a_file_of_others_is_refused(tmp_path):
    import onnx

    value = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["images"], ["out"])
    opsets = [onnx.helper.make_opsetid("", 18)]
    graph = onnx.helper.make_graph([node], "g", [value], [result])
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(model, tmp_path / "other.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    for name in ("other", "broken"):
        with pytest.raises(InputError, match=rf"{name}\.onnx: not a network that seg_torch has"):
            load_network(tmp_path / f"{name}.onnx")


# Every family. Each takes ten seconds or more, so all but one are marked slow.

FAST = {"vit_linear", *MASK_MODELS}
NOT_EXPORTED = dict.fromkeys(MASK_MODELS, "models that classify masks")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in MODELS]
)
def test_every_family_gives_the_same_masks_from_an_onnx_file(name, tmp_path):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    network = Network(model).eval()
    labels = Labels(("a", "b", "c"))
    about = checkpoint.describe(network, labels, {}, {}, None)
    path = tmp_path / "a.onnx"
    if name in NOT_EXPORTED:
        with pytest.raises(InputError, match=NOT_EXPORTED[name]):
            write(Graph(network, None), path, "onnx", about)
        return
    write(Graph(network, None), path, "onnx", about)
    theirs = Segmenter.load(path, device="cpu")
    ours = Segmenter(network, labels, device="cpu", precision="32")
    for height, width in ((65, 71), (64, 96), (100, 40)):
        image = random_images(1, 3, height, width)[0]
        expected = ours.predict(image, probabilities=True)
        found = theirs.predict(image, probabilities=True)
        assert found.mask.shape == (height, width)
        assert (found.mask == expected.mask).mean() > 0.999
        difference = np.abs(found.scores.astype(float) - expected.scores.astype(float))
        assert difference.max() < 0.01
