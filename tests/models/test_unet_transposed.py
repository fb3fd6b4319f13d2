"""The U-Net of the TensorFlow tutorial."""

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from models_for_tests import NUM_CLASSES, caches, images  # noqa: F401
from torch import nn

from seg_torch.errors import InputError
from seg_torch.models import unet_transposed


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
