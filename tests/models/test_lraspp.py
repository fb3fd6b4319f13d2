"""LR-ASPP, beside torchvision's with the same weights."""

import logging
from pathlib import Path

import pytest
import torch
from models_for_tests import NUM_CLASSES, caches, enlarge, images, torch_cache  # noqa: F401
from torchvision.models import segmentation as tv

from seg_torch.models import lraspp


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
