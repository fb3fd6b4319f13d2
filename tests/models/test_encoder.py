"""Encoders of timm: frozen ones, and that every tensor comes from the file."""

import logging
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from models_for_tests import NUM_CLASSES, caches, hugging_face_cache, images  # noqa: F401
from torch import nn

from seg_torch.errors import InputError
from seg_torch.models import unet, unet_transposed
from seg_torch.models.weights import timm_model


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
    caplog.set_level(logging.ERROR, "timm")  # as on the command line
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
