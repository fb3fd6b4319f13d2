"""GeoTIFF files as GDAL writes them, of which a part holds no data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

HEIGHT, WIDTH = 48, 112
VALID = np.ones((HEIGHT, WIDTH), bool)
VALID[:, :16] = VALID[40:, 30:50] = False


def pixels(bands: int = 3, seed: int = 0) -> np.ndarray:
    """Noise without 0 and 255, [bands, H, W]."""
    return np.random.default_rng(seed).integers(1, 255, (bands, HEIGHT, WIDTH), np.uint8)


def write(
    path: Path,
    values: np.ndarray,
    nodata: float | None = None,
    mask: str | None = None,
    names: dict[int, str] | None = None,
    **profile,
) -> Path:
    """Write bands [N, H, W]; a `mask` lies "inside" the file or "beside" it."""
    profile = {
        "crs": "EPSG:32633",
        "transform": from_origin(500_000, 5_600_000, 10, 10),
        "count": len(values),
        "height": HEIGHT,
        "width": WIDTH,
        "dtype": values.dtype,
        "nodata": nodata,
        **profile,
    }
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=mask == "inside"),
        rasterio.open(path, "w", driver="GTiff", **profile) as file,
    ):
        file.write(values)
        for band, name in (names or {}).items():
            file.set_band_description(band, name)
        if mask:
            file.write_mask(VALID)
    return path


def hidden(values: np.ndarray, value: float) -> np.ndarray:
    """Return bands with a value where there are no data."""
    return np.where(VALID, values, values.dtype.type(value))


def with_alpha(values: np.ndarray) -> np.ndarray:
    """Return bands and a last one that is 0 where there are no data, else 255."""
    return np.concatenate([values, 255 * VALID[None].astype(np.uint8)])
