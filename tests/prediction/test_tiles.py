"""Where tiles lie, and what becomes of the logits where they overlap."""

import pytest
import torch

from seg_torch.prediction.tiles import CrossFade, Span, spans


def test_tiles_by_hand():
    """200 pixels in tiles of 96 that share 32: they begin at 0, 64 and 128; the last one would see
    72 pixels, so it reads from 96 = 3 x 32, as far back as 200 - 96 = 104 allows."""
    assert spans(200, 96, 32) == [
        Span(0, 0, 96, 64),
        Span(64, 64, 160, 128),
        Span(96, 128, 200, 200),
    ]
    assert spans(50, 96, 32) == [Span(0, 0, 50, 50)]


@pytest.mark.parametrize("length", [1, 32, 95, 96, 97, 128, 129, 1000])
def test_every_pixel_is_final_once(length):
    tiles = spans(length, 96, 32)
    assert [i for tile in tiles for i in range(tile.start, tile.final)] == list(range(length))
    assert all(tile.read % 32 == 0 and tile.read <= tile.start for tile in tiles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tile_fades_in_along_half_a_cosine(dtype):
    """A tile of zeros, then one of ones to its right, and the same below."""
    size, overlap = 160, 32
    edges = CrossFade(2, size, 96, overlap, torch.float32, torch.device("cpu"))
    whole = torch.full((2, size, size), torch.nan)
    for rows in spans(size, 96, overlap):
        for columns in spans(size, 96, overlap):
            value = float(rows.start > 0 or columns.start > 0)
            seen = torch.full((2, rows.end - rows.read, columns.end - columns.read), value)
            final = edges.blend(rows, columns, seen.to(dtype))
            whole[:, rows.start : rows.final, columns.start : columns.final] = final.float()
    fade_in = 0.5 - 0.5 * torch.cos(torch.pi * (torch.arange(overlap) + 0.5) / overlap)
    expected = torch.ones(size, size)
    expected[:64, :64] = 0
    expected[:64, 64:96] = fade_in
    expected[64:96, :64] = fade_in[:, None]
    # From what fades to the right into what is 1, downwards.
    expected[64:96, 64:96] = torch.lerp(
        fade_in.expand(32, 32), torch.ones(32, 32), fade_in[:, None]
    )
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(whole, expected.expand(2, size, size), rtol=0, atol=tolerance)
