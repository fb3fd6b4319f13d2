import logging
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
from torch import Tensor, nn
from torchvision.models import segmentation as tv

from seg_torch.errors import InputError
from seg_torch.models import UNet, deeplabv3, fcn, unet
from seg_torch.models.weights import read_state_dict

NUM_CLASSES = 3

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
}


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
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


def hugging_face_cache(tmp_path: Path, repository: str) -> Path:
    """Where the Hub client looks for the files of `repository`."""
    folder = tmp_path / "hf" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
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
def test_a_frozen_encoder_does_not_move_in_training(call_train):
    model = unet(NUM_CLASSES, "resnet18", weights=None, freeze_encoder=True)
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

    def download(repository: str, file_name: str, local_files_only: bool = False) -> str:
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


def test_unet_is_built_from_any_timm_feature_extractor():
    encoder = timm.create_model("resnet18", features_only=True, out_indices=(0, 1, 2, 3))
    model = UNet(encoder, NUM_CLASSES, decoder_channels=(64, 32, 16, 8)).eval()  # stride 16
    with torch.no_grad():
        assert model(images(1, 3, 65, 71))["out"].shape == (1, NUM_CLASSES, 65, 71)
