"""Names of classes in figures: in whatever alphabet, where a font has its letters."""

import logging
from collections.abc import Set
from contextlib import suppress
from functools import cache
from unicodedata import category

from seg_torch.labels import Labels

log = logging.getLogger(__name__)


def drawn_name(labels: Labels, class_id: int) -> tuple[str, str | None]:
    """Return what a figure calls a class, and the file of the font for it.

    Returns:
        Its name; its number where no font that is installed has all letters of the name. No file:
        every font will do.
    """
    name = labels.names[class_id]
    if name.isascii():
        return name, None
    font = font_with(frozenset(letter for letter in name if category(letter) not in ("Cf", "Zs")))
    return (f"class {class_id}", None) if font is None else (name, font)


@cache
def font_with(letters: Set[str]) -> str | None:
    """Return the file of a font that has all of some letters; `None`, with a warning, if none."""
    from matplotlib import font_manager, ft2font  # which take a second

    # First the one that matplotlib brings, with the letters of Europe.
    wanted = {"DejaVu Sans", "normal", 400}
    fonts = sorted(
        font_manager.fontManager.ttflist,
        key=lambda font: [key not in wanted for key in (font.name, font.style, font.weight)],
    )
    for font in fonts:
        with suppress(OSError, RuntimeError):  # removed since matplotlib has looked, or broken
            has = ft2font.FT2Font(font.fname).get_charmap().keys()
            # Last Resort, of matplotlib, has a box with the number of its block for every letter.
            if {*map(ord, letters)} <= has and not font.name.startswith("Last Resort"):
                return font.fname
    log.warning(
        "no font here has all letters of a class name (%s): figures show the number of the class; "
        "install a font such as Noto Sans CJK",
        "".join(sorted(letters)),
    )
    return None
