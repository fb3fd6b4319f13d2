"""Names of classes in tables and figures: shown as they are, in whatever alphabet."""

import logging
import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from seg_torch.drawing.curves import confusion_matrix
from seg_torch.drawing.fonts import font_with
from seg_torch.drawing.table import print_table
from seg_torch.drawing.visualize import legend
from seg_torch.evaluation.results import Results
from seg_torch.labels import Labels
from seg_torch.metrics.counts import COUNTS

ODD = ("[red]", "[/]", ":car:", "$x_1$", r"$\frac{", "a$", "\\", "<b>", "Straße")


@pytest.fixture(autouse=True)
def no_warnings():
    """Neither matplotlib's of a glyph nor any other; fonts are looked for anew."""
    font_with.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    font_with.cache_clear()


def results_of(names: tuple[str, ...]) -> Results:
    row = dict.fromkeys(("iou", "dice", "accuracy", "precision"), 0.5) | {"pixels": 1}
    scores = {f"mean_{name}": 0.5 for name in row} | {
        "per_class": dict.fromkeys(names, row),
        "confusion_matrix": np.eye(len(names), dtype=int).tolist(),
        "pixel_accuracy": 0.5,
        "expected_calibration_error": None,
        "split": "test",
        "images": 1,
        "images_of_split": 1,
    }
    counts = np.ones((1, len(names)), int)
    images = {**dict.fromkeys(COUNTS, counts), "confidence": np.ones(1)}
    return Results(scores, images, ["[bold].png"], [0], Labels(names))


def test_e33_names_that_mean_something_to_a_library_are_printed_and_drawn(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    results = results_of(ODD)
    results.print("test")
    printed = capsys.readouterr().out
    print_table("[b]", ["[i]", ":one:"], [[name, "[1]"] for name in ODD])
    table = capsys.readouterr().out
    assert "[b]" in table
    assert "[i]" in table
    for text in (printed, table):
        assert {line.split()[0] for line in text.splitlines() if line.split()} >= set(ODD)
    results.write(tmp_path, "test")
    assert (tmp_path / "test_confusion_matrix.png").stat().st_size > 1000
    axes = confusion_matrix(np.eye(len(ODD)), Labels(ODD)).axes[0]
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == list(ODD)
        assert not any(tick.get_parse_math() for tick in ticks)


CHINESE = Labels(("background", "人", "犬"))


def test_e33_names_without_a_font_are_numbers_with_one_warning(tmp_path, caplog, monkeypatch):
    fonts = [
        f for f in font_manager.fontManager.ttflist if f.name in ("DejaVu Sans", "STIXGeneral")
    ]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    caplog.set_level(logging.WARNING)
    figure = confusion_matrix(np.eye(3), CHINESE)
    figure.savefig(tmp_path / "matrix.png")
    texts = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert texts == ["background", "class 1", "class 2"]
    drawn = np.array(legend(CHINESE))
    numbers = np.array(legend(Labels(("background", "class 1", "class 2"))))
    assert np.array_equal(drawn, numbers)
    assert len(caplog.records) == 2  # a name each
    assert "(人): figures show the number of the class; install a font" in caplog.text


def test_e33_an_installed_font_with_the_letters_is_used(tmp_path, monkeypatch):
    """A font of two letters, which are black squares."""
    pen = TTGlyphPen(None)
    for i, point in enumerate([(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
        (pen.lineTo if i else pen.moveTo)(point)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord("人"): "square", ord("犬"): "square"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "squares.ttf")
    entry = font_manager.FontEntry(str(tmp_path / "squares.ttf"), "Squares", weight=400)
    known = [f for f in font_manager.fontManager.ttflist if f.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*known, entry])
    figure = confusion_matrix(np.eye(3), CHINESE)
    ticks = figure.axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == list(CHINESE.names)
    assert ticks[1].get_fontproperties().get_file() == entry.fname
    figure.savefig(tmp_path / "matrix.svg")
    drawn = np.array(legend(CHINESE, [1]))
    assert (drawn[10:18, 30:40] == 32).mean() > 0.9
