"""Accuracy: how often the label is the first class of a prediction, and how often among the first five."""

from hf_tfm.metrics.classes import ClassMetric


class Accuracy(ClassMetric):
    """Share of images whose label is predicted.

        Accuracy().compute(predictions=[[2, 0, 1, 3, 4], [1, 0, 2, 3, 5]], references=[2, 4])

    The result holds ``accuracy`` in [0, 1] and, where predictions name five classes or more, ``top5_accuracy``. Images
    whose label is negative have none and are left out.

    Args:
        kwargs: see `OfflineMetric`.

    Raises:
        ValueError: an option is unknown.
    """

    source = "Russakovsky et al. 2015, arXiv:1409.0575, section 4.1"

    def score(self, predictions: list[list[int]], references: list[list[int]]) -> dict:
        """Score N images with one label each."""
        if wrong := [i for i, labels in enumerate(references) if len(labels) != 1]:
            raise ValueError(f"references[{wrong[0]}] must be one label, got {references[wrong[0]]}")
        pairs = [(row, label) for row, (label,) in zip(predictions, references, strict=True) if label >= 0]
        if not pairs:
            raise ValueError("no image has a label")
        result = {"accuracy": sum(row[0] == label for row, label in pairs) / len(pairs)}
        if len(predictions[0]) >= 5:
            result["top5_accuracy"] = sum(label in row[:5] for row, label in pairs) / len(pairs)
        return result
