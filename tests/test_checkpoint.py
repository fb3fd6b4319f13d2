"""Checkpoints: everything is in them, and nothing in them is run."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from seg_torch import Segmenter, checkpoint
from seg_torch.commands.evaluate import evaluate
from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.models import unet
from seg_torch.models.network import Network

LABELS = Labels(("a", "b", "c"))
UNET = {
    "_target_": "seg_torch.models.unet",
    "encoder": "resnet18",
    "weights": "imagenet",  # as it was trained; loading must not want to download them again
    "decoder_channels": [16, 16, 16, 8, 8],
}


class Own(nn.Module):
    """A model of somebody else's."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


OWN = {"_target_": f"{__name__}.Own"}


def saved(path: Path, model: dict, network: Network, data: dict | None = None) -> Path:
    content = {
        "state_dict": {f"network.{k}": v for k, v in network.state_dict().items()},
        checkpoint.KEY: checkpoint.describe(network, LABELS, model, data or {}, None),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.mark.promise(22)
def test_a_checkpoint_alone_gives_the_same_logits(tmp_path):
    torch.manual_seed(0)
    options = {k: v for k, v in UNET.items() if not k.startswith("_")} | {"weights": None}
    network = Network(unet(3, **options), mean=(0.1, 0.2, 0.3), std=(1, 2, 3)).eval()
    path = saved(tmp_path / "a.ckpt", UNET, network)
    segmenter = Segmenter.load(path, device="cpu")
    images = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(segmenter.network(images)["out"], network(images)["out"])
    assert segmenter.labels == LABELS
    assert (segmenter.labels.palette == LABELS.palette).all()


def test_the_folder_of_a_run_stands_for_its_best_checkpoint(tmp_path):
    for name in ("best", "last"):
        network = Network(Own(3))
        nn.init.constant_(network.model.layer.bias, 5 if name == "best" else 7)
        saved(tmp_path / f"run/checkpoints/{name}.ckpt", OWN, network)
    network = Segmenter.load(tmp_path / "run", trust=[__name__]).network
    assert (network.model.layer.bias == 5).all()


def test_a_folder_without_a_best_checkpoint_is_refused_with_what_it_would_hold(tmp_path):
    saved(tmp_path / "checkpoints/last.ckpt", OWN, Network(Own(3)))
    with pytest.raises(InputError, match=rf"checkpoint={tmp_path}: .*checkpoints/best\.ckpt"):
        Segmenter.load(tmp_path)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.hub.load",
        "seg_torch.models.weights.torch.hub.load",
        "seg_torch.models.unet.__globals__",
        "seg_torch.models.network.log.info",
        "seg_torch.models.network.log.name.join",
        "seg_torch.modelsevil.run",
        "builtins.eval",
    ],
)
def test_a_target_outside_the_known_packages_is_refused(tmp_path, target):
    for config in (
        {"_target_": target},
        {**UNET, "encoder": {"_target_": target}},
        {**UNET, "decoder_channels": [16, ({"a": {"_target_": target}},)]},
    ):
        path = saved(tmp_path / "a.ckpt", config, Network(Own(3)))
        with pytest.raises(InputError, match="outside the packages"):
            Segmenter.load(path)


@pytest.mark.parametrize("target", ["seg_torch.models.gone", "seg_torch.models..unet"])
def test_a_target_that_is_not_there_is_one_message(tmp_path, target):
    path = saved(tmp_path / "a.ckpt", {"_target_": target}, Network(Own(3)))
    with pytest.raises(InputError, match="not installed"):
        Segmenter.load(path)


def test_a_model_of_ones_own_needs_trust(tmp_path):
    path = saved(tmp_path / "a.ckpt", OWN, Network(Own(3)))
    with pytest.raises(InputError, match=rf"trust=\[{__name__}\]"):
        Segmenter.load(path)
    assert isinstance(Segmenter.load(path, trust=[__name__]).network.model, Own)


SECRET = "${oc.env:SEG_TORCH_TEST_SECRET}"


@pytest.fixture
def environment_reads(monkeypatch) -> list[str]:
    """The names of the environment variables that are looked at because of a file."""
    monkeypatch.setenv("SEG_TORCH_TEST_SECRET", "resnet18")
    reads: list[str] = []
    plain = os._Environ.__getitem__
    monkeypatch.setattr(
        os._Environ, "__getitem__", lambda self, key: (reads.append(key), plain(self, key))[1]
    )
    return reads


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder": SECRET},
        {"decoder_channels": [16, 16, [SECRET]]},
        {"extra": {SECRET: 1}},
        {"extra": ({"_target_": "seg_torch.models.unet", "encoder": f"x{SECRET}"},)},
        {"_target_": SECRET},
    ],
)
def test_d28_a_model_that_would_read_the_environment_is_refused(
    tmp_path, environment_reads, settings
):
    path = saved(tmp_path / "a.ckpt", {**UNET, **settings}, Network(Own(3)))
    with pytest.raises(InputError, match="interpolation") as refusal:
        Segmenter.load(path, device="cpu")
    assert "resnet18" not in str(refusal.value)
    assert "SEG_TORCH_TEST_SECRET" not in environment_reads


@pytest.mark.parametrize("where", ["root", "dataset"])
def test_d28_data_that_would_read_the_environment_are_refused(
    compose, tmp_path, environment_reads, where
):
    data = {
        "_target_": "seg_torch.datamodule.SegmentationDataModule",
        "dataset": {"_target_": "seg_torch.datasets.shapes", "_partial_": True},
        "root": None,
    }
    if where == "root":
        data["root"] = SECRET
    else:
        data["dataset"]["size"] = [SECRET]
    path = saved(tmp_path / "a.ckpt", OWN, Network(Own(3)), data)
    options = (f"checkpoint={path}", f"trust=[{__name__}]", "trainer.accelerator=cpu")
    with pytest.raises(InputError, match="interpolation"):
        evaluate(compose("evaluate", *options, f"output_dir={tmp_path / 'e'}"))
    assert "SEG_TORCH_TEST_SECRET" not in environment_reads


class Payload:
    """Unpickling it would make a folder."""

    def __init__(self, folder) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.promise(7)
def test_unpickling_runs_nothing(tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(InputError, match=name):
            checkpoint.read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_what_would_unpack_to_more_than_the_file_is_refused_before_it_is_unpacked(
    tmp_path, monkeypatch
):
    """PyTorch itself would unpack it: 2 MB of zeros took 4.9 GB of memory."""
    path = saved(tmp_path / "a.ckpt", OWN, Network(Own(3)))
    with zipfile.ZipFile(path) as original:
        content = {name: original.read(name) for name in original.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, value in content.items():
            bomb.writestr(name, value + bytes(1 << 24) * name.endswith("data.pkl"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(InputError, match=r"a\.ckpt: .*would unpack to 16,7\d\d,\d\d\d bytes"):
        checkpoint.read(path)


def test_a_configuration_without_end_is_refused(tmp_path):
    """A few bytes of references: ten times ten times ... the same list, or a list in itself."""
    node: list = ["x"]
    for _ in range(12):
        node = [node] * 10
    loop: list = []
    loop.append(loop)
    for extra in (node, loop):
        path = saved(tmp_path / "a.ckpt", {**UNET, "extra": extra}, Network(Own(3)))
        with pytest.raises(InputError, match="more than 100,000 values"):
            Segmenter.load(path)


def test_a_checkpoint_that_was_cut_off_is_refused_by_name(tmp_path):
    path = saved(tmp_path / "a.ckpt", UNET, Network(Own(3)))
    content = path.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"a\.ckpt: not a checkpoint, or cut off"):
            checkpoint.read(path)


def test_damaged_files_are_refused_with_one_line(tmp_path):
    """Bytes changed at random raise errors of a dozen types in zipfile, pickle and PyTorch."""
    path = saved(tmp_path / "a.ckpt", UNET, Network(Own(3)))
    with zipfile.ZipFile(path) as original:
        content = {name: original.read(name) for name in original.namelist()}
    generator = torch.Generator().manual_seed(0)
    messages = []
    for _ in range(100):
        with zipfile.ZipFile(path, "w") as damaged:
            for name, value in content.items():
                array = bytearray(value)
                if name.endswith("data.pkl"):
                    places = torch.randint(0, len(array), (4,), generator=generator)
                    for place in places.tolist():
                        array[place] = int(torch.randint(0, 256, (), generator=generator))
                damaged.writestr(name, bytes(array))
        try:
            checkpoint.read(path)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(str(path) in message and "\n" not in message for message in messages)


def test_weights_of_another_model_are_refused(tmp_path):
    path = saved(tmp_path / "a.ckpt", UNET, Network(Own(3)))
    with pytest.raises(InputError, match="do not fit its own model"):
        Segmenter.load(path)
