"""Models of transformers that give logits, beside the library's own."""

import json
import logging

import pytest
import torch
from models_for_tests import (
    NUM_CLASSES,
    SEGFORMER,
    caches,  # noqa: F401
    hugging_face_cache,
    images,
)

from seg_torch.errors import InputError
from seg_torch.models import transformers

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
