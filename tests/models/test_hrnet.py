"""HRNetV2, beside its paper."""

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from models_for_tests import NUM_CLASSES, caches, images  # noqa: F401

from seg_torch.errors import InputError
from seg_torch.models import hrnet


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
    x = images(2, 3, 68, 72)
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
