import numpy as np
import pytest
import scipy.special
import torch
from scored import NUM_CLASSES, blocks_of, random_maps, updated

from seg_torch.metrics import LabelQuality


@pytest.mark.parametrize("rows", [1, 5, 13])
def test_the_quality_of_a_label_is_the_softmin_of_the_probabilities_of_its_pixels(rows):
    """cleanlab's formula: the product of the pixels' scores s with softmax((1 - s) / 0.1)."""
    _, target = random_maps()
    logits = 4 * torch.randn(len(target), NUM_CLASSES, *target.shape[1:])
    target[1] = 255
    metric = LabelQuality(len(target))
    for index in reversed(range(len(target))):
        updated(metric, blocks_of(target[index], logits=logits[index], image=index, rows=rows))
    found = metric.compute()
    for index, (label, values) in enumerate(zip(target.numpy(), logits, strict=True)):
        probabilities = scipy.special.softmax(values.double().numpy(), 0)
        valid = label != 255
        if index == 1:
            assert np.isnan(found[index])
            continue
        s = np.take_along_axis(probabilities, label[None] * valid, 0)[0][valid]
        assert found[index] == pytest.approx(s @ scipy.special.softmax((1 - s) / 0.1), rel=1e-5)


def test_a_few_wrong_labels_lower_the_quality_more_than_doubts_everywhere():
    logits = torch.zeros(2, 2, 10, 10)
    logits[:, 0] = torch.tensor([6.0, 0.8])[:, None, None]
    target = torch.zeros(10, 10, dtype=torch.uint8)
    target[:3, :3] = 1
    metric = LabelQuality(2)
    updated(metric, blocks_of(target, logits=logits[0]))  # sure; nine pixels have another label
    updated(metric, blocks_of(torch.zeros_like(target), logits=logits[1], image=1))  # unsure of all
    assert metric.compute()[0] < 0.02 < 0.6 < metric.compute()[1]
