import numpy as np
import scipy.special
import torch
from scored import NUM_CLASSES

from seg_torch.metrics import confidence_steps


def test_confidence_is_the_highest_softmax_probability():
    logits = 5 * torch.randn(NUM_CLASSES, 13, 17, generator=torch.Generator().manual_seed(0))
    expected = scipy.special.softmax(logits.double().numpy(), 0).max(0)
    np.testing.assert_allclose(confidence_steps(logits) / 65536, expected, atol=0.6 / 65536)
    extreme = torch.tensor([[1e4, -1e4, 3.0], [0.0, 0.0, 3.0], [-1e4, -1e4, float("nan")]])
    assert confidence_steps(extreme[:, None]).tolist() == [[65536, 32768 * 2, 0]]
