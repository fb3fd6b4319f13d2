"""Plain vision transformers, beside those of transformers and the published sizes."""

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from models_for_tests import (
    MODELS,
    NUM_CLASSES,
    caches,  # noqa: F401
    copy_weights,
    hugging_face_cache,
    images,
)
from torch import nn

from seg_torch.errors import InputError
from seg_torch.models import vit


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


def test_dpt_on_dinov2_has_as_many_weights_as_the_published_network():
    model = vit(21, "vit_small_patch14_dinov2", weights=None, fusion_channels=64)
    # UniMatch V2's training log prints 24.8 M. It has a residual unit without an input, too.
    count = sum(p.numel() for p in model.parameters()) + 2 * (9 * 64 * 64 + 64)
    assert round(count / 1e6, 1) == 24.8
    assert model.layers == [2, 5, 8, 11]
    with torch.no_grad():  # an eighth of a patch: 35 / 1.75, 49 / 1.75
        assert model.eval()(images(1, 3, 35, 49))["out"].shape == (1, 21, 20, 28)


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
