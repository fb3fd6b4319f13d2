import copy
import itertools
import json
import logging
import math
import os
import re
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from huggingface_hub.errors import LocalEntryNotFoundError
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import segmentation as tv

from seg_torch import Segmenter
from seg_torch.checkpoints import checkpoint
from seg_torch.checkpoints.exported import load_network
from seg_torch.checkpoints.publish import write_model
from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.losses import CrossEntropyLoss, DiceLoss, WeightedSum
from seg_torch.models import (
    UNet,
    deeplabv3,
    fcn,
    hrnet,
    lraspp,
    smp,
    transformers,
    unet,
    unet_transposed,
    vit,
)
from seg_torch.models.network import Network, freeze_unused_parameters, synchronise_batchnorm
from seg_torch.models.unet import DecoderStage
from seg_torch.models.weights import load_matching_weights, read_state_dict, timm_model
from seg_torch.prediction.inference import upsample

NUM_CLASSES = 3
SEGFORMER = {
    "model_type": "segformer",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 40, 64],
    "decoder_hidden_size": 16,
}
SWIN = {
    "model_type": "swin",
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 1, 1],
    "window_size": 2,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
MASK2FORMER = {
    "model_type": "mask2former",
    "backbone_config": SWIN,
    "num_queries": 5,
    "train_num_points": 64,
    "feature_size": 64,  # of GroupNorm with 32 groups
    "mask_feature_size": 64,
    "hidden_dim": 64,
    "encoder_feedforward_dim": 16,
    "dim_feedforward": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
}
MASK_MODELS = {
    "mask2former": MASK2FORMER,
    "oneformer": {
        **{key: value for key, value in MASK2FORMER.items() if "feature" not in key},
        "model_type": "oneformer",
        "conv_dim": 64,
        "mask_dim": 64,
        "query_dec_layers": 1,
    },
    "maskformer": {
        "model_type": "maskformer",
        "backbone_config": SWIN,
        "fpn_feature_size": 64,
        "mask_feature_size": 16,
        "decoder_config": {
            "model_type": "detr",
            "num_queries": 5,
            "d_model": 16,
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "encoder_attention_heads": 2,
            "decoder_ffn_dim": 16,
        },
    },
    "eomt": {
        "model_type": "eomt",
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "num_blocks": 2,
        "num_queries": 5,
        "num_register_tokens": 1,
        "train_num_points": 64,
    },
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "fcn": lambda: fcn(NUM_CLASSES, "resnet50", weights=None),
    "deeplabv3": lambda: deeplabv3(NUM_CLASSES, "resnet50", weights=None),
    "deeplabv3_mobilenet": lambda: deeplabv3(NUM_CLASSES, "mobilenet_v3_large", weights=None),
    "deeplabv3_without_aux": lambda: deeplabv3(
        NUM_CLASSES, "mobilenet_v3_large", weights=None, aux=False
    ),
    "unet": lambda: unet(NUM_CLASSES, "resnet18", weights=None),
    "unet_frozen": lambda: unet(NUM_CLASSES, "resnet18", weights=None, freeze_encoder=True),
    "unet_mobilenet": lambda: unet(NUM_CLASSES, "mobilenetv2_100", weights=None),
    "unet_efficientnet": lambda: unet(NUM_CLASSES, "efficientnet_b0", weights=None),
    "unet_convnext": lambda: unet(NUM_CLASSES, "convnext_atto", weights=None),  # no stride 2
    "unet_densenet": lambda: unet(NUM_CLASSES, "densenet121", weights=None),
    "unet_vgg": lambda: unet(  # feature maps also at stride 1
        NUM_CLASSES, "vgg11_bn", weights=None
    ),
    "unet_transposed": lambda: unet_transposed(NUM_CLASSES, "mobilenetv2_100", weights=None),
    "unet_transposed_frozen": lambda: unet_transposed(
        NUM_CLASSES, "densenet121", weights=None, freeze_encoder=True
    ),
    "unet_transposed_resnet": lambda: unet_transposed(NUM_CLASSES, "resnet18", weights=None),
    "hrnet": lambda: hrnet(NUM_CLASSES, "hrnet_w18_small", weights=None),
    "lraspp": lambda: lraspp(NUM_CLASSES, weights=None),
    "vit": lambda: vit(NUM_CLASSES, "test_vit", weights=None, fusion_channels=16),
    "vit_linear": lambda: vit(NUM_CLASSES, "test_vit", weights=None, head="linear"),
    "vit_frozen": lambda: vit(
        NUM_CLASSES, "test_vit", weights=None, freeze_encoder=True, fusion_channels=16
    ),
    "smp": lambda: smp(NUM_CLASSES, "Unet", "resnet18", weights=None),
    "transformers": lambda: transformers(NUM_CLASSES, SEGFORMER),
    **{name: partial(transformers, NUM_CLASSES, config) for name, config in MASK_MODELS.items()},
}
STRIDES = {  # of the logits, where not 1
    "fcn": 8,
    "deeplabv3": 8,
    "deeplabv3_mobilenet": 16,
    "deeplabv3_without_aux": 16,
    "hrnet": 4,
    "lraspp": 8,
    "vit": 2,
    "vit_linear": 16,
    "vit_frozen": 2,
    "transformers": 4,
    **dict.fromkeys(MASK_MODELS, 4),
    "eomt": 2,
}
EXTRAS = {"smp": "segmentation_models_pytorch", "transformers": "transformers"}
EXTRAS |= dict.fromkeys(MASK_MODELS, "transformers")
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


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches and no network, on every machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def no_network(*args: object, **kwargs: object) -> None:
        raise urllib.request.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "urlopen", no_network)


def torch_cache(tmp_path: Path) -> Path:
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def hugging_face_cache(tmp_path: Path, repository: str, revision: str = "0" * 40) -> Path:
    """Where the Hub client looks for the files of `repository`."""
    folder = tmp_path / "hf" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    return snapshot


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def enlarge(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def strided(size: Sequence[int], stride: int) -> tuple[int, ...]:
    return tuple(math.ceil(side / stride) for side in size)


@pytest.mark.promise(12)
@pytest.mark.parametrize("size", [(65, 71), (32, 32)])
def test_d09_logits_have_the_stride_of_the_head(model, name, size):
    with torch.no_grad():
        outputs = model.eval()(images(1, 3, *size))
    assert outputs["out"].shape == (1, NUM_CLASSES, *strided(size, STRIDES.get(name, 1)))
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


# trainer.deterministic on a GPU. Training on `meta` shows what it would call there: `meta` computes
# shapes alone, but takes the ways of a GPU wherever a library asks whether it is on a CPU.

# What raises an error on CUDA by the documentation of torch.use_deterministic_algorithms, as far as
# a network for images can call it at all, under the dispatcher's names.
REFUSED_ON_CUDA = {
    "aten.avg_pool3d_backward",
    "aten._adaptive_avg_pool2d_backward",
    "aten._adaptive_avg_pool3d_backward",
    "aten.adaptive_max_pool2d_backward",
    "aten.fractional_max_pool2d_backward",
    "aten.max_unpool2d",
    "aten.upsample_linear1d_backward",
    "aten.upsample_bicubic2d_backward",
    "aten.upsample_trilinear3d_backward",
    "aten.reflection_pad1d_backward",
    "aten.reflection_pad2d_backward",
    "aten.grid_sampler_2d_backward",
    "aten.put_",
    "aten.histc",
    "aten.median.dim",
    "aten.nll_loss2d_forward of a reduced loss",
}


class Calls(TorchDispatchMode):
    """Counts the operations that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removesuffix(".default")
        if name == "aten.nll_loss2d_forward" and args[3] != 0:  # reduction
            name += " of a reduced loss"
        self.counts[name] += 1
        return function(*args, **(kwargs or {}))


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
        converted = synchronise_batchnorm(network.train())
        assert [module.training for module in converted.modules()][: len(modes)] == modes
        logits = converted.eval()(x)["out"]
    assert torch.equal(logits, expected)
    assert all(isinstance(m, nn.SyncBatchNorm) for m in batchnorm_layers(converted))
    assert all(p is parameters[name] for name, p in converted.named_parameters())


@pytest.mark.parametrize("encoder", ["efficientnet_b0", "mobilenetv2_100", "densenet121"])
def test_d01_pytorchs_own_conversion_would_not(encoder):
    network = Network(unet(NUM_CLASSES, encoder, weights=None)).eval()
    x = torch.randint(256, (2, 3, 65, 71), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(x)["out"]
        logits = nn.SyncBatchNorm.convert_sync_batchnorm(network)(x)["out"]
    assert (logits - expected).abs().max() > 0.1 * expected.abs().max()


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
    assert logits.shape == (2, NUM_CLASSES, *strided((65, 71), STRIDES.get(name, 1)))
    assert logits.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(65, 71), (32, 32)])
@pytest.mark.parametrize(
    ("build", "reference", "file_name"),
    [
        (fcn, tv.fcn_resnet50, "fcn_resnet50_coco-1167a1af.pth"),
        (deeplabv3, tv.deeplabv3_resnet50, "deeplabv3_resnet50_coco-cd0a2569.pth"),
    ],
)
def test_published_weights_give_torchvisions_logits(
    build, reference, file_name, size, training, tmp_path
):
    expected = reference(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    torch.save(expected.state_dict(), torch_cache(tmp_path) / file_name)
    model = build(21, "resnet50")
    assert model.state_dict().keys() == expected.state_dict().keys()
    x = images(2, 3, *size)
    with torch.no_grad():
        torch.manual_seed(0)  # of dropout
        outputs = model.train(training)(x)
        torch.manual_seed(0)
        expected_outputs = expected.train(training)(x)
    assert set(outputs) == ({"out", "aux"} if training else {"out"})
    for name in outputs:
        assert outputs[name].shape[-2:] == strided(size, 8)
        assert torch.equal(enlarge(outputs[name], size), expected_outputs[name])


@pytest.fixture
def published_mobilenet(tmp_path: Path) -> tv.DeepLabV3:
    published = tv.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    )
    name = "deeplabv3_mobilenet_v3_large-fc3c493d.pth"
    torch.save(published.state_dict(), torch_cache(tmp_path) / name)
    return published


@pytest.mark.promise(26)
def test_another_number_of_classes_exchanges_the_last_layers_only(published_mobilenet, caplog):
    with caplog.at_level(logging.INFO):
        model = deeplabv3(NUM_CLASSES, "mobilenet_v3_large")
    exchanged = {
        f"{head}.4.{kind}"
        for head in ("classifier", "aux_classifier")
        for kind in ("weight", "bias")
    }
    skipped = next(r.getMessage() for r in caplog.records if "skipped" in r.getMessage())
    assert set(skipped.split(": ")[1].split(", ")) == exchanged
    published = published_mobilenet.state_dict()
    for name, tensor in model.state_dict().items():
        if name in exchanged:
            assert tensor.shape[0] == NUM_CLASSES
        else:
            assert torch.equal(tensor, published[name]), name


def test_published_weights_without_the_aux_head(published_mobilenet):
    model = deeplabv3(21, "mobilenet_v3_large", aux=False).eval()
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        outputs = model(x)
        expected = published_mobilenet.eval()(x)["out"]
    assert set(outputs) == {"out"}
    assert torch.equal(enlarge(outputs["out"], (32, 32)), expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(suffix, tmp_path):
    expected = MODELS["deeplabv3_mobilenet"]().eval()
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(expected.state_dict(), file)
    else:
        safetensors.torch.save_file(expected.state_dict(), file)
    model = deeplabv3(NUM_CLASSES, "mobilenet_v3_large", weights=file).eval()
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x)["out"], expected(x)["out"])


def test_a_file_of_another_model_is_refused(tmp_path):
    file = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    with pytest.raises(InputError, match=r"resnet18\.pth does not fit.*backbone\.0\.0\.weight"):
        deeplabv3(NUM_CLASSES, "mobilenet_v3_large", weights=file)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_d26_files_that_hold_no_tensors_are_one_message(suffix, tmp_path):
    layer = nn.Linear(200, 200).state_dict()
    good = tmp_path / f"good{suffix}"
    safetensors.torch.save_file(layer, good) if suffix != ".pth" else torch.save(layer, good)
    torch.save(layer, tmp_path / "old", _use_new_zipfile_serialization=False)
    contents = [
        *(b"", b"\n", b"0", b"hello world\n", b"weights of a model\n" * 50, b"\xff\xfeh\0e\0"),
        *(b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        *(bytes([first]) + b" a b c\n" * 9 for first in range(256)),
        *(good.read_bytes()[:size] for size in (1, 7, 100, 5000, -1000)),
        *((tmp_path / "old").read_bytes()[:size] for size in (1, 7, 100, 5000, -1000)),
    ]
    file = tmp_path / f"broken{suffix}"
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(InputError, match=rf"broken{suffix} (cannot be read|holds)") as error:
            read_state_dict(file)
        assert "\n" not in str(error.value)
    file.write_bytes(b"")
    with pytest.raises(InputError, match="the file is empty"):
        read_state_dict(file)


def test_files_that_are_no_state_dict_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"absent\.pth does not exist"):
        read_state_dict(tmp_path / "absent.pth")
    torch.save({"epoch": 3, "model": {}}, tmp_path / "training.pth")
    with pytest.raises(InputError, match=r"training\.pth holds the keys \['epoch', 'model'\]"):
        read_state_dict(tmp_path / "training.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pth")
    with pytest.raises(InputError, match=r"pickled\.pth cannot be read"):
        read_state_dict(tmp_path / "pickled.pth")


def test_weights_that_cannot_be_downloaded_name_file_folder_and_way_out(tmp_path):
    with pytest.raises(InputError) as error:
        fcn(21, "resnet50")
    message = str(error.value)
    assert "fcn_resnet50_coco-1167a1af.pth" in message
    assert str(tmp_path / "torch" / "hub" / "checkpoints") in message
    assert "model.weights=null" in message


@pytest.mark.parametrize("build", [fcn, deeplabv3])
def test_unknown_choices_name_the_allowed_ones(build):
    with pytest.raises(InputError, match="'resnet18'; use one of resnet50, resnet101"):
        build(21, "resnet18")
    with pytest.raises(InputError, match=r"'COCO'.*use COCO_WITH_VOC_LABELS_V1"):
        build(21, "resnet50", weights="COCO")


def test_deeplabv3_takes_the_imagenet_weights_of_its_backbone(tmp_path):
    published = torchvision.models.mobilenet_v3_large()
    file_name = "mobilenet_v3_large-8738ca79.pth"
    torch.save(published.state_dict(), torch_cache(tmp_path) / file_name)
    model = deeplabv3(NUM_CLASSES, "mobilenet_v3_large", "imagenet")
    expected = published.features.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.backbone.state_dict().items())


def test_published_weights_are_downloaded_by_one_of_the_processes_that_need_them(
    tmp_path, monkeypatch
):
    torch_cache(tmp_path)
    state_dict = torchvision.models.mobilenet_v3_large().state_dict()
    downloads = []

    def download(url, path, *_, **__):
        downloads.append(url)
        time.sleep(0.5)
        torch.save(state_dict, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with ThreadPoolExecutor(3) as pool:
        built = [pool.submit(deeplabv3, 2, "mobilenet_v3_large", "imagenet") for _ in range(3)]
        assert all(each.result() for each in built)
    assert len(downloads) == 1


def test_imagenet_weights_that_cannot_be_downloaded_are_one_message():
    with pytest.raises(InputError, match=r"resnet50.*model\.weights=null"):
        deeplabv3(NUM_CLASSES, "resnet50", "imagenet")


def test_deeplabv3_has_the_atrous_rates_asked_for_and_torchvisions_by_default():
    def rates(model: nn.Module) -> list[int]:
        layers = [m for m in model.classifier.modules() if isinstance(m, nn.Conv2d)]
        return [layer.dilation[0] for layer in layers if layer.dilation[0] > 1]

    assert rates(deeplabv3(NUM_CLASSES, "mobilenet_v3_large", None)) == [12, 24, 36]
    book = deeplabv3(NUM_CLASSES, "mobilenet_v3_large", None, atrous_rates=[6, 12, 18])
    assert rates(book) == [6, 12, 18]


@pytest.mark.promise(8)
def test_deeplabv3_refuses_to_train_on_a_batch_of_one():
    model = MODELS["deeplabv3_mobilenet"]().train()
    with pytest.raises(InputError, match=r"data\.batch_size=2"):
        model(images(1, 3, 32, 32))


@pytest.mark.promise(8)
def test_deeplabv3_with_frozen_batchnorm_trains_on_a_batch_of_one():
    model = MODELS["deeplabv3_mobilenet"]().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert model(images(1, 3, 32, 32))["out"].requires_grad


# Lightning trains a model in the modes it was built with, and calls train() after a validation.
@pytest.mark.promise(26)
@pytest.mark.parametrize("call_train", [False, True])
@pytest.mark.parametrize(
    ("build", "encoder"),
    [(unet, "resnet18"), (unet_transposed, "mobilenetv2_050"), (unet_transposed, "densenet121")],
)
def test_a_frozen_encoder_does_not_move_in_training(build, encoder, call_train):
    model = build(NUM_CLASSES, encoder, weights=None, freeze_encoder=True)
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    decoder_before = model.classifier.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if call_train:
        model.eval().train()
    model(images(2, 3, 32, 32))["out"].square().mean().backward()
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in model.encoder.state_dict().items())
    assert not torch.equal(decoder_before, model.classifier.weight)
    assert model.decoder.training


def test_a_free_encoder_moves_in_training():
    model = unet(NUM_CLASSES, "resnet18", weights=None)
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(images(2, 3, 64, 64))["out"].square().mean().backward()
    optimizer.step()
    after = model.encoder.state_dict()
    for name in ("conv1.weight", "bn1.running_mean", "bn1.running_var"):
        assert not torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenetv2_100", "convnext_atto"])
@pytest.mark.parametrize("source", ["imagenet", "file"])
def test_d37_unet_encoder_has_the_published_weights_and_one_line_says_so(
    encoder, source, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    published = timm.create_model(encoder)  # with the classifier, as timm publishes it
    repository = timm.get_pretrained_cfg(encoder).hf_hub_id
    file = hugging_face_cache(tmp_path, repository) / "model.safetensors"
    safetensors.torch.save_file(published.state_dict(), file)
    model = unet(NUM_CLASSES, encoder, weights="imagenet" if source == "imagenet" else file)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected = published.eval().forward_intermediates(x, intermediates_only=True)[-1]
        deepest = model.eval().encoder(x)[-1]
    torch.testing.assert_close(deepest, expected)
    (line,) = caplog.messages
    assert line == f"loaded the weights of the encoder {encoder} from {file}"


# A feature extractor of each kind that timm has; what they rename differs.
@pytest.mark.parametrize(
    "encoder",
    [
        *("resnet18", "densenet121", "regnety_002", "dla34", "mobilenetv3_small_050"),
        *("efficientnet_lite0", "hrnet_w18_small", "xception41", "convnext_atto"),
    ],
)
def test_every_tensor_of_the_encoder_must_be_in_the_file(encoder, tmp_path):
    whole = timm.create_model(encoder).state_dict()
    published = {name: torch.rand_like(tensor.float()) for name, tensor in whole.items()}
    file = tmp_path / "weights.safetensors"

    def build() -> nn.Module:
        return timm_model(encoder, file, features_only=True)

    safetensors.torch.save_file(published, file)
    own = build().state_dict()
    names = {plain(name): name for name in published}
    assert all(
        torch.equal(tensor.float(), published[names[plain(name)]])
        for name, tensor in own.items()
        if "num_batches_tracked" not in name
    )
    weights = [name for name, tensor in own.items() if "num_batches" not in name]
    for name in (weights[0], weights[len(weights) // 2], weights[-1]):
        lacking = names[plain(name)]
        safetensors.torch.save_file({k: v for k, v in published.items() if k != lacking}, file)
        with pytest.raises(InputError, match=f"no weights for 1 of its .* such as {name}"):
            build()
    # Those of the classifier are not needed.
    used = {names[plain(name)]: published[names[plain(name)]] for name in weights}
    safetensors.torch.save_file(used, file)
    assert torch.equal(build().state_dict()[weights[0]], own[weights[0]])
    safetensors.torch.save_file(timm.create_model("mobilenetv2_050").state_dict(), file)
    with pytest.raises(InputError, match=r"weights\.safetensors"):
        build()


def plain(name: str) -> str:
    return name.removeprefix("body.").replace(".", "_")


def test_names_that_timm_translates_are_no_lack(tmp_path):
    """Facebook's ConvNeXt, from its names back."""
    model = timm.create_model("convnext_atto")
    renamed = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".")
        name = name.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        name = re.sub(r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        renamed[name] = tensor
    assert not renamed.keys() & model.state_dict().keys()
    torch.save(renamed, tmp_path / "facebook.pth")
    encoder = timm_model("convnext_atto", tmp_path / "facebook.pth", features_only=True)
    expected = {plain(name): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(v, expected[plain(k)]) for k, v in encoder.state_dict().items())
    del renamed["stages.2.1.pwconv1.weight"]
    torch.save(renamed, tmp_path / "facebook.pth")
    with pytest.raises(InputError, match="no weights for"):
        timm_model("convnext_atto", tmp_path / "facebook.pth", features_only=True)


def test_published_encoder_classifies_as_well_in_unet(tmp_path, caplog):
    """A real file: EfficientNet-Lite0, trained on ImageNet."""
    if "SEG_TORCH_DATA" not in os.environ:
        pytest.skip("SEG_TORCH_DATA does not name a folder with the real datasets")
    file = Path(os.environ["SEG_TORCH_DATA"]).parent / "weights/tf_efficientnet_lite0.safetensors"
    if not file.is_file():
        pytest.skip(f"no {file}")
    with caplog.at_level(logging.INFO):
        model = unet(NUM_CLASSES, "tf_efficientnet_lite0", weights=file)
    (line,) = caplog.messages
    assert line == f"loaded the weights of the encoder tf_efficientnet_lite0 from {file}"
    published = safetensors.torch.load_file(file)
    own = model.encoder.state_dict()
    assert all(torch.equal(v, published[k]) for k, v in own.items() if "num_batches" not in k)
    del published["blocks.3.1.conv_dw.weight"]
    safetensors.torch.save_file(published, tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match=r"1 of its .* blocks\.3\.1\.conv_dw\.weight"):
        unet(NUM_CLASSES, "tf_efficientnet_lite0", weights=tmp_path / "cut.safetensors")


def test_unet_refuses_the_weights_of_another_encoder(tmp_path):
    for other in ("mobilenetv2_100", "resnet10t", "resnet50"):
        file = tmp_path / f"{other}.safetensors"
        safetensors.torch.save_file(timm.create_model(other).state_dict(), file)
        with pytest.raises(InputError, match=rf"{other}\.safetensors"):
            unet(NUM_CLASSES, "resnet18", weights=file)
    # Every tensor of a ResNet-18 fits into a ResNet-34, which has more.
    file = tmp_path / "resnet18.safetensors"
    safetensors.torch.save_file(timm.create_model("resnet18").state_dict(), file)
    with pytest.raises(InputError, match=r"resnet18\.safetensors does not fit .* resnet34"):
        unet(NUM_CLASSES, "resnet34", weights=file)


def test_unet_weights_that_cannot_be_downloaded_are_one_message_after_one_attempt(
    monkeypatch, capfd, caplog
):
    attempts = []

    def no_network(url: str, timeout: float) -> None:
        attempts.append(url)
        raise ConnectionError("no network in tests")

    def download(
        repository: str, file_name: str, revision: str | None, local_files_only: bool = False
    ) -> str:
        assert local_files_only, "the Hub client retries for half a minute"
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_network)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(InputError) as error:
        unet(NUM_CLASSES, "resnet18")
    url = "https://huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors"
    assert attempts == [url]
    message = str(error.value)
    for part in (url, "no network in tests", "model.weights=FILE", "model.weights=null"):
        assert part in message
    assert "\n" not in message
    assert capfd.readouterr().err == caplog.text == ""


def test_unet_knows_what_its_encoder_was_trained_with():
    # Inception's scaling to [-1, 1], from the TensorFlow port.
    model = unet(NUM_CLASSES, "tf_efficientnet_lite0.in1k", weights=None)
    assert model.mean == model.std == (0.5, 0.5, 0.5)
    model = unet(NUM_CLASSES, "resnet18", weights=None)
    assert model.mean == (0.485, 0.456, 0.406)
    assert model.std == (0.229, 0.224, 0.225)


def test_unknown_encoders_name_the_nearest_ones():
    with pytest.raises(InputError, match=r"'resnet43'.*resnet34"):
        unet(NUM_CLASSES, "resnet43")
    with pytest.raises(InputError, match="Invalid pretrained tag"):
        unet(NUM_CLASSES, "resnet34.nobody_in1k", weights=None)


def test_encoders_that_are_no_feature_pyramid_are_refused():
    with pytest.raises(InputError, match=r"strides \[16, 16, 16\]"):
        unet(NUM_CLASSES, "vit_tiny_patch16_224", weights=None)
    with pytest.raises(InputError, match="swin_tiny_patch4_window7_224"):
        unet(NUM_CLASSES, "swin_tiny_patch4_window7_224", weights=None)


def test_unet_names_the_number_of_decoder_channels_it_needs():
    with pytest.raises(InputError, match="needs 5 numbers"):
        unet(NUM_CLASSES, "resnet18", weights=None, decoder_channels=(64, 32))


@pytest.mark.parametrize("encoder", ["resnet18", "resnet50"])
def test_unet_gives_the_logits_of_segmentation_models_pytorch_with_its_weights(encoder):
    """Both list their tensors in the order of the computation, so these are paired by position."""
    library = pytest.importorskip("segmentation_models_pytorch")
    reference = library.Unet(encoder, encoder_weights=None, classes=NUM_CLASSES).eval()
    model = unet(NUM_CLASSES, encoder, weights=None).eval()
    tensors = zip(model.state_dict(), reference.state_dict().values(), strict=True)
    model.load_state_dict(dict(tensors))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = reference(x)
        torch.testing.assert_close(model(x)["out"], expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


@pytest.fixture
def doublings(monkeypatch) -> list[torch.Size]:
    """Shapes of what a `DecoderStage` doubled and convolved in one step."""
    shapes = []
    plain = F.conv_transpose2d
    monkeypatch.setattr(
        F, "conv_transpose2d", lambda x, *a, **kw: (shapes.append(x.shape), plain(x, *a, **kw))[1]
    )
    return shapes


def test_unet_trains_as_that_of_segmentation_models_pytorch(doublings):
    library = pytest.importorskip("segmentation_models_pytorch")
    channels = (32, 32, 16, 16, 8)
    reference = library.Unet(
        "resnet18", encoder_weights=None, decoder_channels=channels, classes=NUM_CLASSES
    ).double()
    model = unet(NUM_CLASSES, "resnet18", weights=None, decoder_channels=channels).double()
    tensors = zip(model.state_dict(), reference.state_dict().values(), strict=True)
    model.load_state_dict(dict(tensors))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected, found = reference(x), model(x)["out"]
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert [shape[2:] for shape in doublings] == [(16, 16), (32, 32)]  # with and without a skip
    for logits in (expected, found):
        logits.square().mean().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-6)
    doublings.clear()
    model.eval()(x)  # as it is exported
    assert not doublings


@pytest.mark.parametrize("skip_channels", [0, 24])
@pytest.mark.parametrize("size", [(32, 24), (31, 24), (32, 23)])
def test_a_decoder_stage_is_as_exact_as_bfloat16(doublings, skip_channels, size):
    """Against upsampling, concatenation and convolution in float32 of the same numbers."""
    stage = DecoderStage(32, skip_channels, 16).to(memory_format=torch.channels_last)
    stage.convolutions = stage.convolutions[:1]  # without BatchNorm
    (weight,) = stage.parameters()
    weight.data = weight.data.bfloat16().float()
    x = torch.randn(2, 32, 16, 12).bfloat16().float().requires_grad_()
    skip = torch.randn(2, skip_channels, *size).bfloat16().float().requires_grad_()
    rows, columns = (torch.arange(n) * small // n for n, small in zip(size, (16, 12), strict=True))
    upsampled = x[:, :, rows][:, :, :, columns]
    expected = F.conv2d(torch.cat([upsampled, skip], 1), weight, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = stage(x, skip if skip_channels else None, size)
    assert bool(doublings) == (size == (32, 24))
    assert found.dtype == torch.bfloat16
    inputs = [x, weight, skip][: 3 if skip_channels else 2]
    gradient = torch.randn_like(expected).bfloat16()
    expected_gradients = torch.autograd.grad(expected, inputs, gradient.float())
    gradients = torch.autograd.grad(found, inputs, gradient)
    for a, b in zip((found, *gradients), (expected, *expected_gradients), strict=True):
        # Numbers have 8 bits; those that are added up here are of the size of the largest sum.
        assert (a.float() - b).abs().max() < 2**-7 * b.abs().max()


def test_the_decoder_of_unet_keeps_the_scale_of_its_activations():
    """He et al. (2015), equation 10: the variance of weights before a ReLU is 2 / fan_in."""
    model = unet(NUM_CLASSES, "resnet18", weights=None)
    convolutions = [m for m in model.decoder.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 10
    for convolution in convolutions[:6]:  # those with enough weights to tell
        fan_in = convolution.weight[0].numel()
        assert convolution.weight.var().item() * fan_in == pytest.approx(2, rel=0.05)


def test_unet_is_built_from_any_timm_feature_extractor():
    encoder = timm.create_model("resnet18", features_only=True, out_indices=(0, 1, 2, 3))
    model = UNet(encoder, NUM_CLASSES, decoder_channels=(64, 32, 16, 8)).eval()  # stride 16
    with torch.no_grad():
        assert model(images(1, 3, 65, 71))["out"].shape == (1, NUM_CLASSES, 65, 71)


# The U-Net of the TensorFlow tutorial


def test_unet_transposed_has_as_many_weights_as_the_tutorial_prints():
    model = unet_transposed(3, "mobilenetv2_100", weights=None, freeze_encoder=True)
    # 3x3 kernels from the layer below and its skip, two numbers a channel for BatchNorm, one bias
    # a class. The tutorial's summary: 4,660,323 trainable weights.
    expected = 9 * (320 * 512 + (512 + 576) * 256 + (256 + 192) * 128 + (128 + 144) * 64)
    expected += 2 * (512 + 256 + 128 + 64) + 9 * (64 + 96) * 3 + 3
    assert expected == 4_660_323
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    # Of 6,504,227 in all, with the running mean and variance of each BatchNorm channel.
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    assert sum(v.numel() for v in state.values()) == 6_504_227


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 4)])
def test_a_transposed_convolution_doubles_the_size_and_reverses_a_strided_one(size):
    model = unet_transposed(NUM_CLASSES, "mobilenetv2_050", weights=None)
    layer = model.classifier
    nn.init.zeros_(layer.bias)
    x = images(1, layer.in_channels, *size)
    y = images(1, NUM_CLASSES, 2 * size[0], 2 * size[1])
    up = layer(x)
    assert up.shape == y.shape
    # <up(x), y> = <x, down(y)> for the strided convolution with the same kernel, padded as in the
    # encoders.
    down = F.conv2d(y, layer.weight, stride=2, padding=1)
    torch.testing.assert_close((up * y).sum(), (x * down).sum(), rtol=1e-4, atol=1e-4)


def test_skips_of_mobilenetv2_are_the_expanded_features_of_the_tutorial(tmp_path):
    published = timm.create_model("mobilenetv2_100").eval()
    safetensors.torch.save_file(published.state_dict(), tmp_path / "weights.safetensors")
    model = unet_transposed(NUM_CLASSES, weights=tmp_path / "weights.safetensors").eval()
    x = images(1, 3, 128, 128)
    expected = []
    with torch.no_grad():
        features = model.encoder(x)
        x = published.bn1(published.conv_stem(x))
        for stage in published.blocks:
            if stage[0].conv_dw.stride == (2, 2):
                expected.append(stage[0].bn1(stage[0].conv_pw(x)))  # block_..._expand_relu
            before, x = x, stage(x)
            last = stage[-1]
        x = last.bn2(last.conv_dw(last.bn1(last.conv_pw(before))))
        expected.append(last.conv_pwl(x))  # block_16_project
    assert [f.shape[1:] for f in features] == [
        (96, 64, 64),
        (144, 32, 32),
        (192, 16, 16),
        (576, 8, 8),
        (320, 4, 4),
    ]
    torch.testing.assert_close(features, expected)


def test_skips_of_densenet_come_after_batchnorm_and_relu(tmp_path):
    published = torchvision.models.densenet121().eval()
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    model = unet_transposed(NUM_CLASSES, "densenet121", weights=tmp_path / "weights.pth").eval()
    x = images(1, 3, 64, 64)
    expected = []
    with torch.no_grad():
        features = model.encoder(x)
        layers = published.features
        x = layers.norm0(layers.conv0(x)).relu()
        expected.append(x)  # conv1/relu
        x = layers.pool0(x)
        for i in (1, 2, 3):
            x = layers.get_submodule(f"denseblock{i}")(x)
            transition = layers.get_submodule(f"transition{i}")
            expected.append(transition.norm(x).relu())  # pool2_relu, pool3_relu, pool4_relu
            x = transition(x)
        expected.append(layers.norm5(layers.denseblock4(x)).relu())  # relu
    torch.testing.assert_close(features, expected)


def test_unet_transposed_names_the_strides_it_needs():
    with pytest.raises(InputError, match=r"strides \[4, 8, 16, 32\].*needs 2, 4, 8, 16, 32"):
        unet_transposed(NUM_CLASSES, "convnext_atto", weights=None)


# HRNet


def test_hrnet_w48_has_the_branches_and_the_size_of_the_paper():
    model = hrnet(19, "hrnet_w48", weights=None)
    assert model.encoder.feature_info.channels() == [48, 96, 192, 384]
    assert model.encoder.feature_info.reduction() == [4, 8, 16, 32]
    assert model.head[0].in_channels == model.head[0].out_channels == 15 * 48 == 720
    # Sun et al. 2019: 65.9 M with the 19 classes of Cityscapes.
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 65.9


def test_hrnets_head_sees_four_resolutions(tmp_path):
    published = timm.create_model("hrnet_w18_small").eval()
    safetensors.torch.save_file(published.state_dict(), tmp_path / "weights.safetensors")
    model = hrnet(NUM_CLASSES, "hrnet_w18_small", weights=tmp_path / "weights.safetensors").eval()
    seen = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = images(1, 3, 64, 96)
    with torch.no_grad():
        model(x)
        x = published.act1(published.bn1(published.conv1(x)))
        branches = published.stages(published.act2(published.bn2(published.conv2(x))))
    assert [b.shape[-2:] for b in branches] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    (concatenated,) = seen
    parts = concatenated.split([b.shape[1] for b in branches], dim=1)
    for branch, part in zip(branches, parts, strict=True):
        expected = F.interpolate(branch, size=(16, 24), mode="bilinear")
        torch.testing.assert_close(part, expected)


def test_hrnets_extra_background_is_trained_and_never_predicted():
    model = hrnet(NUM_CLASSES, "hrnet_w18_small", weights=None, extra_background=True).eval()
    x = images(2, 3, 65, 71)
    with torch.no_grad():
        predicted = model(x)["out"]
        model.training = True  # the model alone: its BatchNorm stays as it is
        trained = model(x)["out"]
    assert predicted.shape == (2, NUM_CLASSES, 17, 18)
    assert trained.shape == (2, NUM_CLASSES + 1, 17, 18)
    torch.testing.assert_close(predicted, trained[:, :NUM_CLASSES])
    target = torch.zeros(2, 17, 18, dtype=torch.long)
    F.cross_entropy(model.train()(x)["out"], target).backward()
    assert model.head[-1].weight.grad[-1].any()


def test_hrnet_refuses_other_encoders_and_names_its_own():
    with pytest.raises(InputError, match=r"'resnet18'; use one of hrnet_w18.* hrnet_w64"):
        hrnet(NUM_CLASSES, "resnet18", weights=None)


# LR-ASPP


@pytest.fixture
def published_lraspp(tmp_path: Path) -> tv.LRASPP:
    published = tv.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21)
    name = "lraspp_mobilenet_v3_large-d234d4ea.pth"
    torch.save(published.state_dict(), torch_cache(tmp_path) / name)
    return published.eval()


def test_published_weights_give_torchvisions_lraspp(published_lraspp):
    model = lraspp(21).eval()
    x = images(1, 3, 65, 71)
    with torch.no_grad():
        expected, logits = published_lraspp(x)["out"], model(x)["out"]
    assert torch.equal(enlarge(logits, (65, 71)), expected)
    assert model.state_dict().keys() == published_lraspp.state_dict().keys()


def test_another_number_of_classes_exchanges_both_classifiers_of_lraspp(published_lraspp, caplog):
    with caplog.at_level(logging.INFO):
        model = lraspp(NUM_CLASSES)
    exchanged = {
        f"classifier.{branch}_classifier.{kind}"
        for branch in ("low", "high")
        for kind in ("weight", "bias")
    }
    skipped = next(r.getMessage() for r in caplog.records if "skipped" in r.getMessage())
    assert set(skipped.split(": ")[1].split(", ")) == exchanged
    published = published_lraspp.state_dict()
    own = model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in published.items() if k not in exchanged)


# Vision transformers


def test_the_dpt_head_gives_the_logits_of_transformers_with_its_weights():
    """Its BatchNorm before the last convolution, which this one leaves out, goes into the one
    before: w' = w g, b' = beta - mean g with g = gamma / sqrt(var + eps).
    """
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = library.DPTConfig(
        hidden_size=64,
        neck_hidden_sizes=[8, 16, 32, 64],
        reassemble_factors=[4, 2, 1, 0.5],
        fusion_hidden_size=16,
        readout_type="ignore",
        num_labels=NUM_CLASSES,
        num_hidden_layers=1,
        num_attention_heads=2,
        backbone_out_indices=[0, 0, 0, 0],
    )
    reference = library.DPTForSemanticSegmentation(config).eval()
    for parameter in reference.parameters():  # biases start at 0, where nothing would show
        nn.init.normal_(parameter, std=0.15)
    batchnorm = reference.head.head[1]
    nn.init.normal_(batchnorm.running_mean)
    nn.init.uniform_(batchnorm.running_var, 0.5, 2)

    head = vit(NUM_CLASSES, "test_vit", weights=None, fusion_channels=16).head
    neck = reference.neck
    for ours, layer, smoothing in zip(
        head.reassemble, neck.reassemble_stage.layers, neck.convs, strict=True
    ):
        copy_weights(nn.Sequential(layer, smoothing), ours)
    for ours, layer in zip(reversed(head.fusions), neck.fusion_stage.layers, strict=True):
        copy_weights(layer.projection, ours.projection)
        copy_weights(layer.residual_layer2, ours.unit)
        if ours.skip_unit is not None:
            copy_weights(layer.residual_layer1, ours.skip_unit)
    gain = batchnorm.weight / (batchnorm.running_var + batchnorm.eps).sqrt()
    with torch.no_grad():
        head.classifier[0].weight.copy_(reference.head.head[0].weight * gain.view(-1, 1, 1, 1))
        head.classifier[0].bias.copy_(batchnorm.bias - batchnorm.running_mean * gain)
        copy_weights(reference.head.head[4], head.classifier[2])
        features = images(4, 2, 64, 4, 6)
        logits = head(list(features))
        tokens = features.flatten(3).transpose(2, 3)
        with_readout = [F.pad(each, (0, 0, 1, 0), value=9.0) for each in tokens]
        expected = reference.head(neck(with_readout, 4, 6))  # of twice the size: the last layer
    assert logits.shape == (2, NUM_CLASSES, 32, 48)
    enlarged = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=True)
    torch.testing.assert_close(enlarged, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Those of modules that list their tensors in one order."""
    tensors = zip(target.state_dict(), source.state_dict().values(), strict=True)
    target.load_state_dict(dict(tensors))


def test_dpt_on_dinov2_has_as_many_weights_as_the_published_network():
    model = vit(21, "vit_small_patch14_dinov2", weights=None, fusion_channels=64)
    # UniMatch V2's training log prints 24.8 M. It has a residual unit without an input, too.
    count = sum(p.numel() for p in model.parameters()) + 2 * (9 * 64 * 64 + 64)
    assert round(count / 1e6, 1) == 24.8
    assert model.layers == [2, 5, 8, 11]
    with torch.no_grad():  # an eighth of a patch: ceil(32 / 1.75), ceil(45 / 1.75)
        assert model.eval()(images(1, 3, 32, 45))["out"].shape == (1, 21, 19, 26)


def test_the_head_sees_the_normalised_tokens_of_evenly_spaced_layers(tmp_path):
    published = timm.create_model("test_vit.r160_in1k").eval()
    for parameter in published.parameters():
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(5))
    repository = timm.get_pretrained_cfg("test_vit.r160_in1k").hf_hub_id
    file = hugging_face_cache(tmp_path, repository) / "model.safetensors"
    safetensors.torch.save_file(published.state_dict(), file)
    model = vit(NUM_CLASSES, "test_vit.r160_in1k", fusion_channels=16).eval()
    assert model.mean == (0.5, 0.5, 0.5)
    seen = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = images(1, 3, 160, 160)
    with torch.no_grad():
        model(x)
        expected = published.get_intermediate_layers(x, [0, 2, 3, 5], reshape=True, norm=True)
    torch.testing.assert_close(seen[0], list(expected))
    with torch.no_grad():  # padded by its last column to whole patches
        model(x[..., :150])
        model(F.pad(x[..., :150], (0, 10, 0, 0), mode="replicate"))
    torch.testing.assert_close(seen[1], seen[2])


def test_a_frozen_vit_trains_its_head_only():
    model = MODELS["vit_frozen"]().train()
    assert not model.encoder.training
    assert model.head.training
    trainable = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"head"}


def test_what_is_no_plain_vision_transformer_is_refused():
    for encoder in ("resnet18", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"):
        with pytest.raises(InputError, match=f"'{encoder}', which is no plain vision transf"):
            vit(NUM_CLASSES, encoder, weights=None)
    with pytest.raises(InputError, match=r"'vit_smal_patch14_dinov2'.*did you mean"):
        vit(NUM_CLASSES, "vit_smal_patch14_dinov2", weights=None)
    with pytest.raises(InputError, match=r"cannot download .*model\.weights=FILE"):
        vit(NUM_CLASSES, "test_vit.r160_in1k")
    with pytest.raises(InputError, match=r"model\.head is 'upernet'; use one of dpt, linear"):
        vit(NUM_CLASSES, head="upernet")


# segmentation_models_pytorch


SMP_ARCHITECTURES = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus"),
    *("PAN", "UPerNet", "Segformer", "DPT"),
)


@pytest.mark.promise(12)
@pytest.mark.parametrize("architecture", SMP_ARCHITECTURES)
def test_every_architecture_of_smp_takes_every_size(architecture):
    pytest.importorskip("segmentation_models_pytorch")
    encoder = "tu-vit_tiny_patch16_224" if architecture == "DPT" else "resnet18"
    model = smp(NUM_CLASSES, architecture, encoder, weights=None).eval()
    for size in ((65, 71), (32, 32)):
        with torch.no_grad():
            logits = model(images(1, 3, *size))["out"]
        assert logits.shape == (1, NUM_CLASSES, *size)
        assert logits.isfinite().all()


def test_smp_gives_the_librarys_logits_with_the_published_encoder(tmp_path):
    library = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    expected = library.Unet("resnet18", encoder_weights=None, classes=NUM_CLASSES).eval()
    source = library.encoders.encoders["resnet18"]["pretrained_settings"]["imagenet"]
    folder = hugging_face_cache(tmp_path, source["repo_id"], source["revision"])
    safetensors.torch.save_file(expected.encoder.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}))
    model = smp(NUM_CLASSES, "Unet", "resnet18").eval()
    assert (model.mean, model.std) == ([0.1, 0.2, 0.3], [1, 2, 3])
    model.model.decoder.load_state_dict(expected.decoder.state_dict())
    model.model.segmentation_head.load_state_dict(expected.segmentation_head.state_dict())
    x = images(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(x)["out"], expected(x))


def test_smp_takes_timms_weights_for_timms_encoders(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pytest.importorskip("segmentation_models_pytorch")
    published = timm.create_model("tf_efficientnet_lite0.in1k")
    repository = timm.get_pretrained_cfg("tf_efficientnet_lite0.in1k").hf_hub_id
    file = hugging_face_cache(tmp_path, repository) / "model.safetensors"
    safetensors.torch.save_file(published.state_dict(), file)
    model = smp(NUM_CLASSES, "FPN", "tu-tf_efficientnet_lite0.in1k")
    own = model.model.encoder.model.state_dict()
    assert all(torch.equal(v, published.state_dict()[k]) for k, v in own.items())
    assert model.mean == (0.5, 0.5, 0.5)
    (line,) = caplog.messages
    assert line == f"loaded the weights of the encoder tf_efficientnet_lite0.in1k from {file}"


def test_smp_takes_the_weights_of_a_file_and_refuses_those_of_another_encoder(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    library = pytest.importorskip("segmentation_models_pytorch")
    for name in ("resnet18", "resnet34"):
        encoder = library.encoders.get_encoder(name, weights=None)
        torch.save(encoder.state_dict(), tmp_path / f"{name}.pth")
    model = smp(NUM_CLASSES, "FPN", "resnet34", weights=tmp_path / "resnet34.pth")
    (line,) = caplog.messages
    assert line == f"loaded the weights of the encoder resnet34 from {tmp_path / 'resnet34.pth'}"
    own = model.model.encoder.state_dict()
    assert all(torch.equal(own[k], v) for k, v in encoder.state_dict().items())
    with pytest.raises(InputError, match=r"resnet18\.pth does not fit the encoder resnet34"):
        smp(NUM_CLASSES, "FPN", "resnet34", weights=tmp_path / "resnet18.pth")


def test_smp_refuses_unknown_names_with_the_alternatives():
    pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(InputError, match=r"'unet3'; use one of Unet, .*DPT"):
        smp(NUM_CLASSES, "unet3")
    with pytest.raises(InputError, match=r"'resnet43'.*resnet34.*tu-NAME"):
        smp(NUM_CLASSES, "Unet", "resnet43")
    with pytest.raises(InputError, match=r"'coco'.*use one of imagenet"):
        smp(NUM_CLASSES, "Unet", "resnet18", weights="coco")
    with pytest.raises(InputError, match="cannot make DPT with resnet18"):
        smp(NUM_CLASSES, "DPT", "resnet18", weights=None)


@pytest.mark.promise(8)
def test_smp_architectures_that_pool_refuse_to_train_on_a_batch_of_one():
    pytest.importorskip("segmentation_models_pytorch")
    model = smp(NUM_CLASSES, "DeepLabV3Plus", "resnet18", weights=None).train()
    with pytest.raises(InputError, match=r"data\.batch_size=2"):
        model(images(1, 3, 64, 64))


# transformers


def test_transformers_gives_the_librarys_logits():
    pytest.importorskip("transformers")
    model = transformers(NUM_CLASSES, SEGFORMER).eval()
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        expected = model.model(pixel_values=x).logits
        logits = model(x)["out"]
    assert logits.shape == (2, NUM_CLASSES, 16, 24)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("source", ["hub", "folder"])
def test_transformers_takes_published_weights_but_for_other_classes(source, tmp_path, caplog):
    pytest.importorskip("transformers")
    published = transformers(7, SEGFORMER).model
    folder = hugging_face_cache(tmp_path, "nvidia/segformer")
    published.save_pretrained(folder)
    normalisation = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation))
    weights = "nvidia/segformer" if source == "hub" else folder
    with caplog.at_level(logging.INFO):
        model = transformers(NUM_CLASSES, SEGFORMER, weights)
    exchanged = {"decode_head.classifier.weight", "decode_head.classifier.bias"}
    skipped = next(r.getMessage() for r in caplog.records if "skipped" in r.getMessage())
    assert set(skipped.split(": ")[1].split(", ")) == exchanged
    assert all(module.training for module in model.modules())  # as Lightning will train it
    own = model.model.state_dict()
    for name, tensor in published.state_dict().items():
        assert torch.equal(tensor, own[name]) or name in exchanged, name
    assert own["decode_head.classifier.weight"].shape[0] == NUM_CLASSES
    assert (model.mean, model.std) == ([0.1, 0.2, 0.3], [1, 2, 3])


def test_transformers_takes_an_encoder_without_a_head_and_refuses_another_encoder(tmp_path):
    pytest.importorskip("transformers")
    published = transformers(7, SEGFORMER).model.segformer
    published.save_pretrained(tmp_path)
    model = transformers(NUM_CLASSES, SEGFORMER, tmp_path).model.segformer
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in published.state_dict().items())
    with pytest.raises(InputError, match=r"does not fit model\.config: .* tensors of the encoder"):
        transformers(NUM_CLASSES, {**SEGFORMER, "depths": [2, 1, 1, 1]}, tmp_path)


def test_transformers_without_network_is_one_message(tmp_path):
    pytest.importorskip("transformers")
    for weights in ("nvidia/segformer", tmp_path / "absent"):
        with pytest.raises(InputError) as error:
            transformers(NUM_CLASSES, SEGFORMER, weights)
        for part in (str(weights), "model.weights=FOLDER", "model.weights=null"):
            assert part in str(error.value)
        assert "\n" not in str(error.value)


def test_d26_a_broken_file_of_transformers_is_one_message(tmp_path):
    pytest.importorskip("transformers")
    transformers(NUM_CLASSES, SEGFORMER).model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    for content in (file.read_bytes()[:-1000], b"<!DOCTYPE html>", b""):
        file.write_bytes(content)
        with pytest.raises(InputError, match="cannot load"):
            transformers(NUM_CLASSES, SEGFORMER, tmp_path)


def test_transformers_refuses_configurations_that_make_no_model():
    pytest.importorskip("transformers")
    for config in ({}, {"model_type": "bert"}):
        with pytest.raises(InputError, match=r"model_type is .*; use one of .*segformer"):
            transformers(NUM_CLASSES, config)
    with pytest.raises(InputError, match=r"model\.config: "):
        transformers(NUM_CLASSES, {**SEGFORMER, "hidden_sizes": 3})
    # Would be code from the Hub, in a checkpoint from anywhere.
    with pytest.raises(InputError, match="attn_implementation"):
        transformers(NUM_CLASSES, {**SEGFORMER, "attn_implementation": "somebody/kernel"})


# Mask classification


def library_loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The loss of transformers, with its own criterion, of masks of each class."""
    library = copy.deepcopy(model.model)
    library.criterion = library.criterion.criterion
    # OneFormer's loss of texts, which there are none of; its own check would refuse `None`.
    object.__setattr__(library.config, "contrastive_temperature", None)
    present = [each.unique() for each in target]
    masks = [(t == ids[:, None, None]).float() for t, ids in zip(target, present, strict=True)]
    inputs = {"task_inputs": model.task.expand(len(x), -1)} if hasattr(model, "task") else {}
    outputs = library(pixel_values=x, mask_labels=masks, class_labels=present, **inputs)
    return outputs.loss


def regions(*shape: int) -> Tensor:
    """Labels of three classes, in squares of 16 pixels."""
    coarse = torch.randint(3, (shape[0], shape[1] // 16, shape[2] // 16))
    return coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)


@pytest.mark.parametrize("kind", MASK_MODELS)
def test_without_ignored_pixels_the_loss_is_that_of_transformers(kind):
    """Exactly for MaskFormer, the others' is estimated at points drawn at random."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    points = {} if kind == "maskformer" else {"train_num_points": 20_000}
    model = transformers(NUM_CLASSES, MASK_MODELS[kind] | points).eval()
    model.model.criterion.criterion.importance_sample_ratio = 0.75
    side = 32 if kind == "eomt" else 64
    x, target = images(2, 3, side, side), regions(2, side, side)
    with torch.no_grad():
        expected = library_loss(model, x, target)
        loss = model(x, target)["loss"]
    tolerance = 1e-6 if kind == "maskformer" else 0.005
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)


@pytest.mark.parametrize("kind", MASK_MODELS)
def test_the_loss_of_masks_does_not_see_ignored_pixels(kind):
    pytest.importorskip("transformers")
    criterion = transformers(NUM_CLASSES, MASK_MODELS[kind]).model.criterion
    torch.manual_seed(0)
    masks, classes = torch.randn(2, 5, 16, 24), torch.randn(2, 5, NUM_CLASSES + 1)
    target = regions(2, 16, 24 * 16)[..., ::16].repeat_interleave(1, 1)
    target[:, 4:, 5:] = 255

    def loss_and_gradient(masks: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(1)  # of the points
        masks = masks.clone().requires_grad_()
        terms = criterion(masks, classes, target, target)
        sum(terms.values()).backward()
        return terms, masks.grad

    terms, gradient = loss_and_gradient(masks)
    other = masks.where(target[:, None] != 255, 100 * torch.randn_like(masks))
    other_terms, other_gradient = loss_and_gradient(other)
    assert all(torch.equal(value, other_terms[name]) for name, value in terms.items())
    assert torch.equal(gradient, other_gradient)
    assert not gradient.where(target[:, None] == 255, 0).any()
    assert gradient[:, :, :4].any()
    # As if they were cut away.
    if kind == "maskformer":
        cut = criterion(masks[..., :4, :], classes, target[:, :4], target)
        target[:, 4:] = 255
        rest = criterion(masks, classes, target, target)
        for name, value in cut.items():
            torch.testing.assert_close(value, rest[name])


@pytest.mark.parametrize("kind", MASK_MODELS)
def test_images_without_a_label_have_no_part_in_the_loss_of_masks(kind):
    pytest.importorskip("transformers")
    model = transformers(NUM_CLASSES, MASK_MODELS[kind])
    criterion = model.model.criterion
    masks, classes = torch.randn(2, 5, 8, 8), torch.randn(2, 5, NUM_CLASSES + 1)
    target = torch.zeros(2, 16, 16, dtype=torch.uint8)
    target[1] = 255
    torch.manual_seed(0)
    both = criterion(masks, classes, target, target)
    torch.manual_seed(0)
    alone = criterion(masks[:1], classes[:1], target[:1], target[:1])
    assert all(torch.equal(value, alone[name]) for name, value in both.items())
    loss = model(images(2, 3, 33, 40), torch.full((2, 33, 40), 255, dtype=torch.uint8))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_each_class_is_matched_with_the_query_that_costs_least():
    """By trying every assignment, with the costs of Cheng et al. (2022) by hand."""
    pytest.importorskip("transformers")
    criterion = transformers(NUM_CLASSES, MASK2FORMER).model.criterion
    # With this seed each of the costs decides, and that the first row is ignored.
    generator = torch.Generator().manual_seed(319)
    masks = torch.randn(4, 6, 6, generator=generator) * 3
    classes = torch.randn(4, NUM_CLASSES + 1, generator=generator)
    target = torch.randint(3, (6, 6), generator=generator)
    target[0] = 255
    known = target != 255

    def cost(query: int, label: int) -> float:
        inside = (target[known] == label).double()
        logits = masks[query][known].double()
        p = logits.sigmoid()
        cross_entropy = F.binary_cross_entropy(p, inside)
        dice = 1 - (2 * (p * inside).sum() + 1) / (p.sum() + inside.sum() + 1)
        probability = classes[query].softmax(0)[label]
        return (5 * cross_entropy + 5 * dice - 2 * probability).item()

    best = min(
        itertools.permutations(range(4), 3),
        key=lambda queries: sum(cost(q, label) for label, q in enumerate(queries)),
    )
    queries, columns = criterion._match(classes, masks, target, torch.arange(3))
    assert [queries[columns == label].item() for label in range(3)] == list(best)


def test_mask_models_take_published_weights_but_for_other_classes(tmp_path, caplog):
    pytest.importorskip("transformers")
    published = transformers(7, MASK2FORMER).model
    published.criterion = published.criterion.criterion  # as the library has it
    published.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        model = transformers(NUM_CLASSES, MASK2FORMER, tmp_path).model
    own = model.state_dict()
    for name, tensor in published.state_dict().items():
        if not name.startswith(("class_predictor", "criterion")):
            assert torch.equal(tensor, own[name]), name
    assert own["class_predictor.weight"].shape[0] == NUM_CLASSES + 1
    assert "class_predictor.weight" in caplog.text
    with pytest.raises(InputError, match=r"does not fit model\.config"):
        transformers(NUM_CLASSES, MASK2FORMER | {"num_queries": 6}, tmp_path)


# Parameters that no output depends on

TINY_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 96,
    "patch_size": 16,
}
PARTLY_UNUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {  # and a layer that is not used
    "dpt": (
        lambda: transformers(
            NUM_CLASSES,
            TINY_VIT
            | {"model_type": "dpt", "backbone_out_indices": [0, 1, 2, 3]}
            | {"neck_hidden_sizes": [8, 16, 32, 32], "fusion_hidden_size": 16},
        ),
        "fusion_stage.layers.0.residual_layer1",
    ),
    "beit": (
        lambda: transformers(
            NUM_CLASSES,
            TINY_VIT | {"model_type": "beit", "num_hidden_layers": 5, "out_indices": [1, 2, 3, 4]},
        ),
        ".4.attention",
    ),
    "data2vec": (
        lambda: transformers(
            NUM_CLASSES, TINY_VIT | {"model_type": "data2vec-vision", "out_indices": [1, 2, 2, 3]}
        ),
        "layer.3.attention",
    ),
    "mobilenet_v2": (
        lambda: transformers(NUM_CLASSES, {"model_type": "mobilenet_v2", "depth_multiplier": 0.25}),
        "conv_1x1",
    ),
    "smp PSPNet": (lambda: smp(NUM_CLASSES, "PSPNet", "resnet18", weights=None), "layer4"),
    "smp DPT": (
        lambda: smp(NUM_CLASSES, "DPT", "tu-vit_tiny_patch16_224", weights=None),
        "encoder.model.norm",
    ),
}


def train_step(network: Network, size: int) -> list[str]:
    """The trainable parameters that a step of training gives no gradient."""
    x = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    losses = [logits.square().mean() for logits in network.train()(x).values()]
    sum(losses).backward()
    return [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("kind", PARTLY_UNUSED)
@pytest.mark.parametrize("meta_works", [True, False])
def test_d21_every_trainable_parameter_gets_a_gradient(kind, meta_works, monkeypatch):
    pytest.importorskip("segmentation_models_pytorch" if "smp" in kind else "transformers")
    build, unused_layer = PARTLY_UNUSED[kind]
    network = Network(build()).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    expected = train_step(copy.deepcopy(network), 96)
    if not meta_works:
        monkeypatch.setattr(nn.Module, "to", refuse_meta(nn.Module.to))
    random_state = torch.get_rng_state()
    frozen = freeze_unused_parameters(network)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert frozen == expected
    assert any(unused_layer in name for name in frozen)
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(before[k], tensor) for k, tensor in network.state_dict().items())
    assert train_step(network, 96) == []
    assert freeze_unused_parameters(network) == []


def refuse_meta(to: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def without_meta(self: nn.Module, device: object = None, **options: object) -> nn.Module:
        if device == "meta":
            raise NotImplementedError("no kernel for meta tensors")
        return to(self, device, **options)

    return without_meta


def test_d21_nothing_is_frozen_where_everything_is_used(model):
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    unused = [name for name in trainable if re.search(UNUSED, name)]
    assert freeze_unused_parameters(Network(model)) == [f"model.{name}" for name in unused]
    assert [n for n, p in model.named_parameters() if p.requires_grad or n in unused] == trainable


def test_a_model_that_takes_other_images_only_is_left_as_it_is(caplog):
    network = Network(nn.Conv2d(2, NUM_CLASSES, 1))  # but mean and std are of three channels
    assert freeze_unused_parameters(network) == []
    assert "cannot tell" in caplog.text
    assert all(p.requires_grad for p in network.parameters())


def test_networks_take_any_number_of_channels():
    model = nn.Conv2d(5, NUM_CLASSES, 1)
    network = Network(model, mean=[0.1, 0.2, 0.3, 0.4, 0.5], std=[1, 2, 3, 4, 5])
    x = torch.randint(256, (2, 5, 33, 40), dtype=torch.uint8)
    scaled = (x / 255 - torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).view(5, 1, 1)) / torch.arange(
        1, 6
    ).view(5, 1, 1)
    torch.testing.assert_close(network(x)["out"], model(scaled))


# Weights that match


@pytest.mark.promise(26)
def test_matching_weights_are_loaded_and_the_others_listed_in_one_line(caplog):
    source = deeplabv3(7, "mobilenet_v3_large", None)
    model = deeplabv3(NUM_CLASSES, "mobilenet_v3_large", None, aux=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        load_matching_weights(model, source.state_dict(), "run/best.ckpt")
    (line,) = caplog.messages
    classifier = ["classifier.4.weight", "classifier.4.bias"]
    loaded = len(before) - 2
    assert f"loaded {loaded} of {len(before)} tensors from run/best.ckpt" in line
    assert line.endswith(f"newly initialised: {', '.join(classifier)}")
    assert "aux_classifier.4.weight" in line.split("skipped: ")[1]
    for name, tensor in model.state_dict().items():
        origin = before if name in classifier else source.state_dict()
        assert torch.equal(tensor, origin[name]), name
    with pytest.raises(InputError, match=r"2 of its \d+ tensors .* classifier\.4\.weight"):
        load_matching_weights(model, source.state_dict(), "run/best.ckpt", ("aux_classifier.",))


@pytest.mark.parametrize("extra", EXTRAS)
def test_d33_a_missing_extra_names_the_command_that_installs_it(extra, monkeypatch):
    monkeypatch.setitem(sys.modules, EXTRAS[extra], None)
    distribution = EXTRAS[extra].replace("_", "-")
    with pytest.raises(InputError, match=rf"pip install {distribution}$"):
        MODELS[extra]()


# Configurations


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
    network, labels = checkpoint.build_network(content)
    assert len(labels) == NUM_CLASSES
    x = images(1, 3, 40, 56)
    with torch.no_grad():
        logits, expected = network.model.eval()(x)["out"], original.eval()(x)["out"]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # in another memory format
