"""Learning rates and weight decay by part of the network, and warm-up."""

import math
from functools import partial

import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from seg_torch.errors import InputError
from seg_torch.labels import Labels
from seg_torch.losses import CrossEntropyLoss
from seg_torch.models import deeplabv3, fcn, hrnet, lraspp, smp, transformers, unet, vit
from seg_torch.models.network import Network
from seg_torch.training.optimizers import parameter_groups
from seg_torch.training.schedulers import cosine, one_cycle, poly
from seg_torch.training.task import SegmentationTask


def rates(model: nn.Module, **parts: object) -> dict[str, float]:
    """The rate of each trainable parameter, which is in exactly one group."""
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1, **parts), lr=0.1)
    groups = [(p, g["lr"]) for g in optimizer.param_groups for p in g["params"]]
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(id(p) for p, _ in groups) == sorted(trainable)
    return {trainable[id(p)]: lr for p, lr in groups}


@pytest.mark.parametrize(
    ("build", "encoder", "library"),
    [
        (lambda: unet(2, "resnet18", None), "encoder.", None),
        (lambda: hrnet(2, "hrnet_w18_small", None), "encoder.", None),
        (lambda: deeplabv3(2, "mobilenet_v3_large", None), "backbone.", None),
        (lambda: lraspp(2, None), "backbone.", None),
        (lambda: vit(2, "test_vit", None), "encoder.", None),
        (lambda: smp(2, "FPN", "resnet18", None), "model.encoder.", "segmentation_models_pytorch"),
        (
            lambda: transformers(2, {"model_type": "segformer"}),
            "model.segformer.",
            "transformers",
        ),
    ],
    ids=["unet", "hrnet", "deeplabv3", "lraspp", "vit", "smp", "transformers"],
)
def test_the_encoder_of_each_model_has_a_rate_of_its_own(build, encoder, library):
    if library is not None:
        pytest.importorskip(library)
    found = rates(build(), encoder_lr=0.025)
    assert {name: lr for name, lr in found.items() if name.startswith(encoder)}
    for name, lr in found.items():
        assert lr == (pytest.approx(0.0025) if name.startswith(encoder) else 0.1), name


def test_nothing_told_apart_is_one_group_of_all_in_their_order():
    model = fcn(2, "resnet50", None)
    (group,) = parameter_groups(model, 0.1)
    assert group.keys() == {"params"}
    assert all(a is b for a, b in zip(group["params"], model.parameters(), strict=True))


def test_the_auxiliary_head_has_ten_times_the_rate_as_in_torchvisions_reference():
    found = rates(deeplabv3(2, "mobilenet_v3_large", None), aux_lr=10)
    for name, lr in found.items():
        assert lr == pytest.approx(1.0 if name.startswith("aux_classifier.") else 0.1), name


def test_each_layer_of_a_vit_has_a_share_of_the_rate_of_the_next():
    """BEiT's: with L blocks, block i (from 1) has decay ** (L + 1 - i), the embedding L + 1."""
    model = vit(2, "test_vit", None)
    for token in ("reg_token", "dist_token"):  # which timm's groups know or not, by its version
        setattr(model.encoder, token, nn.Parameter(torch.zeros(1, 1, 64)))
    found = rates(model, encoder_lr=0.5, layer_decay=0.8)
    for name, lr in found.items():
        path = name.split(".")
        if path[0] == "head":
            expected = 0.1
        elif path[1] == "blocks":
            expected = 0.1 * 0.5 * 0.8 ** (6 - int(path[2]))
        elif path[1] == "norm":  # with the last block
            expected = 0.1 * 0.5 * 0.8
        else:
            assert path[1] in ("cls_token", "reg_token", "dist_token", "pos_embed", "patch_embed")
            expected = 0.1 * 0.5 * 0.8**7
        assert lr == pytest.approx(expected), name


def test_norms_biases_and_position_embeddings_need_not_decay():
    for model in (vit(2, "test_vit", None), unet(2, "resnet18", None)):
        groups = parameter_groups(model, 0.1, decay_norms=False, encoder_lr=0.5)
        spared = {id(p) for g in groups if g.get("weight_decay") == 0 for p in g["params"]}
        decayed = {name for name, p in model.named_parameters() if id(p) not in spared}
        expected = {
            f"{path}.weight"
            for path, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
        }
        assert decayed == expected


def test_what_cannot_be_told_apart_is_refused():
    with pytest.raises(InputError, match=r"layer_decay needs .*model=vit"):
        parameter_groups(unet(2, "resnet18", None), 0.1, layer_decay=0.8)
    with pytest.raises(InputError, match="Conv2d has no part called encoder or backbone"):
        parameter_groups(nn.Conv2d(3, 2, 1), 0.1, encoder_lr=0.1)


class Tiny(nn.Module):
    """An encoder and a head of one weight each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 1, 1, bias=False)
        self.head = nn.Conv2d(1, 2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


class Rates(torch.optim.SGD):
    """Notes the rates with which it steps."""

    def __init__(self, params, **options) -> None:
        super().__init__(params, **options)
        self.seen: list[list[float]] = []

    def step(self, closure=None):
        self.seen.append([group["lr"] for group in self.param_groups])
        return super().step(closure)


SCHEDULES = {
    "poly": (poly, lambda step: (1 - step / 8) ** 0.9),
    "cosine": (cosine, lambda step: (1 + math.cos(math.pi * step / 8)) / 2),
    "none": (None, lambda step: 1.0),
    "step": (partial(StepLR, step_size=1), lambda step: 0.1 ** (step // 4)),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_every_schedule_multiplies_all_groups_and_warms_up_linearly(name, accumulated):
    """Two epochs of four steps; the first five steps have 1/5, 2/5, ... of the scheduled rate."""
    make, formula = SCHEDULES[name]
    network = Network(Tiny())
    task = SegmentationTask(
        network,
        Labels(("a", "b")),
        CrossEntropyLoss(),
        optimizer=partial(Rates, lr=0.1, encoder_lr=0.5),
        scheduler=make,
        warmup_steps=5,
    )
    batch = (torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8), torch.zeros(2, 4, 4).byte())
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        accumulate_grad_batches=accumulated,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader([batch] * 4 * accumulated, batch_size=None))
    expected = [formula(step) * min(1, (step + 1) / 5) for step in range(8)]
    head, encoder = zip(*trainer.optimizers[0].seen, strict=True)
    assert head == pytest.approx([0.1 * factor for factor in expected])
    assert encoder == pytest.approx([0.05 * factor for factor in expected])


def test_one_cycle_has_the_peak_of_each_group():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.02)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = one_cycle(optimizer, 10)
    seen = []
    for _ in range(9):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert [max(lrs) for lrs in zip(*seen, strict=True)] == pytest.approx([0.1, 0.02])
