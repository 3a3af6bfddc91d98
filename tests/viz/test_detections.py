"""Plots of detections show the model's boxes and masks at the right positions, and legibly."""

import numpy as np
import pytest
import torch
from detector_data import NAMES, SIZES, found_by_hand, photos, save_detector
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from hf_tfm import cli
from hf_tfm.hub.detectors import load_detector
from hf_tfm.viz import NamedImage, detect, plot_detections
from hf_tfm.viz.detections import objects_panel
from hf_tfm.viz.objects import COVER, Objects, Panel, class_colour, gallery, numbered_segments


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    return {kind: save_detector(folder / kind, kind) for kind in ("tfm", "detr", "yolos", "tfm_panoptic")}


IMAGES = [NamedImage(f"photo {i}", photo) for i, photo in enumerate(photos())]


# --- detections


@pytest.mark.parametrize("kind", ["tfm", "detr", "yolos"])
def test_boxes_equal_the_model_called_directly(kind, models):
    """In pixels of images of several shapes, above the threshold."""
    expected, _ = found_by_hand(models[kind])
    model, processor = load_detector(models[kind])
    for image, one, (height, width) in zip(IMAGES, expected, SIZES, strict=True):
        found = detect(model, processor, image)
        good = one["scores"] >= 0.7
        assert 0 < good.sum() < len(good)
        np.testing.assert_allclose(found.objects.boxes, one["boxes"][good], atol=1e-3)
        np.testing.assert_allclose(found.objects.scores, one["scores"][good], atol=1e-5)
        np.testing.assert_array_equal(found.objects.labels, one["labels"][good])
        assert found.image.shape == (height, width, 3) and found.objects.segments is None
        np.testing.assert_allclose(found.image, np.asarray(image.image) / 255, atol=1e-6)
        assert found.title == f"{image.name}: {good.sum()} object{'s' if good.sum() > 1 else ''}"


def test_segments_equal_the_model_called_directly(models):
    _, expected = found_by_hand(models["tfm_panoptic"])
    model, processor = load_detector(models["tfm_panoptic"])
    for image, one in zip(IMAGES, expected, strict=True):
        found = detect(model, processor, image).objects
        assert found.boxes is None
        assert found.labels.tolist() == [segment["label_id"] for segment in one["segments_info"]]
        places = {segment["id"]: number for number, segment in enumerate(one["segments_info"])}
        wanted = [[places.get(pixel, -1) for pixel in row] for row in one["segmentation"].tolist()]
        np.testing.assert_array_equal(found.segments, wanted)


def test_threshold_and_message_without_detections(models):
    model, processor = load_detector(models["tfm"])
    everything = detect(model, processor, IMAGES[0], 0.0)
    assert len(everything.objects.labels) == model.config.num_queries
    nothing = detect(model, processor, IMAGES[0], 1.0)
    best = everything.objects.scores.argmax()
    words = f"{NAMES[everything.objects.labels[best]]} {everything.objects.scores[best]:.0%}"
    assert nothing.title == f"photo 0: no object above the threshold; the best is {words}"
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 70"):
        detect(model, processor, IMAGES[0], 70)


def test_model_state_is_restored(models):
    model, processor = load_detector(models["tfm"])
    expected = detect(model, processor, IMAGES[0]).objects
    found = detect(model.train(), processor, IMAGES[0]).objects
    assert model.training
    np.testing.assert_array_equal(found.boxes, expected.boxes)


# --- drawing

BOXES = np.array(
    [[-2.0, -3.0, 20.0, 12.0], [80.0, 10.0, 99.0, 30.0], [40.0, 45.0, 70.0, 60.0], [0.0, 0.0, 100.0, 60.0]]
)
OBJECTS = Objects(np.array([0, 1, 2, 1]), np.array([0.9, 0.8, 0.95, 0.7]), BOXES)
WORDS = ["tortoise", "sea cucumber", "ox"]


def drawn(panel: Panel, side: float = 3.0):
    figure = gallery([panel], 1, side=side)
    return figure.axes[0], figure


def test_boxes_are_drawn_in_their_places():
    image = np.full((60, 100, 3), 0.3)
    true = Objects(np.array([2]), boxes=np.array([[10.0, 5.0, 30.0, 25.0]]))
    ax, _ = drawn(objects_panel("a", image, WORDS, OBJECTS, true))
    patches = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    dashed = [p for p in patches if p.get_linestyle() != "solid" and p.get_linestyle() != "-"]
    assert [p.get_bbox().extents.tolist() for p in dashed] == [[10.0, 5.0, 30.0, 25.0]]
    solid = [p for p in patches if p not in dashed]
    order = [3, 1, 0, 2]  # the best one is on top
    assert [p.get_bbox().extents.tolist() for p in solid] == BOXES[order].tolist()
    for patch, i in zip(solid, order, strict=True):
        np.testing.assert_allclose(to_rgb(patch.get_edgecolor()), class_colour(OBJECTS.labels[i]), atol=1e-6)
    labels = [text.get_text() for text in ax.texts]
    assert labels == ["ox", "sea cucumber 70%", "sea cucumber 80%", "tortoise 90%", "ox 95%"]
    np.testing.assert_allclose(ax.get_xlim(), (-0.5, 99.5))
    np.testing.assert_allclose(ax.get_ylim(), (59.5, -0.5))


@pytest.mark.parametrize("side", [2.5, 9.0])
def test_captions_are_inside_the_image(side):
    ax, figure = drawn(objects_panel("a", np.zeros((60, 100, 3)), WORDS, OBJECTS), side)
    canvas = FigureCanvasAgg(figure)
    frame = ax.get_window_extent(canvas.get_renderer())
    for text in ax.texts:
        box = text.get_window_extent(canvas.get_renderer())
        assert box.x0 >= frame.x0 - 3 and box.x1 <= frame.x1 + 3 and box.y0 >= frame.y0 - 3 and box.y1 <= frame.y1 + 3


def test_segments_cover_the_image_and_are_named_inside_themselves():
    ids = np.zeros((40, 60), np.int64)
    ids[5:35, 5:25], ids[10:30, 30:55] = 4, 9
    info = [{"id": 9, "label_id": 1, "score": 0.9}, {"id": 4, "label_id": 2, "score": 0.6}]
    objects = numbered_segments(ids, info, "label_id")
    assert sorted(np.unique(objects.segments).tolist()) == [-1, 0, 1]
    image = np.full((40, 60, 3), 0.4)
    ax, _ = drawn(objects_panel("a", image, WORDS, objects), side=9.0)
    shown = np.asarray(ax.images[-1].get_array())
    for (y, x), label in {(20, 40): 1, (20, 10): 2}.items():
        np.testing.assert_allclose(shown[y, x], (1 - COVER) * 0.4 + COVER * class_colour(label), atol=1e-6)
    np.testing.assert_allclose(shown[2, 2], 0.4)
    assert (shown[20, [5, 25, 30, 55]] == 1).all(), "edges are white"
    assert [text.get_text() for text in ax.texts] == ["sea cucumber 90%", "ox 60%"]
    middles = [tuple(round(v) for v in text.get_position()) for text in ax.texts]
    assert [ids[y, x] for x, y in middles] == [9, 4]
    np.testing.assert_allclose(image, 0.4)  # the input image is not modified


def test_instances_and_neighbouring_classes_differ_in_color():
    assert len({tuple(class_colour(3, i)) for i in range(3)}) == 3
    colours = np.array([class_colour(i) for i in range(12)])
    gaps = np.abs(colours[:, None] - colours).sum(axis=-1) + 9 * np.eye(12)
    assert gaps.min() > 0.15


def test_gallery_keeps_shapes_and_order():
    panels = [Panel(np.full((h, w, 3), 0.5), f"number {i}") for i, (h, w) in enumerate([(30, 60), (60, 30), (40, 40)])]
    figure = gallery(panels, 2, ["a title"], side=2.0)
    sizes = [ax.get_window_extent().bounds[2:] for ax in figure.axes]
    np.testing.assert_allclose(sizes, [(200, 100), (100, 200), (200, 200)], rtol=0.02)
    boxes = [ax.get_window_extent() for ax in figure.axes]
    assert boxes[0].x1 <= boxes[1].x0 and boxes[2].y1 <= boxes[0].y0 and boxes[2].y1 <= boxes[1].y0
    height, width = figure.get_size_inches()[::-1] * figure.dpi
    assert all(b.x0 >= 0 and b.x1 <= width and b.y0 >= 0 and b.y1 <= height for b in boxes)
    assert [text.get_text() for text in figure.texts] == ["a title", "number 0", "number 1", "number 2"]


def test_files(models, tmp_path):
    model, processor = load_detector(models["tfm"])
    found = [detect(model, processor, image) for image in IMAGES[:4]]
    one = imread(plot_detections(found[:1], tmp_path / "a" / "one.png"))
    assert one.shape[1] > 900, "a single image is large"
    assert imread(plot_detections(found, tmp_path / "four.png")).shape[1] > 1000
    with pytest.raises(ValueError, match=r'output must be a "\.png" file'):
        plot_detections(found, tmp_path / "four.jpg")


@pytest.mark.parametrize("kind", [pytest.param("tfm", marks=pytest.mark.slow), "tfm_panoptic"])
def test_the_command_line(kind, models, tmp_path, capsys):
    for i, image in enumerate(IMAGES[:2]):
        image.image.save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    output = str(tmp_path / "found.png")
    cli.main(["show", "detections", models[kind], *files, "--threshold", "0.6", "--output", output])
    assert capsys.readouterr().out.strip() == output
    expected = [detect(*load_detector(models[kind]), image, 0.6) for image in IMAGES[:2]]
    np.testing.assert_array_equal(
        imread(output)[40:], imread(plot_detections(expected, tmp_path / "expected.png"))[40:]
    )
