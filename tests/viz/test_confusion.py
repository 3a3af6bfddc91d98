"""The confusion matrix: its values, and plots for any number of classes."""

import numpy as np
import pytest
from matplotlib.image import imread

from hf_tfm.viz.confusion import MAX_CLASSES, NUMBERS, draw, plot_confusion, summary

COUNTS = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 198]])
NAMES = ["cat", "cow", "$dog$"]


def test_rows_are_labels_and_add_up_to_100():
    matrix, bar = draw(COUNTS, NAMES, ["title"]).axes
    shown = matrix.images[0].get_array()
    np.testing.assert_allclose(shown[[0, 2]], [[75, 25, 0], [1, 0, 99]])
    assert shown.mask[1].all()  # no image has the label cow
    assert (matrix.get_ylabel(), matrix.get_xlabel()) == ("label", "prediction")
    assert [tick.get_text() for tick in matrix.get_yticklabels()] == NAMES
    assert [tick.get_text() for tick in matrix.get_xticklabels()] == NAMES
    written = {text.get_position(): text.get_text() for text in matrix.texts}  # (column, row)
    assert written == {(0, 0): "75", (1, 0): "25", (0, 2): "1", (2, 2): "99"}
    assert "per cent" in bar.get_ylabel()


def test_values_below_one_percent_are_not_shown_as_zero():
    matrix, _ = draw(np.array([[999, 1], [0, 10]]), ["a", "b"], [""]).axes
    assert [text.get_text() for text in matrix.texts] == ["100", "<1", "100"]


def test_summary_lists_the_most_frequent_errors():
    assert summary(COUNTS, NAMES) == ["201 of 204 images right", "most often wrong: $dog$ as cat (2); cat as cow (1)"]
    assert summary(np.eye(2, dtype=int), ["a", "b"]) == ["2 of 2 images right"]


@pytest.mark.parametrize("classes", [1, 2, NUMBERS, NUMBERS + 1, 1000])
def test_every_class_has_whole_pixels(classes):
    figure = draw(np.eye(classes, dtype=int), [f"class {i}" for i in range(classes)], ["title"])
    matrix, _ = figure.axes
    box = matrix.get_window_extent()
    assert box.width / classes == pytest.approx(round(box.width / classes))
    assert box.height == pytest.approx(box.width)
    assert len(matrix.texts) == (classes if classes <= NUMBERS else 0)
    names = [tick for tick in matrix.get_yticklabels() if tick.get_text()]
    assert len(names) == (classes if classes <= NUMBERS + 1 else 59)
    figure.canvas.draw()
    heights = [tick.get_window_extent().height for tick in names]
    assert max(heights) * len(names) <= 1.2 * box.height  # tick labels do not overlap


def test_saved_file(tmp_path):
    one = plot_confusion([0, 0, 2], [0, 1, 2], NAMES, tmp_path / "new" / "confusion.png", "a run")
    other = plot_confusion([0, 0, 2], [0, 2, 2], NAMES, tmp_path / "other.png", "a run")
    assert imread(one).shape == imread(other).shape
    assert (imread(one) != imread(other)).any()


@pytest.mark.parametrize(
    ("labels", "predictions", "names", "file", "named"),
    [
        ([], [], NAMES, "a.png", "needs images with a label"),
        ([0], [3], NAMES, "a.png", "predictions must be from 0 to 2, got 3 to 3"),
        ([-1], [0], NAMES, "a.png", "labels must be from 0 to 2, got -1 to -1"),
        ([0], [0], ["x"] * (MAX_CLASSES + 1), "a.png", f"at most {MAX_CLASSES} classes, got {MAX_CLASSES + 1}"),
        ([0], [0], NAMES, "a.jpg", 'must be a ".png" file'),
    ],
)
def test_errors(labels, predictions, names, file, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        plot_confusion(labels, predictions, names, tmp_path / file)
