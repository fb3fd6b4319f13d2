"""Logits at label size, whole and some rows at a time."""

import pytest
import torch
from losses_for_tests import SIZES, sized_batch
from torch import Tensor

from seg_torch import upsample as module
from seg_torch.upsample import upsample


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_images_are_upsampled_in_chunks_whose_length_does_not_matter(
    sizes, dtype, monkeypatch
):
    (logits, _), (height, width) = sized_batch(*sizes), sizes[1]
    logits = logits.to(dtype)

    def assembled() -> tuple[Tensor, int]:
        whole = torch.full((*logits.shape[:2], height, width), torch.nan)
        chunks = list(module.upsampled_chunks(logits, sizes[1]))
        for index, rows, values in chunks:
            assert whole[index, :, rows].isnan().all()
            whole[index, :, rows] = values.float()
        return whole, max(values.numel() for _, _, values in chunks)

    expected, largest = assembled()
    assert torch.equal(expected, upsample(logits, sizes[1]).float())
    assert largest == 4 * height * width  # an image at once
    monkeypatch.setattr(module, "WHOLE_IMAGE", 4 * height * width - 1)
    found = {}
    for limit in (4 * width, 3 * 4 * width, 1 << 30):
        monkeypatch.setattr(module, "CPU_CHUNK", limit)
        found[limit], largest = assembled()
        assert largest <= limit or sizes[0] == sizes[1]  # no copy is made
        assert torch.equal(found[limit], found[4 * width])
    torch.testing.assert_close(found[4 * width], expected, rtol=1e-5, atol=1e-5)
