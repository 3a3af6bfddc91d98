"""Accuracy on images with any number of correct labels, as in ImageNet-ReaL."""

from hf_tfm.metrics.classes import ClassMetric


class RealAccuracy(ClassMetric):
    """Fraction of images whose predicted class is one of their labels.

        RealAccuracy().compute(predictions=[3, 1, 4], references=[[3, 7], [2], []])

    The result holds ``real_accuracy`` in [0, 1] and ``images``, the number of images scored: images without a label
    are skipped, as in the ReaL authors' code. Only the first of ranked predictions counts.

    Args:
        kwargs: see `OfflineMetric`.

    Raises:
        ValueError: if an option is unknown.
    """

    source = "Beyer et al. 2020, arXiv:2006.07159, section 3"

    def score(self, predictions: list[list[int]], references: list[list[int]]) -> dict:
        """Score N images with their labels."""
        hits = [row[0] in labels for row, labels in zip(predictions, references, strict=True) if labels]
        if not hits:
            raise ValueError("no image has a label")
        return {"real_accuracy": sum(hits) / len(hits), "images": len(hits)}
