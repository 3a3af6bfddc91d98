"""The plot of every evaluation: the same images, with detections and ground truth."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from detector_data import (
    NAMES,
    SIZES,
    found_by_hand,
    objects_in,
    photos,
    save_detector,
    segments_in,
    write_objects,
    write_panoptic,
)
from matplotlib.image import imread

from hf_tfm.data.detection import scene_rows
from hf_tfm.data.panoptic import panoptic_categories, panoptic_rows
from hf_tfm.data.source import load_splits
from hf_tfm.hub.detectors import load_detector
from hf_tfm.tasks.object_detection import DetectionTask
from hf_tfm.tasks.panoptic_segmentation import PanopticTask
from hf_tfm.viz import NamedImage, detect, predictions


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """A detector, its processor, rows with some of its detections as objects, and those objects."""
    folder = tmp_path_factory.mktemp("boxes")
    model = save_detector(folder / "model", "tfm")
    objects, references = objects_in(found_by_hand(model)[0])
    rows, _ = scene_rows(load_splits(write_objects(folder / "data", objects, bad=(2,)))["test"])
    return *load_detector(model), rows, references


def make(boxes, folder, accelerator=None, count=8, task_class=DetectionTask):
    model, processor, rows, _ = boxes
    task = task_class.for_model(model, processor)
    task.accelerator, task.splits = accelerator or Accelerator(cpu=True), {"test": rows}
    return task.prediction_pictures("test", folder, count)


@pytest.fixture
def drawn(monkeypatch):
    """The panels of every plot."""
    seen, gallery = [], predictions.gallery

    def record(panels, *args, **options):
        seen.append(gallery(panels, *args, **options))
        return seen[-1]

    monkeypatch.setattr(predictions, "gallery", record)
    return seen


def corners(patches) -> np.ndarray:
    return np.array([patch.get_bbox().extents for patch in patches]).reshape(-1, 4)


def test_detected_and_true_boxes_of_every_image(boxes, drawn, tmp_path):
    model, processor, _, references = boxes
    path = make(boxes, tmp_path)(model.train(), 12)
    assert path == tmp_path / "predictions" / "step-00000012.png" and imread(path).shape[1] > 1000
    assert model.training
    readable = [i for i in range(len(SIZES)) if i != 2]
    (figure,) = drawn
    assert len(figure.axes) == len(readable)
    for ax, i in zip(figure.axes, readable, strict=True):
        found = detect(model, processor, NamedImage("a", photos()[i]), 0.5).objects
        dashed = [patch for patch in ax.patches if patch.get_linestyle() not in ("-", "solid")]
        solid = [patch for patch in ax.patches if patch not in dashed]
        np.testing.assert_allclose(corners(dashed), references[i]["boxes"], atol=1e-3)
        np.testing.assert_allclose(corners(solid), found.boxes[np.argsort(found.scores)], atol=1e-2)
        np.testing.assert_allclose(ax.images[0].get_array(), np.asarray(photos()[i]) / 255, atol=1e-6)
    titles = [text.get_text() for text in figure.texts]
    assert titles[0] == "step 12: score from 50% on; dashed: truth"
    assert titles[1].endswith(f"found, {len(references[0]['labels'])} true")


def test_same_evenly_spread_images_at_every_step(boxes, drawn, tmp_path):
    model = copy.deepcopy(boxes[0])
    draw = make(boxes, tmp_path, count=3)
    first, second = (draw(model, step).read_bytes() for step in (5, 5))
    assert first == second
    # Of six images the first, the last and the middle one, which is unreadable.
    shown = [tuple(np.asarray(ax.images[0].get_array()).shape[:2]) for ax in drawn[0].axes]
    assert shown == [SIZES[0], SIZES[5]]
    with torch.no_grad():
        for parameter in model.class_labels_classifier.parameters():
            parameter.mul_(0.0)
    other = draw(model, 6)
    assert len(list(other.parent.iterdir())) == 2
    assert all(len(ax.patches) < len(old.patches) for ax, old in zip(drawn[2].axes, drawn[0].axes, strict=True))


def test_segments_are_below_the_true_ones(drawn, tmp_path):
    folder = save_detector(tmp_path / "model", "tfm_panoptic")
    references = segments_in(found_by_hand(folder)[1])
    data = write_panoptic(tmp_path / "data", references)
    model, processor = load_detector(folder)
    categories = panoptic_categories(data)
    rows = panoptic_rows(load_splits(data)["test"], categories)
    there = [i for i, reference in enumerate(references) if reference["segments_info"]]
    assert len(rows) == len(there) > 4
    make((model, processor, rows, None), tmp_path, task_class=PanopticTask)(model, 1)
    axes = drawn[0].axes
    rest = len(there) - 4
    truth, found = axes[:4] + axes[8 : 8 + rest], axes[4:8] + axes[8 + rest :]
    for true, own, i in zip(truth, found, there, strict=True):
        names = [NAMES[segment["category_id"]] for segment in references[i]["segments_info"]]
        assert [text.get_text() for text in true.texts] == names
        objects = detect(model, processor, NamedImage("a", photos()[i]), 0.5).objects
        assert [text.get_text() for text in own.texts] == objects.captions(NAMES)
        plain = np.asarray(photos()[i]) / 255
        covered = (np.asarray(true.images[-1].get_array()) != plain).any(axis=-1)
        inside = np.isin(references[i]["segmentation"], [s["id"] for s in references[i]["segments_info"]])
        assert covered[inside].mean() > 0.99  # an edge may be white on white


def test_every_process_computes_and_one_draws(boxes, tmp_path):
    model, calls = boxes[0], []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    other = SimpleNamespace(is_main_process=False, device=torch.device("cpu"), report_to=[])
    assert make(boxes, tmp_path, other)(model, 1) is None
    hook.remove()
    assert len(calls) == 5 and not list(tmp_path.iterdir())
    assert make(boxes, tmp_path, count=0)(model, 1) is None and not list(tmp_path.iterdir())


def test_trackers_that_accept_images(boxes, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    accelerator.init_trackers("logs")
    sent = []
    accelerator.trackers += [
        SimpleNamespace(
            name="wandb", log_images=lambda images, step: sent.append((images, step)), finish=lambda: None
        ),
        SimpleNamespace(name="other", finish=lambda: None),
    ]
    path = make(boxes, tmp_path, accelerator, count=2)(boxes[0], 40)
    accelerator.end_training()
    expected = imread(path).shape[:2]
    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0}).Reload()
    (event,) = events.Images("predictions")
    assert event.step == 40 and (event.height, event.width) == expected
    ((images, step),) = sent
    assert step == 40 and images["predictions"][0].shape == (*expected, 3)
