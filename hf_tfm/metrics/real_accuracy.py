"""Accuracy on images with any number of right labels, as ImageNet-ReaL has them."""

from hf_tfm.metrics.classes import ClassMetric


class RealAccuracy(ClassMetric):
    """Share of images whose predicted class is one of their labels.

        RealAccuracy().compute(predictions=[3, 1, 4], references=[[3, 7], [2], []])

    The result holds ``real_accuracy`` in [0, 1] and ``images``, over how many it is: those without any label are left
    out, as by the labels' authors. Of ranked predictions the first class counts.

    Args:
        kwargs: see `OfflineMetric`.

    Raises:
        ValueError: an option is unknown.
    """

    source = "Beyer et al. 2020, arXiv:2006.07159, section 3"

    def score(self, predictions: list[list[int]], references: list[list[int]]) -> dict:
        """Score N images with their labels."""
        hits = [row[0] in labels for row, labels in zip(predictions, references, strict=True) if labels]
        if not hits:
            raise ValueError("no image has a label")
        return {"real_accuracy": sum(hits) / len(hits), "images": len(hits)}
