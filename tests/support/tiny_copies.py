"""The tiny copy of each dataset, in a folder that is made when it is first asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make_data
import pytest

from seg_torch import datasets


class TinyCopies(dict[str, Path]):
    """Folders by the name of the dataset."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self.factory = factory

    def __missing__(self, name: str) -> Path:
        self[name] = self.factory.mktemp(name)
        getattr(make_data, f"make_{name}")(self[name])
        return self[name]

    def build(self, name: str, split: str, **options: Any) -> Any:
        """The dataset of that name."""
        root = {} if name == "shapes" else {"root": self[name]}
        return getattr(datasets, name)(split=split, **root, **options)
