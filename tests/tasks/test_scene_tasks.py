"""Batches of scenes match transformers' image processor and do not depend on how a step is split."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_tasks import equal
from PIL import Image
from transformers import DetrImageProcessor, ViTImageProcessor

from hf_tfm.data.batching import SampleRef, StepLoader, sample_ref
from hf_tfm.data.detection import category_ids, scene_rows
from hf_tfm.data.digit_scenes import CATEGORIES, digit_scenes
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.data.images import WatchedLoader, decode
from hf_tfm.data.panoptic import panoptic_rows
from hf_tfm.data.pixels import PaddedPixels, scene_processor
from hf_tfm.data.scenes import SceneAugmentation
from hf_tfm.data.shape_batches import ShapeSampler
from hf_tfm.data.source import load_splits
from hf_tfm.metrics import CocoAP, PanopticQuality
from hf_tfm.tasks.scenes import SceneCollator

COCO128 = Path(__file__).parents[3] / "shared" / "data" / "coco128"
PROCESSOR = scene_processor(100, 170)
AUGMENTATION = SceneAugmentation(scales=(60, 80, 100), max_size=170, color_jitter=0.3)
SHIFT = [2, 0, 1, *range(3, 13)]  # the model's classes are in another order than the data's


@pytest.fixture(scope="module")
def source():
    return digit_scenes(train=14, validation=0, test=0)["train"]


def in_other_shapes(rows, column):
    """Rows with images of other shapes: 128 pixels high or wide, the other side 128, 96 or 70; boxes are kept."""
    changed = []
    for i, row in enumerate(rows):
        height, width = [(128, 128), (96, 128), (128, 70)][i % 3]
        small = {**row, "height": height, "width": width, "image_id": 100 + i}
        for name in ("image", "panoptic"):
            if name in row:
                pixels = decode(row[name])[:, :height, :width].permute(1, 2, 0)
                small[name] = Image.fromarray(pixels.numpy())
        if column == "objects":
            small["objects"] = []
            for k, found in enumerate(row["objects"]):
                x, y, w, h = found["bbox"]
                if x + w <= width and y + h <= height:
                    plain = {key: value for key, value in found.items() if key != "segmentation"}
                    small["objects"].append({**plain, "iscrowd": k == 1})
        changed.append(small)
    return changed


@pytest.fixture(scope="module")
def objects(source):
    return in_other_shapes(scene_rows(source)[0], "objects")


@pytest.fixture(scope="module")
def segments(source):
    return in_other_shapes(panoptic_rows(source, CATEGORIES), "segments_info")


def task_of(rows, augmentation=AUGMENTATION, seed=3, masks=None, processor=PROCESSOR):
    panoptic = "panoptic" in rows[0]
    ids = SHIFT if panoptic else SHIFT[:10]
    return collators_of(processor, ids, augmentation, panoptic if masks is None else masks, seed)


def collators_of(processor, ids, augmentation=None, masks=False, seed=0):
    """The collators of evaluation and training."""
    pixels = PaddedPixels(processor)
    plain, training = (SceneCollator(pixels, ids, masks, training, augmentation, seed) for training in (False, True))
    return SimpleNamespace(pixels=pixels, collate=plain, collate_training=training)


def training_loader(task, rows, micro=None, rank=0, world_size=1, num_workers=0, seed=3):
    sizes = np.array([[row["height"], row["width"]] for row in rows])
    sampler = ShapeSampler(sizes, 5, AUGMENTATION, seed)
    return StepLoader(rows, sampler, task.collate_training, micro, rank, world_size, num_workers)


# --- as transformers' image processor


def test_evaluation_batch_matches_the_processor(objects):
    task = task_of(objects)
    batch = task.collate(objects, list(range(14)), epoch=0)
    annotations = [
        {
            "image_id": row["image_id"],
            "annotations": [
                {**o, "category_id": SHIFT[o["category"]], "iscrowd": int(o["iscrowd"])} for o in row["objects"]
            ],
        }
        for row in objects
    ]
    images = [decode(row["image"]) for row in objects]
    theirs = PROCESSOR(images, annotations, return_tensors="pt")
    assert torch.equal(batch["pixel_mask"], theirs["pixel_mask"].bool())
    scaled = task.pixels.scale_padded(batch["pixel_values"], batch["pixel_mask"])
    assert (scaled - theirs["pixel_values"]).abs().max() < 1e-5
    assert batch["images"] == 14 and batch["indices"].tolist() == list(range(14))
    # In a padded batch the processor normalizes boxes by the padded size, which its own post-processing does not
    # undo; called for each image alone, as in the authors' code, it is correct.
    for row, image, annotation, label in zip(objects, images, annotations, batch["labels"], strict=True):
        (expected,) = PROCESSOR([image], [annotation], return_tensors="pt")["labels"]
        assert label.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(label[name], value, rtol=1e-5, atol=1e-6, msg=name)
        assert len(label["boxes"]) == sum(not o["iscrowd"] for o in row["objects"])


def test_segment_boxes_and_masks_match_the_processor(segments, tmp_path):
    task = task_of(segments)
    batch = task.collate(segments, list(range(14)), epoch=0)
    for i, (row, label) in enumerate(zip(segments, batch["labels"], strict=True)):
        row["panoptic"].save(tmp_path / "map.png")
        ids = set(np.unique(np.array(row["panoptic"]).astype(int) @ [1, 256, 65536]).tolist())
        info = [
            {"id": s["id"], "category_id": SHIFT[s["category"]], "area": s["area"], "iscrowd": 0}
            for s in row["segments_info"]
            if s["id"] in ids
        ]
        annotation = {"image_id": row["image_id"], "file_name": "map.png", "segments_info": info}
        (expected,) = PROCESSOR(
            [decode(row["image"])], [annotation], masks_path=tmp_path, format="coco_panoptic", return_tensors="pt"
        )["labels"]
        height, width = label["size"].tolist()
        assert torch.equal(label["masks"][:, :height, :width], expected["masks"].bool())
        assert label["masks"].shape[1:] == batch["pixel_mask"][i].shape
        assert not label["masks"][:, ~batch["pixel_mask"][i]].any()
        # The processor's boxes end one pixel before the segment does.
        last = 0.5 / torch.tensor([row["width"], row["height"]])
        shifted = expected["boxes"] + torch.cat([last, 2 * last])
        torch.testing.assert_close(label["boxes"], shifted, rtol=1e-5, atol=1e-6)
        for name in ("class_labels", "image_id", "orig_size", "size"):
            assert torch.equal(label[name], expected[name])
        torch.testing.assert_close(label["area"], expected["area"])


@pytest.mark.skipif(not COCO128.is_dir(), reason="needs shared/data/coco128")
def test_photos_at_the_size_of_the_paper():
    rows, _ = scene_rows(load_splits(str(COCO128))["validation"].select(range(3)))
    processor = scene_processor()
    task = collators_of(processor, range(80))
    batch = task.collate([rows[i] for i in range(3)], [0, 1, 2], epoch=0)
    theirs = processor([decode(row["image"]) for row in rows], return_tensors="pt")
    assert torch.equal(batch["pixel_mask"], theirs["pixel_mask"].bool())
    scaled = task.pixels.scale_padded(batch["pixel_values"], batch["pixel_mask"])
    assert (scaled - theirs["pixel_values"]).abs().max() < 1e-5


def test_padding_is_zero(objects):
    task = task_of(objects)
    batch = task.collate_training(objects[:4], list(range(4)), epoch=0)
    scaled = task.pixels.scale_padded(batch["pixel_values"], batch["pixel_mask"])
    outside = ~batch["pixel_mask"]
    assert outside.any() and scaled.dtype == torch.float32
    assert (scaled.permute(0, 2, 3, 1)[outside] == 0).all()
    assert batch["pixel_values"].dtype == torch.uint8
    assert (batch["pixel_values"].permute(0, 2, 3, 1)[outside] == 0).all()


# --- a step does not depend on its split


@pytest.mark.parametrize("kind", ["objects", "segments"])
@pytest.mark.parametrize(("micro", "ranks"), [(2, 1), (None, 2), (2, 3)])
def test_ranks_and_micro_batches_only_split_the_step(request, kind, micro, ranks):
    rows = request.getfixturevalue(kind)
    task = task_of(rows)
    whole = [step for (step,) in training_loader(task, rows).epoch(1)]
    parts = [list(training_loader(task, rows, micro, rank, ranks).epoch(1)) for rank in range(ranks)]
    assert len(whole) == 3
    for number, expected in enumerate(whole):
        batches = [batch for part in parts for batch in part[number] if batch["images"]]
        for name in ("pixel_values", "pixel_mask", "indices"):
            assert torch.equal(torch.cat([batch[name] for batch in batches]), expected[name])
        assert equal([label for batch in batches for label in batch["labels"]], expected["labels"])
        assert len({batch["pixel_values"].shape[2:] for batch in batches}) == 1


@pytest.mark.parametrize("kind", ["objects", "segments"])
def test_batches_do_not_depend_on_workers_or_resuming(request, kind):
    rows = request.getfixturevalue(kind)
    task = task_of(rows)
    first = list(training_loader(task, rows).epoch(2))
    torch.manual_seed(9), np.random.seed(9)
    assert equal(first, list(training_loader(task_of(rows), rows, num_workers=2).epoch(2)))
    assert equal(first[1:], list(training_loader(task, rows).epoch(2, start=1)))
    assert not equal(first, list(training_loader(task, rows).epoch(3)))


def test_color_jitter_depends_on_seed_epoch_and_row(objects):
    colours = SceneAugmentation(scales=(100,), crop=0.0, flip=0.0, color_jitter=0.5)
    draws = [(seed, epoch, row) for seed in (3, 4) for epoch in (0, 1) for row in (0, 1)]
    made = [
        task_of(objects, colours, seed).collate_training(objects[:1], [row], epoch)["pixel_values"]
        for seed, epoch, row in draws * 2
    ]
    assert len({pixels.numpy().tobytes() for pixels in made}) == len(draws)
    assert equal(made[: len(draws)], made[len(draws) :])


def test_a_step_fills_its_canvas(objects):
    task = task_of(objects)
    for epoch in range(3):
        for (batch,) in training_loader(task, objects).epoch(epoch):
            H, W = batch["pixel_values"].shape[2:]
            sizes = torch.stack([label["size"] for label in batch["labels"]])
            assert ((sizes[:, 0] == H) | (sizes[:, 1] == W)).all()
            assert batch["pixel_mask"].float().mean() > 0.75
            for mask, (height, width) in zip(batch["pixel_mask"], sizes.tolist(), strict=True):
                assert mask[:height, :width].all() and mask.sum() == height * width


def test_without_a_canvas_each_scene_is_scaled_separately(objects):
    """The original DETR batches, in random order."""
    task = task_of(objects)
    loader = StepLoader(objects, BatchSampler(14, 7, seed=1), task.collate_training)
    scales = [int(label["size"].min()) for (batch,) in loader.epoch(0) for label in batch["labels"]]
    assert len(set(scales)) > 1 and all(s in (60, 80, 100) or s < 100 for s in scales)


def test_training_without_augmentation_equals_evaluation(objects):
    task = task_of(objects, augmentation=None)
    training = task.collate_training(objects, list(range(14)), epoch=5)
    evaluation = task.collate(objects, list(range(14)), epoch=0)
    evaluation.pop("references")
    assert equal(training, evaluation)


def test_training_targets_follow_the_augmentation(segments):
    """Boxes enclose their masks, and classes are the model's."""
    task = task_of(segments)
    for (batch,) in training_loader(task, segments).epoch(0):
        for index, label in zip(batch["indices"].tolist(), batch["labels"], strict=True):
            known = {SHIFT[s["category"]] for s in segments[index]["segments_info"]}
            assert set(label["class_labels"].tolist()) <= known
            height, width = label["size"].tolist()
            for box, mask in zip(label["boxes"], label["masks"], strict=True):
                y, x = torch.nonzero(mask, as_tuple=True)
                left, top = (box[:2] - box[2:] / 2) * torch.tensor([width, height])
                right, bottom = (box[:2] + box[2:] / 2) * torch.tensor([width, height])
                assert x.min() > left - 2 and y.min() > top - 2 and x.max() < right + 1 and y.max() < bottom + 1
            assert (label["boxes"] >= 0).all() and (label["boxes"] <= 1).all()


# --- crowds, unreadable images, dummy batches


def test_crowds_are_references_but_not_targets(objects):
    task = task_of(objects)
    batch = task.collate(objects, list(range(14)), epoch=0)
    crowds = 0
    for row, label, reference in zip(objects, batch["labels"], batch["references"], strict=True):
        classes = [SHIFT[o["category"]] for o in row["objects"]]
        assert reference["labels"].tolist() == classes
        assert label["class_labels"].tolist() == [
            c for c, o in zip(classes, row["objects"], strict=True) if not o["iscrowd"]
        ]
        assert not label["iscrowd"].any()
        crowds += reference["iscrowd"].sum()
        for box, o in zip(reference["boxes"], row["objects"], strict=True):
            x, y, w, h = o["bbox"]
            assert box.tolist() == [x, y, x + w, y + h]
    assert crowds > 3
    assert "references" not in task.collate_training(objects, list(range(14)), epoch=0)


def test_references_suit_the_metrics(objects, segments):
    """Perfect predictions score 1."""
    references = task_of(objects).collate(objects, list(range(14)), epoch=0)["references"]
    ap = CocoAP()
    predictions = [{**r, "scores": np.ones(len(r["labels"]))} for r in references]
    ap.add_batch(predictions=predictions, references=references)
    assert ap.compute()["AP"] == pytest.approx(1.0)
    references = task_of(segments).collate(segments, list(range(14)), epoch=0)["references"]
    pq = PanopticQuality()
    for reference in references:
        found = [{"id": s["id"], "label_id": s["category_id"]} for s in reference["segments_info"]]
        pq.add_batch(
            predictions=[{"segmentation": reference["segmentation"], "segments_info": found}], references=[reference]
        )
    assert pq.compute()["PQ"] == pytest.approx(1.0)


@pytest.mark.parametrize("training", [True, False])
def test_bad_image_is_dropped_and_the_others_are_kept(objects, training):
    task = task_of(objects)
    collate = task.collate_training if training else task.collate
    numbers = ShapeSampler(np.array([[100, 100]] * 14), 14, AUGMENTATION, 3).steps(0)[0] if training else range(14)
    rows = [objects[sample_ref(number).index] for number in numbers]
    good = collate(rows, list(numbers), epoch=0)
    broken = [{**row, "image": {"bytes": b"", "path": "a.jpg"}} if i == 3 else row for i, row in enumerate(rows)]
    broken[5] = {**rows[5], "height": 77}
    batch = collate(broken, list(numbers), epoch=0)
    assert [number for number, _ in batch["bad"]] == [sample_ref(numbers[i]).index for i in (3, 5)]
    assert batch["bad"][0][1].startswith("a.jpg: ") and "its row states 77 x" in batch["bad"][1][1]
    kept = [i for i in range(14) if i not in (3, 5)]
    assert batch["images"] == 12
    assert torch.equal(batch["pixel_values"], good["pixel_values"][kept])
    assert equal(batch["labels"], [good["labels"][i] for i in kept])


def test_repeated_samples_are_refused(objects):
    with pytest.raises(ValueError, match="sample 3 is copy 2: scenes cannot be repeated in a step"):
        task_of(objects).collate_training(objects[3:4], [SampleRef(3, copy=2)], epoch=0)


def test_bad_images_are_reported_by_row(objects, caplog):
    task = task_of(objects)
    rows = [{**row, "image": b"no image"} if i == 6 else row for i, row in enumerate(objects)]
    loader = WatchedLoader(training_loader(task, rows), max_bad_images=1)
    assert sum(batch["images"] for step in loader.epoch(0) for batch in step) == 13
    assert list(loader.bad) == [6] and "image 6 is left out" in caplog.text


@pytest.mark.parametrize("kind", ["objects", "segments"])
@pytest.mark.parametrize("bad", [True, False])
def test_empty_batch_has_no_effect(request, kind, bad):
    rows = request.getfixturevalue(kind)[:2]
    task = task_of(rows)
    rows = [{**row, "image": b"no image"} for row in rows] if bad else rows
    for collate in (task.collate, task.collate_training):
        batch = collate(rows, [0, 1], epoch=0, is_dummy=not bad)
        assert batch["images"] == 0 and len(batch["bad"]) == (2 if bad else 0)
        assert batch["pixel_values"].shape == (1, 3, 64, 64) and not batch["pixel_values"].any()
        assert batch["pixel_mask"].all()  # fully masked attention must stay finite
        (label,) = batch["labels"]
        assert label["boxes"].shape == (0, 4) and len(label["class_labels"]) == 0
        assert ("masks" in label) == (kind == "segments") and not batch.get("references")


def test_batch_with_an_image_without_objects(objects):
    rows = [{**row, "objects": []} for row in objects[:2]] + objects[2:4]
    for collate in (task_of(rows).collate, task_of(rows).collate_training):
        labels = collate(rows, [0, 1, 2, 3], epoch=0)["labels"]
        assert [len(label["boxes"]) for label in labels[:2]] == [0, 0] and labels[0]["boxes"].shape == (0, 4)


# --- classes and processors


def test_classes_are_matched_by_name(source):
    rows, _ = scene_rows(source)
    names = [str(digit) for digit in range(9, -1, -1)]
    task = collators_of(PROCESSOR, category_ids(rows, names))
    label = task.collate([rows[0]], [0], epoch=0)["labels"][0]
    assert label["class_labels"].tolist() == [9 - o["category"] for o in rows[0]["objects"]]


def test_masks_of_objects(source):
    rows, _ = scene_rows(source, masks=True)
    task = collators_of(PROCESSOR, range(10), AUGMENTATION, masks=True, seed=3)
    batch = task.collate([rows[i] for i in range(4)], list(range(4)), epoch=0)
    for label, reference in zip(batch["labels"], batch["references"], strict=True):
        assert label["masks"].shape == (len(label["boxes"]), 100, 100) and label["masks"].dtype == torch.bool
        assert reference["masks"].shape == (len(label["boxes"]), 128, 128)
        np.testing.assert_array_equal(reference["masks"].sum(axis=(1, 2)), reference["area"])
    assert all("masks" in label for label in task.collate_training([rows[0]], [0], epoch=0)["labels"])


def test_processor_survives_saving(tmp_path):
    PROCESSOR.save_pretrained(tmp_path)
    again = task_of([{}], processor=DetrImageProcessor.from_pretrained(tmp_path)).pixels
    first = task_of([{}]).pixels
    assert (again.shortest, again.longest, again.mean, again.std) == (100, 170, first.mean, first.std)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scene_processor(0), r"size must be in \[1, max_size = 1333\], got 0"),
        (lambda: scene_processor(800, 700), r"size must be in \[1, max_size = 700\], got 800"),
        (lambda: collators_of(ViTImageProcessor(), [0]), "processor must resize to shortest_edge and longest_edge"),
        (lambda: collators_of(DetrImageProcessor(do_pad=False), [0]), "processor must pad images"),
        (lambda: collators_of(DetrImageProcessor(do_resize=False), [0]), "processor must resize to shortest_edge"),
        (lambda: collators_of(object(), [0]), "processor must be one of transformers' torchvision ones, got object"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
