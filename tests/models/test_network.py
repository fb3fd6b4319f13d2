"""Networks: parameters that no output depends on, BatchNorm of several processes, channels."""

import copy
from collections.abc import Callable

import pytest
import torch
from models_for_tests import NUM_CLASSES, caches  # noqa: F401
from torch import nn

from seg_torch.errors import InputError
from seg_torch.models import smp, transformers, unet
from seg_torch.models.network import Network, freeze_unused_parameters


@pytest.mark.parametrize("encoder", ["efficientnet_b0", "mobilenetv2_100", "densenet121"])
def test_d01_pytorchs_own_conversion_would_not(encoder):
    network = Network(unet(NUM_CLASSES, encoder, weights=None)).eval()
    x = torch.randint(256, (2, 3, 65, 71), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(x)["out"]
        logits = nn.SyncBatchNorm.convert_sync_batchnorm(network)(x)["out"]
    assert (logits - expected).abs().max() > 0.1 * expected.abs().max()


# Parameters that no output depends on

TINY_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 96,
    "patch_size": 16,
}

PARTLY_UNUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {  # and a layer that is not used
    "dpt": (
        lambda: transformers(
            NUM_CLASSES,
            TINY_VIT
            | {"model_type": "dpt", "backbone_out_indices": [0, 1, 2, 3]}
            | {"neck_hidden_sizes": [8, 16, 32, 32], "fusion_hidden_size": 16},
        ),
        "fusion_stage.layers.0.residual_layer1",
    ),
    "beit": (
        lambda: transformers(
            NUM_CLASSES,
            TINY_VIT | {"model_type": "beit", "num_hidden_layers": 5, "out_indices": [1, 2, 3, 4]},
        ),
        ".4.attention",
    ),
    "data2vec": (
        lambda: transformers(
            NUM_CLASSES, TINY_VIT | {"model_type": "data2vec-vision", "out_indices": [1, 2, 2, 3]}
        ),
        "layer.3.attention",
    ),
    "mobilenet_v2": (
        lambda: transformers(NUM_CLASSES, {"model_type": "mobilenet_v2", "depth_multiplier": 0.25}),
        "conv_1x1",
    ),
    "smp PSPNet": (lambda: smp(NUM_CLASSES, "PSPNet", "resnet18", weights=None), "layer4"),
    "smp DPT": (
        lambda: smp(NUM_CLASSES, "DPT", "tu-vit_tiny_patch16_224", weights=None),
        "encoder.model.norm",
    ),
}


def train_step(network: Network, size: int) -> list[str]:
    """The trainable parameters that a step of training gives no gradient."""
    x = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    losses = [logits.square().mean() for logits in network.train()(x).values()]
    sum(losses).backward()
    return [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("kind", PARTLY_UNUSED)
@pytest.mark.parametrize("meta_works", [True, False])
def test_d21_every_trainable_parameter_gets_a_gradient(kind, meta_works, monkeypatch):
    pytest.importorskip("segmentation_models_pytorch" if "smp" in kind else "transformers")
    build, unused_layer = PARTLY_UNUSED[kind]
    network = Network(build()).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    expected = train_step(copy.deepcopy(network), 96)
    if not meta_works:
        monkeypatch.setattr(nn.Module, "to", refuse_meta(nn.Module.to))
    random_state = torch.get_rng_state()
    frozen = freeze_unused_parameters(network)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert frozen == expected
    assert any(unused_layer in name for name in frozen)
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(before[k], tensor) for k, tensor in network.state_dict().items())
    assert train_step(network, 96) == []
    assert freeze_unused_parameters(network) == []


def refuse_meta(to: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def without_meta(self: nn.Module, device: object = None, **options: object) -> nn.Module:
        if device == "meta":
            raise NotImplementedError("no kernel for meta tensors")
        return to(self, device, **options)

    return without_meta


def test_a_model_that_takes_other_images_only_is_left_as_it_is(caplog):
    network = Network(nn.Conv2d(2, NUM_CLASSES, 1))  # but mean and std are of three channels
    assert freeze_unused_parameters(network) == []
    assert "cannot tell" in caplog.text
    assert all(p.requires_grad for p in network.parameters())


def test_networks_take_any_number_of_channels():
    model = nn.Conv2d(5, NUM_CLASSES, 1)
    network = Network(model, mean=[0.1, 0.2, 0.3, 0.4, 0.5], std=[1, 2, 3, 4, 5])
    x = torch.randint(256, (2, 5, 33, 40), dtype=torch.uint8)
    scaled = (x / 255 - torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).view(5, 1, 1)) / torch.arange(
        1, 6
    ).view(5, 1, 1)
    torch.testing.assert_close(network(x)["out"], model(scaled))


class Volume(nn.Module):
    """With a weight of five dimensions, which have no `channels_last`."""

    def __init__(self) -> None:
        super().__init__()
        self.over_time = nn.Conv3d(3, NUM_CLASSES, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.over_time(x[:, :, None])[:, :, 0]


def test_e40_weights_of_five_dimensions_are_weights_too():
    network = Network(Volume())
    x = torch.randint(256, (2, 3, 33, 40), dtype=torch.uint8)
    assert network(x)["out"].shape == (2, NUM_CLASSES, 33, 40)
    assert freeze_unused_parameters(network) == []


class Lazy(nn.Module):
    """Its layers get their sizes from the first image; Dropout would draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LazyConv2d(8, 3, padding=1), nn.LazyBatchNorm2d(), nn.Dropout(), nn.ReLU()
        )
        self.classifier = nn.LazyConv2d(NUM_CLASSES, 1)
        self.layers[1].eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.layers(x))


def test_e40_lazy_layers_get_their_sizes_before_anything_else():
    """And can be loaded into a new model, as from a checkpoint."""
    network = Network(Lazy())
    assert network.model.classifier.weight.shape == (NUM_CLASSES, 8, 1, 1)
    assert not network.model.layers[1].training
    assert network.model.layers[1].num_batches_tracked == 0
    assert network.training
    assert freeze_unused_parameters(network) == []
    other = Network(Lazy())
    other.load_state_dict(network.state_dict())
    x = torch.randint(256, (2, 3, 33, 40), dtype=torch.uint8)
    torch.testing.assert_close(other.eval()(x)["out"], network.eval()(x)["out"])


def test_e40_lazy_layers_that_get_no_size_are_named():
    model = nn.Sequential(nn.LazyConv2d(4, 99), nn.Conv2d(4, NUM_CLASSES, 1))
    with pytest.raises(InputError, match=r"Sequential has lazy layers.* 64 x 64 pixels, and"):
        Network(model)


def test_convolutions_keep_their_channels_last():
    weight = Network(nn.Conv2d(3, 4, 3)).model.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
