"""Panoptic quality: against a slow computation on pixel sets, by hand, in batches, invalid input, loading by path."""

import io
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from hf_tfm.metrics import PanopticQuality, path

DATA = Path(__file__).parents[3] / "shared" / "data"
CLASSES, THINGS = 6, (0, 1, 2)
NAMES = [f"class {k}" for k in range(CLASSES)]


def random_segments(random, size, count, label_key, crowds):
    """Overlapping rectangles and half-planes; about a fifth of the map stays void."""
    pixels = np.zeros(size, np.int64)
    info = []
    for number in random.permutation(1000)[:count] + 1:
        top, left = random.integers(0, size[0] - 2), random.integers(0, size[1] - 2)
        height, width = random.integers(2, size[0]), random.integers(2, size[1])
        pixels[top : top + height // 2 + 1, left : left + width // 2 + 1] = number
        info.append({"id": int(number), label_key: int(random.integers(0, CLASSES))})
        if crowds and info[-1][label_key] in THINGS:
            info[-1]["iscrowd"] = int(random.random() < 0.25)
    there = set(np.unique(pixels).tolist())
    return pixels, [segment for segment in info if segment["id"] in there]


def random_panoptic(seed, crowds=True, size=(24, 30), count=9):
    """A reference, and a prediction that moves it, merges, drops and adds segments, and confuses classes."""
    random = np.random.default_rng(seed)
    pixels, info = random_segments(random, size, 0 if seed % 11 == 5 else count, "category_id", crowds)
    if seed % 7 == 3:  # no common segment
        found, found_info = random_segments(random, size, 0 if seed % 2 else count, "label_id", False)
    else:
        found = np.roll(pixels, random.integers(-2, 3, 2), (0, 1))
        found_info = []
        for segment in info:
            lot = random.random()
            if lot < 0.1:
                found[found == segment["id"]] = 0
                continue
            label = int(random.integers(0, CLASSES)) if lot < 0.25 else segment["category_id"]
            found_info.append({"id": segment["id"], "label_id": label, "score": 0.5})
        top, left = random.integers(0, size[0] - 6), random.integers(0, size[1] - 6)
        found[top : top + 5, left : left + 6] = 5000
        found_info.append({"id": 5000, "label_id": int(random.integers(0, CLASSES))})
    prediction = {"segmentation": found, "segments_info": found_info}
    return prediction, {"image_id": seed, "segmentation": pixels, "segments_info": info}


def pixel_sets(record, label_key, things):
    """[class, crowd, pixels] of each segment; those of a stuff class are merged (Kirillov et al. 2019, section 3)."""
    pixels = {}
    for y, row in enumerate(np.asarray(record["segmentation"]).tolist()):
        for x, number in enumerate(row):
            pixels.setdefault(number, set()).add((y, x))
    segments = []
    for info in record["segments_info"]:
        label, crowd = info[label_key], bool(info.get("iscrowd", 0))
        mine = pixels.get(info["id"], set())
        same = [s for s in segments if s[0] == label and s[1] == crowd]
        if things is not None and label not in things and not crowd and same:
            same[0][2] |= mine
        else:
            segments.append([label, crowd, set(mine)])
    return segments


def slow_panoptic_quality(scenes, things):
    """The paper's definition (sections 4.1 and 4.2), one pair of segments at a time."""
    sums = {k: [0.0, 0, 0, 0] for k in range(CLASSES)}  # IoU, TP, FP, FN
    for prediction, reference in scenes:
        found, real = pixel_sets(prediction, "label_id", things), pixel_sets(reference, "category_id", things)
        height, width = np.asarray(reference["segmentation"]).shape
        void = {(y, x) for y in range(height) for x in range(width)} - set().union(*[s[2] for s in real])
        matched = set()
        for label, _, pixels in found:
            if not pixels:
                continue
            hit = False
            for g, (true_label, crowd, true_pixels) in enumerate(real):
                iou = len(pixels & true_pixels) / len((pixels - void) | true_pixels)
                if label == true_label and not crowd and iou > 0.5:
                    assert not hit and g not in matched  # theorem in section 4.1
                    hit = True
                    matched.add(g)
                    sums[label][0] += iou
                    sums[label][1] += 1
            ignored = void.union(*[s[2] for s in real if s[1] and s[0] == label])
            if not hit and len(pixels & ignored) / len(pixels) <= 0.5:
                sums[label][2] += 1
        for g, (true_label, crowd, _) in enumerate(real):
            sums[true_label][3] += not crowd and g not in matched
    per_class = {}
    for k, (iou, tp, fp, fn) in sums.items():
        if tp + fp + fn:
            sq, rq = iou / tp if tp else 0.0, tp / (tp + fp / 2 + fn / 2)
            per_class[k] = {"PQ": sq * rq, "SQ": sq, "RQ": rq}
    groups = {"": range(CLASSES)}
    if things is not None:
        groups |= {"_th": things, "_st": [k for k in range(CLASSES) if k not in things]}
    result = {}
    for group, members in groups.items():
        there = [per_class[k] for k in members if k in per_class]
        for name in ("PQ", "SQ", "RQ"):
            result[name + group] = sum(s[name] for s in there) / len(there) if there else float("nan")
    none = dict.fromkeys(("PQ", "SQ", "RQ"), float("nan"))
    result["per_class"] = {NAMES[k]: per_class.get(k, none) for k in range(CLASSES)}
    return {**result, "images": len(scenes)}


def scored(scenes, batch=4, **options):
    metric = PanopticQuality(**{"class_names": NAMES, "thing_ids": THINGS, **options})
    for start in range(0, len(scenes), batch):
        predictions, references = zip(*scenes[start : start + batch], strict=True)
        metric.add_batch(predictions=predictions, references=references)
    return metric


def check_equal(found, expected):
    """Results agree to rounding; NaN equals NaN."""
    per_class, expected_classes = found.pop("per_class"), expected.pop("per_class")
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert list(per_class) == list(expected_classes)
    for name, scores in per_class.items():
        assert scores == pytest.approx(expected_classes[name], abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("things", [THINGS, None, range(CLASSES), ()])
@pytest.mark.parametrize("seed", range(4))
def test_matches_the_definition(seed, things):
    scenes = [random_panoptic(100 * seed + i, crowds=seed % 2 == 1) for i in range(25)]
    result = scored(scenes, thing_ids=things).compute()
    assert 0.1 < result["PQ"] < 0.9
    check_equal(result, slow_panoptic_quality(scenes, things))


def test_real_segments_match_the_definition():
    """Panoptic maps of real images, every fourth pixel, against shifted copies."""
    file = DATA / "coco128" / "train.parquet"
    if not file.is_file():
        pytest.skip("coco128 is not in ../shared/data")
    import pyarrow.parquet
    from PIL import Image

    random, scenes = np.random.default_rng(0), []
    rows = pyarrow.parquet.read_table(file, columns=["image_id", "panoptic", "segments_info"]).slice(0, 40).to_pylist()
    for row in rows:
        if row["panoptic"] is None:
            continue
        pixels = np.asarray(Image.open(io.BytesIO(row["panoptic"]["bytes"])), np.int64) @ (1, 256, 65536)
        pixels = pixels[::4, ::4]
        info = [
            {"id": s["id"], "category_id": s["category_id"] % CLASSES, "iscrowd": s["iscrowd"]}
            for s in row["segments_info"]
        ]
        found = {
            "segmentation": np.roll(pixels, random.integers(-3, 4, 2), (0, 1)),
            "segments_info": [{"id": s["id"], "label_id": s["category_id"]} for s in info],
        }
        scenes.append((found, {"image_id": row["image_id"], "segmentation": pixels, "segments_info": info}))
    assert len(scenes) >= 20
    result = scored(scenes).compute()
    assert 0.3 < result["PQ"] < 0.95
    check_equal(result, slow_panoptic_quality(scenes, THINGS))


def one_row(found, labels, real, true_labels, crowd=()):
    """An image with one row of pixels."""
    return {
        "predictions": [
            {"segmentation": [found], "segments_info": [{"id": i, "label_id": k} for i, k in labels.items()]}
        ],
        "references": [
            {
                "image_id": 0,
                "segmentation": [real],
                "segments_info": [
                    {"id": i, "category_id": k, "iscrowd": int(i in crowd)} for i, k in true_labels.items()
                ],
            }
        ],
    }


def test_by_hand():
    """Thing 1 has IoU 3/4; thing 2 has 1/2, so it is missed and gives a false positive; the stuff is exact."""
    image = one_row(
        [1, 1, 1, 0, 2, 2, 0, 0, 9, 9], {1: 0, 2: 0, 9: 1}, [1, 1, 1, 1, 2, 2, 2, 2, 9, 9], {1: 0, 2: 0, 9: 1}
    )
    result = PanopticQuality(thing_ids=[0], class_names={0: "cat", 1: "sky", 2: "sea"}).compute(**image)
    assert result["per_class"]["cat"] == {"PQ": 0.75 / 2, "SQ": 0.75, "RQ": 1 / 2}
    assert result["per_class"]["sky"] == {"PQ": 1.0, "SQ": 1.0, "RQ": 1.0}
    assert np.isnan(list(result["per_class"]["sea"].values())).all()
    assert result["PQ"] == (0.375 + 1) / 2 and result["SQ"] == (0.75 + 1) / 2 and result["RQ"] == 0.75
    assert (result["PQ_th"], result["PQ_st"]) == (0.375, 1.0)
    assert "PQ_th" not in PanopticQuality().compute(**image)


def test_void_and_crowds_are_not_errors():
    truth = ([1, 1, 0, 0, 0, 3, 3, 3, 3, 3], {1: 0, 3: 0}, {3})
    # Of segment 7, two of three pixels are void; all of 8 is a crowd of its class; 1 includes a void pixel.
    image = one_row([1, 1, 1, 7, 7, 7, 8, 8, 0, 0], {1: 0, 7: 0, 8: 0}, *truth)
    assert PanopticQuality().compute(**image)["PQ"] == 1.0
    # A crowd of another class does not count, and neither do two pixels of four.
    for labels, classes in (({1: 0, 8: 1}, (1.0, 0.0)), ({1: 0, 7: 1}, (1.0, 0.0))):
        found = [1, 1, 0, 7, 7, 7, 7, 0, 0, 0] if 7 in labels else [1, 1, 0, 0, 0, 0, 8, 8, 0, 0]
        result = PanopticQuality().compute(**one_row(found, labels, *truth))
        assert tuple(scores["RQ"] for scores in result["per_class"].values()) == classes
    # An undetected crowd is not a false negative.
    assert PanopticQuality().compute(**one_row([1, 1] + [0] * 8, {1: 0}, *truth))["PQ"] == 1.0


def test_segments_of_a_stuff_class_are_merged():
    image = one_row([1, 1, 2, 2], {1: 0, 2: 0}, [5, 5, 5, 5], {5: 0})
    assert PanopticQuality(thing_ids=[]).compute(**image)["PQ"] == 1.0
    assert PanopticQuality(thing_ids=[0]).compute(**image)["PQ"] == 0.0


def test_image_processor_output_is_accepted():
    """Two queries of a stuff class, one of a thing; and an image without detections."""
    from transformers import DetrImageProcessor
    from transformers.models.detr.modeling_detr import DetrSegmentationOutput

    logits = torch.full((2, 3, 3), -9.0)
    logits[0, [0, 1, 2], [0, 1, 1]] = 9.0
    logits[1, :, 2] = 9.0
    masks = torch.full((2, 3, 4, 6), -9.0)
    for query, columns in enumerate((slice(0, 2), slice(2, 3), slice(3, 6))):
        masks[0, query, :, columns] = 9.0
    outputs = DetrSegmentationOutput(logits=logits, pred_masks=masks)
    truth = torch.tensor([3, 3, 8, 8, 8, 8]).repeat(4, 1)
    info = [{"id": 3, "category_id": 0}, {"id": 8, "category_id": 1}]
    references = [{"image_id": i, "segmentation": truth, "segments_info": info} for i in range(2)]
    processor, results = DetrImageProcessor(), []
    for fused in (set(), {1}):
        found = processor.post_process_panoptic_segmentation(
            outputs, label_ids_to_fuse=fused, target_sizes=[(4, 6)] * 2
        )
        assert [len(image["segments_info"]) for image in found] == [3, 0] and (found[1]["segmentation"] == -1).all()
        metric = PanopticQuality(thing_ids=[0], class_names=["a", "b"])
        results.append(metric.compute(predictions=found, references=references))
    assert results[0] == results[1]
    assert results[0]["SQ"] == 1.0 and results[0]["RQ"] == pytest.approx(1 / 1.5)


def test_result_does_not_depend_on_order_batches_or_processes():
    """Unequal shares, one of them empty, with repeated images: bit-equal to a single metric."""
    scenes = [random_panoptic(i) for i in range(17)]
    whole = scored(scenes).compute()
    assert repr(scored(scenes[::-1], batch=3).compute()) == repr(whole)
    shares = [scored(part) for part in (scenes[9:] + scenes[:2], [], scenes[:5], scenes[4:9])]
    states = [share.state() for share in shares]
    for share in shares:
        share.merge(load(save(state)) for state in states)
        assert repr(share.compute()) == repr(whole)


def test_state_size():
    prediction, reference = random_panoptic(1)
    metric = scored([(prediction, reference)])
    large = [{**r, "segmentation": np.kron(r["segmentation"], np.ones((9, 9), int))} for r in (prediction, reference)]
    kept, kept_large = metric.state(), scored([tuple(large)]).state()
    assert all((kept[name] == kept_large[name]).all() for name in kept)
    classes = {s["label_id"] for s in prediction["segments_info"]} | {
        s["category_id"] for s in reference["segments_info"]
    }
    assert sum(v.nbytes for k, v in kept.items() if k.startswith("classes.")) == 32 * len(classes)  # see the class


def test_repeated_image_counts_once_and_one_id_for_two_is_refused():
    scenes = [random_panoptic(i) for i in range(3)]
    assert repr(scored([*scenes, scenes[1]]).compute()) == repr(scored(scenes).compute())
    other = {**random_panoptic(9)[1], "image_id": 1}
    with pytest.raises(ValueError, match="image_id 1 belongs to two references with different objects"):
        scored([*scenes, (random_panoptic(9)[0], other)])


def test_loaded_by_path():
    scenes = [random_panoptic(i) for i in range(3)]
    loaded = evaluate.load(path("panoptic_quality"), class_names=NAMES, thing_ids=THINGS)
    for prediction, reference in scenes:
        loaded.add(prediction=prediction, reference=reference)
    assert repr(loaded.compute()) == repr(scored(scenes).compute())
