"""Checkpoints: everything is in them, and nothing in them is run."""

import os
import pickle

import pytest
import torch
from torch import nn

from seg_torch import Segmenter, checkpoint
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


def saved(path, model: dict, network: Network) -> str:
    content = {
        "state_dict": {f"network.{k}": v for k, v in network.state_dict().items()},
        checkpoint.KEY: checkpoint.describe(network, LABELS, model, {}, None),
    }
    torch.save(content, path)
    return str(path)


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


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.hub.load",
        "seg_torch.models.weights.torch.hub.load",
        "seg_torch.modelsevil.run",
        "builtins.eval",
    ],
)
def test_a_target_outside_the_known_packages_is_refused(tmp_path, target):
    for config in ({"_target_": target}, {**UNET, "encoder": {"_target_": target}}):
        path = saved(tmp_path / "a.ckpt", config, Network(Own(3)))
        with pytest.raises(InputError, match="outside the packages"):
            Segmenter.load(path)


def test_a_model_of_ones_own_needs_trust(tmp_path):
    path = saved(tmp_path / "a.ckpt", {"_target_": f"{__name__}.Own"}, Network(Own(3)))
    with pytest.raises(InputError, match=rf"trust=\[{__name__}\]"):
        Segmenter.load(path)
    assert isinstance(Segmenter.load(path, trust=[__name__]).network.model, Own)


class Payload:
    """Unpickling it would make a folder."""

    def __init__(self, folder) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_unpickling_runs_nothing(tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(InputError, match=name):
            checkpoint.read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_was_cut_off_is_refused_by_name(tmp_path):
    path = saved(tmp_path / "a.ckpt", UNET, Network(Own(3)))
    content = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a\.ckpt: not a checkpoint, or cut off"):
        checkpoint.read(path)


def test_weights_of_another_model_are_refused(tmp_path):
    path = saved(tmp_path / "a.ckpt", UNET, Network(Own(3)))
    with pytest.raises(InputError, match="do not fit its own model"):
        Segmenter.load(path)


def test_matching_weights_are_taken_over_and_the_others_named():
    source, target = Own(3), Own(4)
    before = target.layer.weight.clone()
    skipped = checkpoint.load_matching(target, {**source.state_dict(), "gone": torch.zeros(1)})
    assert skipped == ["gone", "layer.bias", "layer.weight"]
    assert torch.equal(target.layer.weight, before)
    other = Own(3)
    assert checkpoint.load_matching(other, source.state_dict()) == []
    assert torch.equal(other.layer.weight, source.layer.weight)
