"""Top-1 and top-5 accuracy of image classification."""

from hf_tfm.metrics.classes import ClassMetric


class Accuracy(ClassMetric):
    """Top-1 accuracy, and top-5 accuracy if enough classes are predicted.

        Accuracy().compute(predictions=[[2, 0, 1, 3, 4], [1, 0, 2, 3, 5]], references=[2, 4])

    The result holds ``accuracy`` in [0, 1] and, if predictions list at least five classes, ``top5_accuracy``. Images
    with a negative label are unlabelled and are skipped.

    Args:
        kwargs: see `OfflineMetric`.

    Raises:
        ValueError: if an option is unknown.
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
