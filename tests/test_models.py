import json
import logging
import sys
import urllib.request
from collections.abc import Callable
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
from torchvision.models import segmentation as tv

from seg_torch import checkpoint
from seg_torch.errors import InputError
from seg_torch.labels import Labels
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
)
from seg_torch.models.weights import read_state_dict

NUM_CLASSES = 3
SEGFORMER = {
    "model_type": "segformer",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 40, 64],
    "decoder_hidden_size": 16,
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
    "smp": lambda: smp(NUM_CLASSES, "Unet", "resnet18", weights=None),
    "transformers": lambda: transformers(NUM_CLASSES, SEGFORMER),
}
EXTRAS = {"smp": "segmentation_models_pytorch", "transformers": "transformers"}


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


@pytest.mark.parametrize("size", [(65, 71), (32, 32)])
def test_logits_have_the_size_of_the_input(model, size):
    with torch.no_grad():
        outputs = model.eval()(images(1, 3, *size))
    for logits in outputs.values():
        assert logits.shape == (1, NUM_CLASSES, *size)
        assert logits.isfinite().all()


def test_aux_head_is_there_when_asked_for(model, name):
    with torch.no_grad():
        outputs = model.eval()(images(1, 3, 32, 32))
    has_aux = name in ("fcn", "deeplabv3", "deeplabv3_mobilenet")
    assert set(outputs) == ({"out", "aux"} if has_aux else {"out"})


def test_gradient_reaches_every_trainable_parameter(model):
    outputs = model.train()(images(2, 3, 65, 71))
    target = torch.randint(NUM_CLASSES, (2, 65, 71), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    sum(F.cross_entropy(logits, target) for logits in outputs.values()).backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert [name for name, p in trainable.items() if p.grad is None or not p.grad.any()] == []


def test_saved_and_loaded_gives_equal_logits(model, name, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other = MODELS[name]()
    other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    x = images(1, 3, 33, 47)
    with torch.no_grad():
        assert torch.equal(model.eval()(x)["out"], other.eval()(x)["out"])


def test_channels_last_and_bf16_autocast_work(model):
    x = images(2, 3, 65, 71).to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.train()(x)["out"]
    assert logits.shape == (2, NUM_CLASSES, 65, 71)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("build", "reference", "file_name"),
    [
        (fcn, tv.fcn_resnet50, "fcn_resnet50_coco-1167a1af.pth"),
        (deeplabv3, tv.deeplabv3_resnet50, "deeplabv3_resnet50_coco-cd0a2569.pth"),
    ],
)
def test_published_weights_give_torchvisions_logits(build, reference, file_name, tmp_path):
    expected = reference(weights=None, weights_backbone=None, num_classes=21, aux_loss=True).eval()
    torch.save(expected.state_dict(), torch_cache(tmp_path) / file_name)
    model = build(21, "resnet50").eval()
    assert model.state_dict().keys() == expected.state_dict().keys()
    x = images(1, 3, 65, 71)
    with torch.no_grad():
        outputs, expected_outputs = model(x), expected(x)
    assert outputs.keys() == expected_outputs.keys()
    for name in outputs:
        torch.testing.assert_close(outputs[name], expected_outputs[name], rtol=0, atol=1e-5)


@pytest.fixture
def published_mobilenet(tmp_path: Path) -> tv.DeepLabV3:
    published = tv.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    )
    name = "deeplabv3_mobilenet_v3_large-fc3c493d.pth"
    torch.save(published.state_dict(), torch_cache(tmp_path) / name)
    return published


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
    torch.testing.assert_close(outputs["out"], expected)


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


def test_files_that_are_no_state_dict_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"absent\.pth does not exist"):
        read_state_dict(tmp_path / "absent.pth")
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"<!DOCTYPE html>")
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            read_state_dict(tmp_path / name)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(InputError, match=r"empty\.pth cannot be read"):
        read_state_dict(tmp_path / "empty.pth")
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


def test_imagenet_weights_that_cannot_be_downloaded_are_one_message():
    with pytest.raises(InputError, match=r"ImageNet weights of resnet50.*model\.weights=null"):
        deeplabv3(NUM_CLASSES, "resnet50", "imagenet")


def test_deeplabv3_has_the_atrous_rates_asked_for_and_torchvisions_by_default():
    def rates(model: nn.Module) -> list[int]:
        layers = [m for m in model.classifier.modules() if isinstance(m, nn.Conv2d)]
        return [layer.dilation[0] for layer in layers if layer.dilation[0] > 1]

    assert rates(deeplabv3(NUM_CLASSES, "mobilenet_v3_large", None)) == [12, 24, 36]
    book = deeplabv3(NUM_CLASSES, "mobilenet_v3_large", None, atrous_rates=[6, 12, 18])
    assert rates(book) == [6, 12, 18]


def test_deeplabv3_refuses_to_train_on_a_batch_of_one():
    model = MODELS["deeplabv3_mobilenet"]().train()
    with pytest.raises(InputError, match=r"data\.batch_size=2"):
        model(images(1, 3, 32, 32))


def test_deeplabv3_with_frozen_batchnorm_trains_on_a_batch_of_one():
    model = MODELS["deeplabv3_mobilenet"]().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert model(images(1, 3, 32, 32))["out"].requires_grad


# Lightning trains a model in the modes it was built with, and calls train() after a validation.
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
def test_unet_encoder_has_the_published_weights(encoder, source, tmp_path):
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
    assert predicted.shape == (2, NUM_CLASSES, 65, 71)
    assert trained.shape == (2, NUM_CLASSES + 1, 65, 71)
    torch.testing.assert_close(predicted, trained[:, :NUM_CLASSES])
    target = torch.zeros(2, 65, 71, dtype=torch.long)
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
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


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


# segmentation_models_pytorch


SMP_ARCHITECTURES = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus"),
    *("PAN", "UPerNet", "Segformer", "DPT"),
)


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


def test_smp_takes_timms_weights_for_timms_encoders(tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    published = timm.create_model("tf_efficientnet_lite0.in1k")
    repository = timm.get_pretrained_cfg("tf_efficientnet_lite0.in1k").hf_hub_id
    file = hugging_face_cache(tmp_path, repository) / "model.safetensors"
    safetensors.torch.save_file(published.state_dict(), file)
    model = smp(NUM_CLASSES, "FPN", "tu-tf_efficientnet_lite0.in1k")
    own = model.model.encoder.model.state_dict()
    assert all(torch.equal(v, published.state_dict()[k]) for k, v in own.items())
    assert model.mean == (0.5, 0.5, 0.5)


def test_smp_takes_the_weights_of_a_file_and_refuses_those_of_another_encoder(tmp_path):
    library = pytest.importorskip("segmentation_models_pytorch")
    for name in ("resnet18", "resnet34"):
        encoder = library.encoders.get_encoder(name, weights=None)
        torch.save(encoder.state_dict(), tmp_path / f"{name}.pth")
    model = smp(NUM_CLASSES, "FPN", "resnet34", weights=tmp_path / "resnet34.pth")
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


def test_smp_architectures_that_pool_refuse_to_train_on_a_batch_of_one():
    pytest.importorskip("segmentation_models_pytorch")
    model = smp(NUM_CLASSES, "DeepLabV3Plus", "resnet18", weights=None).train()
    with pytest.raises(InputError, match=r"data\.batch_size=2"):
        model(images(1, 3, 64, 64))


# transformers


def test_transformers_gives_the_librarys_logits_enlarged():
    pytest.importorskip("transformers")
    model = transformers(NUM_CLASSES, SEGFORMER).eval()
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        small = model.model(pixel_values=x).logits
        logits = model(x)["out"]
    assert small.shape == (2, NUM_CLASSES, 16, 24)
    torch.testing.assert_close(logits, F.interpolate(small, size=(64, 96), mode="bilinear"))


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


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_names_the_command_that_installs_it(extra, monkeypatch):
    monkeypatch.setitem(sys.modules, EXTRAS[extra], None)
    with pytest.raises(InputError, match=rf"pip install 'seg_torch\[{extra}\]'"):
        MODELS[extra]()


# Configurations


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=hrnet", "model.encoder=hrnet_w18_small", "model.extra_background=true"],
        ["model=unet_transposed"],
        ["model=lraspp"],
        ["model=smp"],
        ["model=segformer"],
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
