"""Code that test_metric_ranks.py runs on every rank: `main`."""

from accelerate import Accelerator
from accelerate.utils import gather_object
from detection_scenes import random_scene
from test_panoptic_quality import THINGS, random_panoptic

from hf_tfm.metrics import CocoAP, PanopticQuality

METRICS = {
    "boxes": (CocoAP, {}, random_scene),
    "masks": (CocoAP, {"iou_type": "segm"}, lambda seed: random_scene(seed, masks=True, objects=4, count=9)),
    "panoptic": (PanopticQuality, {"thing_ids": THINGS}, random_panoptic),
}
# name -> image indices of process 0 and of process 1
SHARES = {
    "uneven": ([0, 1, 2, 3, 4, 5, 6], [7, 8]),
    "none": ([0, 1, 2, 3, 4, 5, 6, 7, 8], []),
    "repeated": ([0, 2, 4, 6, 8], [1, 3, 5, 7, 0]),  # padded, as by a distributed sampler
}


def score(name, seeds, merge=None):
    """Value of one metric over some images; ``merge`` gathers the state of all processes."""
    kind, options, scene = METRICS[name]
    metric = kind(**options)
    for seed in seeds:
        prediction, reference = scene(seed)
        metric.add(prediction=prediction, reference=reference)
    if merge is not None:
        metric.merge(merge(metric.state()))
    return repr(metric.compute())


def main(folder):
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    rank = accelerator.process_index
    for share, seeds in SHARES.items():
        for name in METRICS:
            result = score(name, seeds[rank], lambda state: gather_object([state]))
            (folder / f"{name}-{share}-{rank}.txt").write_text(result)
    accelerator.end_training()
