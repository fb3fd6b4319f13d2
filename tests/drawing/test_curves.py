"""Figures of scores: learning curves and the confusion matrix."""

import numpy as np
import pytest

from seg_torch.drawing.curves import confusion_matrix, curves, save_curves
from seg_torch.labels import Labels

LABELS = Labels(("a", "b"))


def test_curves_have_points_only_where_there_are_values():
    history = [{"epoch": i, "train_loss": 3.0 - i, "val_loss": None} for i in range(4)]
    history[1] |= {"val_loss": 2.5, "val_mean_iou": 0.5}
    history[3] |= {"val_loss": 1.5, "val_mean_iou": 0.75}
    loss, score = curves(history).axes
    points = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert points["training"] == [[0, 3], [1, 2], [2, 1], [3, 0]]
    assert points["validation"] == [[1, 2.5], [3, 1.5]]
    assert [line.get_xydata().tolist() for line in score.lines] == [[[1, 0.5], [3, 0.75]]]


def test_the_confusion_matrix_shows_the_share_of_each_label():
    axes = confusion_matrix(np.array([[3, 1], [0, 0]]), LABELS).axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): ".75",
        (1, 0): ".25",
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_curves_are_a_file_of_the_format_that_the_suffix_names(tmp_path, suffix):
    save_curves([{"epoch": 0, "train_loss": 1.0}], tmp_path / f"curves{suffix}")
    [path] = tmp_path.iterdir()
    assert path.read_bytes()[:4] == (b"\x89PNG" if suffix == ".png" else b"%PDF")


@pytest.mark.parametrize(("classes", "length"), [(2, 1), (25, 12), (8, 60)])
def test_e65_the_digits_of_the_confusion_matrix_are_legible_and_fit_their_cells(classes, length):
    labels = Labels(tuple(f"{i:x<{length}}" for i in range(classes)))
    figure = confusion_matrix(np.full((classes, classes), 22), labels)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    cell = axes.get_window_extent().width / classes
    widths = [text.get_window_extent().width for text in axes.texts]
    assert max(widths, default=0) < cell
    assert all(text.get_fontsize() * figure.dpi / 72 >= 11 for text in axes.texts)
