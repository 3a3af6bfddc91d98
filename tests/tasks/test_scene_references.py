"""References of scenes are unchanged by the transfer from a worker process."""

import numpy as np

from hf_tfm.data.batching import StepLoader
from hf_tfm.data.detection import scene_rows
from hf_tfm.data.digit_scenes import digit_scenes
from hf_tfm.data.pixels import PaddedPixels, scene_processor
from hf_tfm.data.shape_batches import ShapeSampler
from hf_tfm.tasks.scenes import SceneCollator


def test_worker_references_equal_those_of_the_main_process():
    """In images that keep their size, targets and references share their tensors."""
    rows, _ = scene_rows(digit_scenes(train=12, validation=0, test=0, size=64)["train"])
    collate = SceneCollator(PaddedPixels(scene_processor(64, 96)), range(10))

    def references(num_workers: int) -> list[dict]:
        loader = StepLoader(rows, ShapeSampler(np.full((12, 2), 64), 3), collate, num_workers=num_workers)
        return [one for step in loader.epoch(0) for batch in step for one in batch["references"]]

    own, theirs = references(0), references(2)
    assert len(own) == 12 and all(reference["area"].min() > 0 for reference in own)
    for mine, other in zip(own, theirs, strict=True):
        for name in ("image_id", "boxes", "labels", "area", "iscrowd"):
            np.testing.assert_array_equal(mine[name], other[name], err_msg=name)
