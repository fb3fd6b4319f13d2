"""What holds of every family: odd sizes, gradients, saving, precision, what a GPU can repeat."""

import copy
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from models_for_tests import (
    EXTRAS,
    MASK_MODELS,
    MODELS,
    NUM_CLASSES,
    PADDED,
    REFUSED_ON_CUDA,
    Calls,
    caches,  # noqa: F401
    enlarge,
    images,
    size_of_logits,
)
from omegaconf import OmegaConf
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from seg_torch import Segmenter
from seg_torch.checkpoints import checkpoint
from seg_torch.checkpoints.exported import load_network
from seg_torch.checkpoints.publish import write_model
from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.losses import CrossEntropyLoss, DiceLoss, WeightedSum
from seg_torch.models import smp
from seg_torch.models.network import Network, freeze_unused_parameters
from seg_torch.prediction.inference import upsample

# What transformers leaves in its models and does not use, and what cannot have a gradient: in the
# first layer of MaskFormer's decoder all queries are zero.
UNUSED = r"encoder\.(swin|model)\.layernorm\.|logit_scale"

WITHOUT_GRADIENT = UNUSED + r"|module\.decoder\.layers\.0\.self_attn\."


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    if request.param in EXTRAS:
        pytest.importorskip(EXTRAS[request.param])
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # timm starts some at 0, which stops the gradient
            nn.init.uniform_(module.weight, 0.5, 1.5)
    if name in MASK_MODELS:
        for parameter in model.parameters():  # and deformable attention at 0
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.promise(12)
@pytest.mark.parametrize("size", [(65, 71), (64, 80), (32, 32)])
def test_d09_logits_have_the_stride_of_the_head(model, name, size):
    with torch.no_grad():
        outputs = model.eval()(images(1, 3, *size))
    assert outputs["out"].shape == (1, NUM_CLASSES, *size_of_logits(name, size))
    assert outputs["out"].isfinite().all()


@pytest.mark.promise(12)
def test_every_model_gives_masks_of_the_size_of_the_image(model):
    image = torch.randint(256, (65, 71, 3), dtype=torch.uint8)
    network = Network(copy.deepcopy(model).eval())  # it would change the model's memory format
    segmenter = Segmenter(network, Labels(("a", "b", "c")), device="cpu", precision="32-true")
    mask = segmenter.predict(image.numpy()).mask
    with torch.no_grad():
        logits = network(image.permute(2, 0, 1)[None])["out"]
    assert mask.shape == (65, 71)
    assert (mask == enlarge(logits, (65, 71))[0].argmax(0).numpy()).mean() > 0.999


@pytest.mark.promise(12)
@pytest.mark.parametrize("name", PADDED, indirect=True)
@pytest.mark.parametrize("size", [(65, 65), (70, 131)])
def test_e17_what_a_model_makes_of_padding_is_not_squeezed_into_the_image(model, name, size):
    """The image is padded by hand, and its logits are enlarged to that size and cut."""
    image = F.interpolate(images(1, 3, 12, 12).mul(40).add(128), size, mode="bicubic")
    image = image.clamp(0, 255).byte()
    height, width = (-(-side // PADDED[name]) * PADDED[name] for side in size)
    margins = [(0, 0), (0, 0), (0, height - size[0]), (0, width - size[1])]
    padded = torch.from_numpy(np.pad(image.numpy(), margins, mode="edge"))
    network = Network(copy.deepcopy(model).eval())
    segmenter = Segmenter(network, Labels(("a", "b", "c")), device="cpu", precision="32-true")
    mask = segmenter.predict(image[0].permute(1, 2, 0).numpy()).mask
    with torch.no_grad():
        found = enlarge(network(image)["out"], size)
        whole = enlarge(network(padded)["out"], (height, width))
    # Of what is more than half a stride outside of the image nothing is seen.
    found, whole = (each[0, :, : size[0] - 2, : size[1] - 2] for each in (found, whole))
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    assert (mask[:-2, :-2] == whole.argmax(0).numpy()).mean() > 0.999


def test_d23_aux_head_runs_in_training_only(model, name):
    aux_head = getattr(model, "aux_classifier", None)
    assert (aux_head is not None) == (name in ("fcn", "deeplabv3", "deeplabv3_mobilenet"))
    calls = []
    if aux_head is not None:
        aux_head.register_forward_hook(lambda *_: calls.append(model.training))
    x = images(2, 3, 65, 71)
    with torch.no_grad():
        assert set(model.eval()(x)) == {"out"}
        outputs = model.train()(x)
    assert set(outputs) == {"out", "aux"} if aux_head is not None else {"out"}
    assert calls == [True] * (aux_head is not None)
    if aux_head is not None:
        assert outputs["aux"].shape == (2, NUM_CLASSES, 9, 9)  # of stride 8


@pytest.mark.promise(12)
def test_gradient_reaches_every_trainable_parameter(model):
    outputs = model.train()(images(2, 3, 65, 71))
    target = torch.randint(NUM_CLASSES, (2, 65, 71), generator=torch.Generator().manual_seed(2))
    losses = [F.cross_entropy(enlarge(logits, (65, 71)), target) for logits in outputs.values()]
    losses = [sum(losses)]
    if hasattr(model, "has_own_loss"):
        losses.append(model(images(2, 3, 65, 71), target)["loss"])
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    for loss in losses:
        model.zero_grad()
        loss.backward()
        without = [name for name, p in trainable.items() if p.grad is None or not p.grad.any()]
        assert [name for name in without if not re.search(WITHOUT_GRADIENT, name)] == []


@pytest.fixture
def refused(monkeypatch) -> Iterator[Callable[[nn.Module, Callable], set[str]]]:
    """refused(model, loss): what a training step calls that no GPU does deterministically."""

    def refused(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> set[str]:
        own = hasattr(model, "has_own_loss")
        device = "cpu" if own else "meta"  # what is matched depends on the values
        network = Network(copy.deepcopy(model)).to(device).train()
        images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=device)
        masks = torch.zeros(2, 64, 64, dtype=torch.uint8, device=device)
        with Calls() as calls:
            logits = network(images).values()
            sum(loss(upsample(each, masks.shape[-2:]), masks) for each in logits).backward()
            if own:
                network(images, masks)["loss"].backward()
        return REFUSED_ON_CUDA & calls.counts.keys()

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # unknown to meta
    torch.use_deterministic_algorithms(True)
    yield refused
    torch.use_deterministic_algorithms(False)


@pytest.mark.promise(25)
def test_training_calls_nothing_that_a_gpu_has_in_no_deterministic_version(model, name, refused):
    losses = [CrossEntropyLoss("image"), DiceLoss(), DiceLoss(weights="image")]
    # The library's deformable attention.
    known = {"aten.grid_sampler_2d_backward"} if name in ("mask2former", "oneformer") else set()
    assert refused(model, WeightedSum(losses, [1, 1, 1])) == known


def test_what_a_gpu_has_in_no_deterministic_version_is_seen(refused):
    pytest.importorskip(EXTRAS["smp"])
    model = smp(NUM_CLASSES, "PSPNet", "resnet18", weights=None)
    assert refused(model, CrossEntropyLoss()) == {"aten._adaptive_avg_pool2d_backward"}

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target.long())

    found = refused(nn.Conv2d(3, NUM_CLASSES, 1), loss)
    assert found == {"aten.nll_loss2d_forward of a reduced loss"}


def batchnorm_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.promise(16)
def test_d01_synchronised_batchnorm_gives_equal_logits(model):
    network = Network(copy.deepcopy(model))
    for module in batchnorm_layers(network):  # away from 0 and 1, where nothing would show
        nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(3))
        nn.init.uniform_(module.running_var, 0.5, 2, generator=torch.Generator().manual_seed(4))
    x = torch.randint(256, (2, 3, 65, 71), dtype=torch.uint8)
    parameters = dict(network.named_parameters())
    modes = [module.training for module in network.train().modules()]
    with torch.no_grad():
        expected = network.eval()(x)["out"]
        converted = convert_sync_batchnorm(network.train())
        assert [module.training for module in converted.modules()][: len(modes)] == modes
        logits = converted.eval()(x)["out"]
    assert torch.equal(logits, expected)
    assert all(isinstance(m, nn.SyncBatchNorm) for m in batchnorm_layers(converted))
    assert all(p is parameters[name] for name, p in converted.named_parameters())


def in_battery(num_classes: int, name: str) -> nn.Module:
    return MODELS[name]()


def test_saved_and_loaded_gives_equal_logits(model, name, tmp_path):
    """As on the Hugging Face Hub: safetensors, which refuses shared tensors, and JSON."""
    network = Network(copy.deepcopy(model).eval())
    config = {"_target_": f"{__name__}.in_battery", "name": name}
    about = checkpoint.describe(network, Labels(("a", "b", "c")), config, {}, None)
    write_model(tmp_path / "model", "owner/model", network, about)
    loaded, _, _ = load_network(tmp_path / "model", trust=[__name__])
    x = torch.randint(256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = (n(x.to(torch.uint8))["out"] for n in (loaded.eval(), network))
    assert torch.equal(logits, expected)


def test_channels_last_and_bf16_autocast_work(model, name):
    x = images(2, 3, 65, 71).to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.train()(x)["out"]
    assert logits.shape == (2, NUM_CLASSES, *size_of_logits(name, (65, 71)))
    assert logits.isfinite().all()


def test_d21_nothing_is_frozen_where_everything_is_used(model):
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    unused = [name for name in trainable if re.search(UNUSED, name)]
    assert freeze_unused_parameters(Network(model)) == [f"model.{name}" for name in unused]
    assert [n for n, p in model.named_parameters() if p.requires_grad or n in unused] == trainable


@pytest.mark.parametrize("extra", EXTRAS)
def test_d33_a_missing_extra_names_the_command_that_installs_it(extra, monkeypatch):
    monkeypatch.setitem(sys.modules, EXTRAS[extra], None)
    project_extra = "smp" if extra == "smp" else "transformers"
    message = rf"needs {EXTRAS[extra]}: pip install -e '.*\[{project_extra}\]'$"
    with pytest.raises(InputError, match=message):
        MODELS[extra]()


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=hrnet", "model.encoder=hrnet_w18_small", "model.extra_background=true"],
        ["model=unet_transposed"],
        ["model=lraspp"],
        ["model=vit", "model.encoder=test_vit", "model.head=linear"],
        ["model=smp"],
        ["model=segformer"],
        ["model=mask2former", "+model.config.decoder_layers=2", "+model.config.encoder_layers=1"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_checkpoint_needs_nothing_but_itself(overrides, compose):
    config = OmegaConf.to_container(compose("train", *overrides).model)
    for extra, package in EXTRAS.items():
        if config["_target_"].endswith(f".{extra}"):
            pytest.importorskip(package)
    assert config["weights"] is not None
    original = instantiate({**config, "weights": None}, num_classes=NUM_CLASSES, _convert_="all")
    content = {
        "state_dict": {f"network.model.{k}": v for k, v in original.state_dict().items()},
        checkpoint.KEY: {
            "labels": Labels(("a", "b", "c")).to_dict(),
            "model": config,
            "preprocessing": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]},
        },
    }
    content["state_dict"] |= {f"network.{key}": torch.ones(3, 1, 1) for key in ("mean", "std")}
    network = checkpoint.build_network(content)
    x = images(1, 3, 40, 56)
    with torch.no_grad():
        logits, expected = network.model.eval()(x)["out"], original.eval()(x)["out"]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # in another memory format
