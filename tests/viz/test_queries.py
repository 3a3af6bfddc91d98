"""Plots of object queries: attention over the image, and boxes of every query over a data set."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from detector_data import EDGES, LABELS, SIZES, encoded, found_by_hand, photos, save_detector
from matplotlib.image import imread
from transformers import DetrConfig, DetrImageProcessor

from hf_tfm import TfmDeformableDetrConfig, TfmDeformableDetrForObjectDetection, cli
from hf_tfm.hub.detectors import load_detector
from hf_tfm.viz import NamedImage, plot_queries, plot_query_slots, query_boxes, query_maps
from hf_tfm.viz import queries as queries_module
from hf_tfm.viz.queries import QueryPoints, query_objects, read_images, shape_colours, slot

IMAGES = [NamedImage(f"photo {i}", photo) for i, photo in enumerate(photos())]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    return {
        kind: save_detector(folder / kind, kind) for kind in ("tfm", "detr", "yolos", "tfm_panoptic", "detr_panoptic")
    }


def tensors() -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(photo)).permute(2, 0, 1) for photo in photos()]


@pytest.mark.parametrize(
    "kind",
    [
        "tfm",
        pytest.param("detr", marks=pytest.mark.slow),
        pytest.param("tfm_panoptic", marks=pytest.mark.slow),
        "detr_panoptic",
    ],
)
def test_maps_equal_the_model_cross_attention_in_image_order(kind, models):
    model, processor = load_detector(models[kind])
    found = query_maps(model, processor, IMAGES[0], threshold=0.5)
    pixels = processor(images=photos()[0], return_tensors="pt")["pixel_values"]
    assert pixels.shape[2:] == (96, 128)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(pixels, output_attentions=True)
    expected = output.cross_attentions[-1][0].mean(dim=0).reshape(-1, 3, 4)
    np.testing.assert_allclose(found.maps, expected[found.queries], atol=1e-5)
    np.testing.assert_allclose(found.maps.sum(axis=(1, 2)), 1.0, atol=1e-4)
    boxes = found_by_hand(models[kind])[0][0]
    assert (np.diff(found.objects.scores) <= 0).all() and set(found.queries) == set(
        torch.nonzero(boxes["scores"] >= 0.5).flatten().tolist()
    )
    np.testing.assert_allclose(found.objects.scores, boxes["scores"][found.queries], atol=1e-4)
    np.testing.assert_array_equal(found.objects.labels, boxes["labels"][found.queries])
    scale = np.array([128 / 64, 96 / 48] * 2)
    np.testing.assert_allclose(found.objects.boxes, boxes["boxes"][found.queries] * scale, atol=1e-2)
    shown = pixels[0].permute(1, 2, 0).numpy() * processor.image_std + processor.image_mean
    np.testing.assert_allclose(found.image, shown.clip(0, 1), atol=1e-5)


def test_padding_is_removed(models):
    model, _ = load_detector(models["tfm"])
    padded = DetrImageProcessor(size=EDGES, pad_size={"height": 160, "width": 192})
    found = query_maps(model, padded, IMAGES[0], threshold=0.0)
    inputs = padded(images=photos()[0], return_tensors="pt")
    assert inputs["pixel_values"].shape[2:] == (160, 192)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    whole = output.cross_attentions[-1][0].mean(dim=0).reshape(-1, 5, 6)
    assert found.image.shape == (96, 128, 3) and found.maps.shape == (9, 3, 4)
    np.testing.assert_allclose(found.maps, whole[found.queries, :3, :4], atol=1e-5)
    assert whole[:, 3:].abs().max() == whole[:, :, 4:].abs().max() == 0
    corner = output.pred_boxes[0, found.queries]
    np.testing.assert_allclose(
        found.objects.boxes[:, 2:] - found.objects.boxes[:, :2], corner[:, 2:] * torch.tensor([128, 96]), rtol=1e-4
    )


def test_backend_and_mode_are_restored(models):
    model, processor = load_detector(models["tfm"])
    expected = query_maps(model, processor, IMAGES[1])
    model.set_attn_implementation("sdpa")
    found = query_maps(model.train(), processor, IMAGES[1])
    assert model.training and model.config._attn_implementation == "sdpa"
    np.testing.assert_array_equal(found.maps, expected.maps)
    assert not model.model.input_projection._forward_hooks


def test_number_of_queries(models):
    model, processor = load_detector(models["tfm"])
    all_of_them = query_maps(model, processor, IMAGES[0], threshold=0.0)
    assert sorted(all_of_them.queries) == list(range(9))
    assert (
        query_maps(model, processor, IMAGES[0], threshold=0.0, most=3).queries.tolist()
        == all_of_them.queries[:3].tolist()
    )
    chosen = query_maps(model, processor, IMAGES[0], threshold=1.0, which=[5, 0])
    assert chosen.queries.tolist() == [5, 0]
    row = all_of_them.queries.tolist().index(5)
    np.testing.assert_array_equal(chosen.maps[0], all_of_them.maps[row])
    np.testing.assert_array_equal(chosen.objects.boxes[0], all_of_them.objects.boxes[row])
    none = query_maps(model, processor, IMAGES[0], threshold=1.0)
    assert none.queries.tolist() == all_of_them.queries[:4].tolist(), "without detections, the four best queries"


def test_scores_of_models_without_a_no_object_class():
    """Deformable DETR and others score each class separately."""
    logits = torch.tensor([[[2.0, -1.0, 0.0], [-3.0, -2.0, -4.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]])
    output = {"logits": logits, "pred_boxes": boxes}
    scores, labels, corners = query_objects(type("Output", (), output), DetrConfig(num_labels=3), (50, 100))
    torch.testing.assert_close(scores, torch.tensor([2.0, -2.0]).sigmoid())
    assert labels.tolist() == [0, 1]
    torch.testing.assert_close(corners, torch.tensor([[40.0, 15.0, 60.0, 35.0], [0.0, 0.0, 50.0, 50.0]]))
    scores, labels, _ = query_objects(type("Output", (), output), DetrConfig(num_labels=2), (50, 100))
    torch.testing.assert_close(scores, logits[0].softmax(dim=-1)[:, :2].max(dim=-1).values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, r"threshold must be in \[0, 1\], got -0.1"),
        ({"most": 0}, "most must be at least 1, got 0"),
        ({"which": [3, 9]}, r"queries must be one or more of 0 to 8, got \[3, 9\]"),
        ({"which": []}, r"queries must be one or more of 0 to 8, got \[\]"),
    ],
)
def test_options_out_of_range(models, options, message):
    with pytest.raises(ValueError, match=message):
        query_maps(*load_detector(models["tfm"]), IMAGES[0], **options)


def test_models_without_global_cross_attention_are_refused(models):
    with pytest.raises(ValueError, match="YolosForObjectDetection has no attention of its queries over one feature"):
        query_maps(*load_detector(models["yolos"]), IMAGES[0])


def test_plot_has_a_panel_for_each_query(models, tmp_path, monkeypatch):
    found = query_maps(*load_detector(models["tfm"]), IMAGES[0], threshold=0.5)
    seen = []
    gallery = queries_module.gallery
    monkeypatch.setattr(
        queries_module, "gallery", lambda *args, **options: seen.append(gallery(*args, **options)) or seen[-1]
    )
    path = plot_queries(found, tmp_path / "queries.png")
    axes = seen[0].axes
    assert len(axes) == 1 + len(found.queries) > 3
    assert len(axes[0].patches) == len(found.queries)
    for i, ax in enumerate(axes[1:]):
        (patch,) = ax.patches
        np.testing.assert_allclose(patch.get_bbox().extents, found.objects.boxes[i], atol=1e-4)
        shown = np.asarray(ax.images[0].get_array())
        row, column = np.unravel_index(found.maps[i].argmax(), found.maps[i].shape)
        cell = shown[row * 32 + 16, column * 32 + 16]
        assert cell[0] > 0.85 and cell[2] < 0.2, "bright where attention is largest"
    assert imread(path).shape[1] > 1000


# --- boxes over a data set


@pytest.mark.parametrize("kind", ["tfm", "yolos"])
def test_boxes_of_every_query(kind, models):
    model, processor = load_detector(models[kind])
    boxes = query_boxes(model.train(), processor, tensors())
    assert boxes.shape == (len(SIZES), 9, 4) and model.training
    for own, found, (height, width) in zip(boxes, found_by_hand(models[kind])[0], SIZES, strict=True):
        corners = np.concatenate([own[:, :2] - own[:, 2:] / 2, own[:, :2] + own[:, 2:] / 2], axis=1)
        np.testing.assert_allclose(corners * np.array([width, height] * 2), found["boxes"], atol=1e-2)
    with pytest.raises(ValueError, match="images must hold at least one"):
        query_boxes(model, processor, [])


def test_color_shows_the_shape():
    boxes = np.array([[0.5, 0.5, w, h] for w, h in ((0.05, 0.05), (0.95, 0.1), (0.1, 0.95), (1.0, 1.0))])
    red, green, blue = shape_colours(boxes).T
    assert green.argmax() == 0 and red[1] > 0.9 > 0.2 > blue[1] and blue[2] > 0.9 > 0.2 > red[2]
    assert (red[3], green[3], blue[3]) == (1.0, 0.0, 1.0)


def test_slots(tmp_path, monkeypatch):
    boxes = np.random.RandomState(0).uniform(0, 1, (30, 24, 4)).astype(np.float32)
    seen = []

    def record(ax, own, title):
        slot(ax, own, title)
        seen.append((ax, title))

    monkeypatch.setattr(queries_module, "slot", record)
    plot_query_slots(boxes, tmp_path / "slots.png", "a model", [3, 17])
    assert [title for _, title in seen] == ["query 3", "query 17"]
    for (ax, _), query in zip(seen, (3, 17), strict=True):
        np.testing.assert_allclose(ax.collections[0].get_offsets(), boxes[:, query, :2])
        np.testing.assert_allclose(ax.collections[0].get_facecolors()[:, :3], shape_colours(boxes[:, query]))
        assert ax.get_ylim() == (1.0, 0.0), "y points down, as in images"
    seen.clear()
    assert imread(plot_query_slots(boxes, tmp_path / "slots.png")).shape[0] > 500
    assert [title for _, title in seen] == [f"query {i}" for i in range(20)]
    with pytest.raises(ValueError, match=r"queries must be one or more of 0 to 23, got \[24\]"):
        plot_query_slots(boxes, tmp_path / "slots.png", queries=[24])


def test_unreadable_images_are_skipped(caplog):
    rows = [{"image": encoded(photo)} for photo in photos()]
    rows[2] = {"image": {"bytes": b"none", "path": None}}
    assert [tuple(image.shape[1:]) for image in read_images(rows)] == [s for i, s in enumerate(SIZES) if i != 2]
    assert "image 2 is left out" in caplog.text


def test_the_command_line(models, tmp_path, capsys, monkeypatch):
    photos()[0].save(tmp_path / "a.png")
    output = str(tmp_path / "queries.png")
    cli.main(["show", "queries", models["detr"], str(tmp_path / "a.png"), "--queries", "[8,0]", "--output", output])
    over_image = imread(output)
    folder = tmp_path / "data"
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_list([{"image": encoded(photo)} for photo in photos()], features)
    rows.to_parquet(folder / "validation.parquet")
    drawn = []
    monkeypatch.setattr(queries_module, "plot_query_slots", lambda boxes, *rest: drawn.append((boxes, rest)) or output)
    cli.main(
        ["show", "queries", models["detr"], "--dataset_name", str(folder), "--max_samples", "4", "--queries", "[1,2]"]
    )
    ((boxes, rest),) = drawn
    np.testing.assert_allclose(boxes, query_boxes(*load_detector(models["detr"]), tensors()[:4]), atol=1e-6)
    assert rest == ("queries.png", "detr: data, validation", [1, 2])
    assert capsys.readouterr().out.split() == [output, output] and over_image.shape[1] > 500
    for words in ([], [str(tmp_path / "a.png"), "--dataset_name", str(folder)]):
        with pytest.raises(SystemExit, match="1"):
            cli.main(["show", "queries", models["detr"], *words])
        assert "give one of them" in capsys.readouterr().err


def test_points_of_a_detector_that_samples(tmp_path):
    """Points of a padded image in pixels, with their weights; larger points on top of smaller ones."""
    config = TfmDeformableDetrConfig(backbone="test_resnet", d_model=32, num_queries=9, num_feature_levels=2, **LABELS)
    torch.manual_seed(0)
    model = TfmDeformableDetrForObjectDetection(config).train()
    padded = DetrImageProcessor(size=EDGES, pad_size={"height": 160, "width": 192})
    found = query_maps(model, padded, IMAGES[0], threshold=0.0, most=3)
    assert model.training and isinstance(found, QueryPoints)
    inputs = padded(images=photos()[0], return_tensors="pt")
    with torch.no_grad():
        output = model.eval()(**inputs, output_attentions=True, output_sampling_points=True)
    shares = output.sampling_points[-1][0, found.queries].reshape(3, -1, 2)
    np.testing.assert_allclose(found.points, shares * torch.tensor([192, 160]), atol=1e-3)
    np.testing.assert_allclose(found.weights.sum(axis=1), 8.0, atol=1e-5)  # 1 per head
    assert found.points.shape == (3, 8 * 2 * 4, 2) and found.image.shape == (96, 128, 3)
    # A new model looks at squares of 1 to 4 cells around the references, in cells of both levels.
    centre = output.intermediate_reference_points[0, -1, found.queries] * torch.tensor([128, 96])
    offsets = np.abs(found.points - centre.numpy()[:, None]).max(axis=-1).reshape(3, 8, 2, 4)
    np.testing.assert_allclose(offsets[:, :, 0], np.broadcast_to([16, 32, 48, 64], (3, 8, 4)), atol=0.1)
    file = plot_queries(found, tmp_path / "points.png")
    plain = plot_queries(replace(found, points=found.points + 1e6), tmp_path / "none.png")
    assert (imread(file) != imread(plain)).any(axis=-1).sum() > 500
