"""FCN, DeepLabv3 and LR-ASPP, beside torchvision's with the same weights."""

import logging
from pathlib import Path

import pytest
import torch
import torchvision
from models_for_tests import (
    MODELS,
    NUM_CLASSES,
    caches,  # noqa: F401
    enlarge,
    images,
    published_mobilenet,
    strided,
    torch_cache,
)
from torch import nn
from torchvision.models import segmentation as tv

from seg_torch.errors import InputError
from seg_torch.models import deeplabv3, fcn, lraspp


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


@pytest.mark.promise(26)
def test_another_number_of_classes_exchanges_the_last_layers_only(tmp_path, caplog):
    published_model = published_mobilenet(tmp_path)
    with caplog.at_level(logging.INFO):
        model = deeplabv3(NUM_CLASSES, "mobilenet_v3_large")
    exchanged = {
        f"{head}.4.{kind}"
        for head in ("classifier", "aux_classifier")
        for kind in ("weight", "bias")
    }
    skipped = next(r.getMessage() for r in caplog.records if "skipped" in r.getMessage())
    assert set(skipped.split(": ")[1].split(", ")) == exchanged
    published = published_model.state_dict()
    for name, tensor in model.state_dict().items():
        if name in exchanged:
            assert tensor.shape[0] == NUM_CLASSES
        else:
            assert torch.equal(tensor, published[name]), name


def test_published_weights_without_the_aux_head(tmp_path):
    published_model = published_mobilenet(tmp_path)
    model = deeplabv3(21, "mobilenet_v3_large", aux=False).eval()
    x = images(1, 3, 32, 32)
    with torch.no_grad():
        outputs = model(x)
        expected = published_model.eval()(x)["out"]
    assert set(outputs) == {"out"}
    assert torch.equal(enlarge(outputs["out"], (32, 32)), expected)


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
