"""Mask classification: its loss, beside that of transformers."""

import copy
import itertools
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import MASK2FORMER, MASK_MODELS, NUM_CLASSES, caches, images  # noqa: F401
from torch import Tensor, nn

from seg_torch.errors import InputError
from seg_torch.models import transformers
from seg_torch.models.masks import semantic_logits


def library_loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The loss of transformers, with its own criterion, of masks of each class."""
    library = copy.deepcopy(model.model)
    library.criterion = library.criterion.criterion
    # OneFormer's loss of texts, which there are none of; its own check would refuse `None`.
    object.__setattr__(library.config, "contrastive_temperature", None)
    present = [each.unique() for each in target]
    masks = [(t == ids[:, None, None]).float() for t, ids in zip(target, present, strict=True)]
    inputs = {"task_inputs": model.task.expand(len(x), -1)} if hasattr(model, "task") else {}
    outputs = library(pixel_values=x, mask_labels=masks, class_labels=present, **inputs)
    return outputs.loss


def regions(*shape: int) -> Tensor:
    """Labels of three classes, in squares of 16 pixels."""
    coarse = torch.randint(3, (shape[0], shape[1] // 16, shape[2] // 16))
    return coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)


def test_a_pixels_score_of_a_class_adds_up_over_the_queries():
    """Of Cheng et al. (2021): by hand, and "no object", the last class, has none."""
    classes = torch.log(torch.tensor([[[0.7, 0.1, 0.2], [0.05, 0.15, 0.8]]]))
    masks = torch.tensor([[[[0.0, 2.0]], [[-1.0, 3.0]]]])
    inside = [[0.5, 1 / (1 + math.exp(-2))], [1 / (1 + math.e), 1 / (1 + math.exp(-3))]]
    expected = [
        [0.7 * inside[0][pixel] + 0.05 * inside[1][pixel] for pixel in (0, 1)],
        [0.1 * inside[0][pixel] + 0.15 * inside[1][pixel] for pixel in (0, 1)],
    ]
    found = semantic_logits(classes, masks)[0, :, 0].exp()
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("kind", MASK_MODELS)
def test_without_ignored_pixels_the_loss_is_that_of_transformers(kind):
    """Exactly for MaskFormer, the others' is estimated at points drawn at random."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    points = {} if kind == "maskformer" else {"train_num_points": 20_000}
    model = transformers(NUM_CLASSES, MASK_MODELS[kind] | points).eval()
    model.model.criterion.criterion.importance_sample_ratio = 0.75
    side = 32 if kind == "eomt" else 64
    x, target = images(2, 3, side, side), regions(2, side, side)
    with torch.no_grad():
        expected = library_loss(model, x, target)
        loss = model(x, target)["loss"]
    tolerance = 1e-6 if kind == "maskformer" else 0.005
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)


@pytest.mark.parametrize("kind", MASK_MODELS)
def test_the_loss_of_masks_does_not_see_ignored_pixels(kind):
    pytest.importorskip("transformers")
    criterion = transformers(NUM_CLASSES, MASK_MODELS[kind]).model.criterion
    torch.manual_seed(0)
    masks, classes = torch.randn(2, 5, 16, 24), torch.randn(2, 5, NUM_CLASSES + 1)
    target = regions(2, 16, 24 * 16)[..., ::16].repeat_interleave(1, 1)
    target[:, 4:, 5:] = 255

    def loss_and_gradient(masks: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(1)  # of the points
        masks = masks.clone().requires_grad_()
        terms = criterion(masks, classes, target, target)
        sum(terms.values()).backward()
        return terms, masks.grad

    terms, gradient = loss_and_gradient(masks)
    other = masks.where(target[:, None] != 255, 100 * torch.randn_like(masks))
    other_terms, other_gradient = loss_and_gradient(other)
    assert all(torch.equal(value, other_terms[name]) for name, value in terms.items())
    assert torch.equal(gradient, other_gradient)
    assert not gradient.where(target[:, None] == 255, 0).any()
    assert gradient[:, :, :4].any()
    # As if they were cut away.
    if kind == "maskformer":
        cut = criterion(masks[..., :4, :], classes, target[:, :4], target)
        target[:, 4:] = 255
        rest = criterion(masks, classes, target, target)
        for name, value in cut.items():
            torch.testing.assert_close(value, rest[name])


@pytest.mark.parametrize("kind", MASK_MODELS)
def test_images_without_a_label_have_no_part_in_the_loss_of_masks(kind):
    pytest.importorskip("transformers")
    model = transformers(NUM_CLASSES, MASK_MODELS[kind])
    criterion = model.model.criterion
    masks, classes = torch.randn(2, 5, 8, 8), torch.randn(2, 5, NUM_CLASSES + 1)
    target = torch.zeros(2, 16, 16, dtype=torch.uint8)
    target[1] = 255
    torch.manual_seed(0)
    both = criterion(masks, classes, target, target)
    torch.manual_seed(0)
    alone = criterion(masks[:1], classes[:1], target[:1], target[:1])
    assert all(torch.equal(value, alone[name]) for name, value in both.items())
    loss = model(images(2, 3, 33, 40), torch.full((2, 33, 40), 255, dtype=torch.uint8))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_each_class_is_matched_with_the_query_that_costs_least():
    """By trying every assignment, with the costs of Cheng et al. (2022) by hand."""
    pytest.importorskip("transformers")
    criterion = transformers(NUM_CLASSES, MASK2FORMER).model.criterion
    # With this seed each of the costs decides, and that the first row is ignored.
    generator = torch.Generator().manual_seed(319)
    masks = torch.randn(4, 6, 6, generator=generator) * 3
    classes = torch.randn(4, NUM_CLASSES + 1, generator=generator)
    target = torch.randint(3, (6, 6), generator=generator)
    target[0] = 255
    known = target != 255

    def cost(query: int, label: int) -> float:
        inside = (target[known] == label).double()
        logits = masks[query][known].double()
        p = logits.sigmoid()
        cross_entropy = F.binary_cross_entropy(p, inside)
        dice = 1 - (2 * (p * inside).sum() + 1) / (p.sum() + inside.sum() + 1)
        probability = classes[query].softmax(0)[label]
        return (5 * cross_entropy + 5 * dice - 2 * probability).item()

    best = min(
        itertools.permutations(range(4), 3),
        key=lambda queries: sum(cost(q, label) for label, q in enumerate(queries)),
    )
    queries, columns = criterion._match(classes, masks, target, torch.arange(3))
    assert [queries[columns == label].item() for label in range(3)] == list(best)


def test_mask_models_take_published_weights_but_for_other_classes(tmp_path, caplog):
    pytest.importorskip("transformers")
    published = transformers(7, MASK2FORMER).model
    published.criterion = published.criterion.criterion  # as the library has it
    published.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        model = transformers(NUM_CLASSES, MASK2FORMER, tmp_path).model
    own = model.state_dict()
    for name, tensor in published.state_dict().items():
        if not name.startswith(("class_predictor", "criterion")):
            assert torch.equal(tensor, own[name]), name
    assert own["class_predictor.weight"].shape[0] == NUM_CLASSES + 1
    assert "class_predictor.weight" in caplog.text
    with pytest.raises(InputError, match=r"does not fit model\.config"):
        transformers(NUM_CLASSES, MASK2FORMER | {"num_queries": 6}, tmp_path)
