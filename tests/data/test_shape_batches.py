"""Steps of scenes of similar shape: little padding, every scene once, one canvas per step, any number of ranks."""

import itertools

import numpy as np
import pytest
from transformers.image_transforms import get_size_with_aspect_ratio

from hf_tfm.data.batching import SampleRef, StepLoader, key_of, rng, sample_ref
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.data.scenes import SceneAugmentation, chances, fitted, scaled
from hf_tfm.data.shape_batches import ShapeSampler, padding_share

PAPER = SceneAugmentation()


def coco_sizes(count=1000, seed=0):
    """Sizes similar to COCO's: 640 on the longer side, most 4:3 or 3:2, a quarter of them portrait."""
    random = np.random.default_rng(seed)
    short = random.choice([480, 426, 427, 425, 360, 500, 640], count, p=[0.35, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05])
    sizes = np.stack([short, np.full(count, 640)], axis=1)
    upright = random.random(count) < 0.25
    sizes[upright] = sizes[upright, ::-1]
    return sizes


def rows_of(step):
    return [sample_ref(sample).index for sample in step]


def canvas_of(step):
    (canvas,) = {sample_ref(sample).canvas for sample in step}
    return canvas


@pytest.mark.parametrize("batch_size", [2, 8, 16])
def test_padding_is_far_below_that_of_random_batches(batch_size):
    sizes = coco_sizes()
    ours = ShapeSampler(sizes, batch_size, PAPER, seed=1)
    random = BatchSampler(len(sizes), batch_size, seed=1)
    assert padding_share(ours.steps(0), sizes, PAPER, 1, 0) < 0.05
    assert padding_share(random.steps(0), sizes, PAPER, 1, 0) > {2: 0.15, 8: 0.35, 16: 0.4}[batch_size]


def test_padding_share_counts_pixels():
    """Two images, scaled separately and on a common canvas, by hand."""
    augmentation = SceneAugmentation(scales=(100,), max_size=400, crop=0.0)
    sizes = np.array([[50, 100], [100, 50]])
    assert padding_share([[0, 1]], sizes, augmentation, 0, 0) == pytest.approx(1 - 2 * 100 * 200 / (2 * 200 * 200))
    step = [SampleRef(row, canvas=(100, 200)) for row in (0, 1)]
    assert padding_share([step], sizes, augmentation, 0, 0) == pytest.approx(1 - (100 * 200 + 100 * 50) / 40_000)


def test_every_scene_is_used_once_in_steps_with_one_canvas():
    sizes = coco_sizes(103)
    sampler = ShapeSampler(sizes, 8, PAPER)
    for epoch in range(3):
        steps = sampler.steps(epoch)
        assert sorted(map(len, steps)) == [7] + [8] * 12
        assert sorted(itertools.chain(*map(rows_of, steps))) == list(range(103))
        shapes = PAPER.crops(sizes, chances(0, epoch, 0, 103))[:, 2:]
        for step in steps:
            canvas, own = canvas_of(step), shapes[rows_of(step)]
            assert any((scaled(own, scale, 1333).max(axis=0) == canvas).all() for scale in PAPER.scales)
            for size in own.tolist():
                height, width = fitted(tuple(size), canvas)
                assert (height == canvas[0] and width <= canvas[1]) or (width == canvas[1] and height <= canvas[0])
        assert len({canvas_of(step) for step in steps}) > 5


def test_shortest_side_is_the_scale_of_the_step():
    """Except in steps with both portrait and landscape scenes, where some can fill more of the canvas."""
    sizes = coco_sizes(800)
    shapes = PAPER.crops(sizes, chances(0, 0, 0, 800))[:, 2:]
    right, counts = 0, dict.fromkeys(PAPER.scales, 0)
    for step in ShapeSampler(sizes, 4, PAPER).steps(0):
        made = np.array([fitted(tuple(shapes[row].tolist()), canvas_of(step)) for row in rows_of(step)])
        scale = min(PAPER.scales, key=lambda s: abs(s - made.min()))
        right += (np.abs(made.min(axis=1) - scale) <= 1).sum()
        counts[scale] += len(made)
    assert right > 780
    assert min(counts.values()) > 30 and max(counts.values()) < 130  # 73 on average


def test_order_depends_only_on_seed_and_epoch():
    sizes = coco_sizes(50)
    first = ShapeSampler(sizes, 8, PAPER, seed=1)
    steps = first.steps(3)
    np.random.seed(7)
    first.steps(0)
    assert first.steps(3) == steps == ShapeSampler(sizes, 8, PAPER, seed=1).steps(3)
    assert steps not in (first.steps(4), ShapeSampler(sizes, 8, PAPER, seed=2).steps(3))


def test_incomplete_step_is_dropped_at_random():
    sizes = coco_sizes(30)
    gone = set()
    for epoch in range(40):
        steps = ShapeSampler(sizes, 8, PAPER, drop_last=True).steps(epoch)
        assert list(map(len, steps)) == [8] * 3
        gone |= set(range(30)) - set(itertools.chain(*map(rows_of, steps)))
    assert gone == set(range(30))


def test_evaluation_is_sorted_by_shape():
    sizes = np.array([[480, 640], [640, 480], [500, 640], [0, 0], [640, 500]])
    steps = ShapeSampler(sizes, 2).steps(0)
    assert steps == [[1, 4], [3, 2], [0]] == ShapeSampler(sizes, 2, seed=5).steps(1)


def test_ranks_and_micro_batches_only_split_steps():
    sizes, rows = coco_sizes(23), list(range(23))
    sampler = ShapeSampler(sizes, 6, PAPER)

    def collate(examples, indices, epoch, hidden):
        assert examples == [sample_ref(sample).index for sample in indices]
        return [] if hidden else indices

    whole = [step[0] for step in StepLoader(rows, sampler, collate).epoch(1)]
    assert whole == sampler.steps(1)
    for world_size in (2, 3):
        parts = [list(StepLoader(rows, sampler, collate, 2, rank, world_size).epoch(1)) for rank in range(world_size)]
        for number, expected in enumerate(whole):
            assert list(itertools.chain(*(batch for part in parts for batch in part[number]))) == expected


def test_sample_keys_are_distinct_and_stable():
    """Random draws and caches written by earlier versions depend on them."""
    assert key_of(7) == SampleRef(7).key == 7
    assert SampleRef(7, copy=2).key == 7 + 2 * 2**40
    assert SampleRef(2**40 - 1, canvas=(65535, 65535)).key == 2**40 * (65535 * 2**16 + 65535) + 2**40 - 1
    assert SampleRef(12345, canvas=(800, 1333)).key == 12345 + 2**40 * (800 * 2**16 + 1333)
    assert rng(3, SampleRef(7, 2)).random() == rng(3, 7 + 2 * 2**40).random() != rng(3, 7).random()


def test_sizes_match_transformers():
    random = np.random.default_rng(0)
    sizes = random.integers(20, 1500, (3000, 2))
    sizes[:50] = 800
    sizes[50:100, 0] = 800
    for shortest, longest in ((800, 1333), (480, 1333), (96, 128), (100, 100)):
        expected = [get_size_with_aspect_ratio(tuple(size), shortest, longest) for size in sizes.tolist()]
        np.testing.assert_array_equal(scaled(sizes, shortest, longest), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": np.zeros((0, 2))}, "there are no samples"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 11, "drop_last": True}, "batch_size must be at most the 10 samples with drop_last, got 11"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ShapeSampler(**{"sizes": coco_sizes(10), "batch_size": 4, "augmentation": PAPER, **options})
