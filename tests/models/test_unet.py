"""U-Net, beside that of segmentation_models_pytorch."""

import huggingface_hub
import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from models_for_tests import NUM_CLASSES, caches, images  # noqa: F401
from torch import nn

from seg_torch.errors import InputError
from seg_torch.models import UNet, unet
from seg_torch.models.unet import DecoderStage


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

    def download(*_, **__):
        pytest.fail("the Hub client retries for half a minute")

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


def test_e17_a_stage_doubles_its_map_whatever_the_size_it_is_to_have():
    """A ConvNeXt gives 16 rows for 65 pixels at stride 4: at stride 2 they cover 32 of 33 rows."""
    stage = DecoderStage(1, 0, 1)
    stage.convolutions = nn.Identity()
    x = torch.arange(16.0).view(1, 1, 16, 1).expand(1, 1, 16, 16)
    rows = stage(x, None, (33, 32))[0, 0, :, 0]
    assert rows.tolist() == [min(i // 2, 15) for i in range(33)]
