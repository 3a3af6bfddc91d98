"""Exact match: the fraction of predictions that equal a reference."""

from hf_tfm.metrics.text import TextMetric


class ExactMatch(TextMetric):
    """Fraction of predictions that equal one of their references.

        ExactMatch().compute(predictions=["a b", "c"], references=["a b", "d"])

    The result holds ``exact_match`` in [0, 1]. Leading and trailing whitespace is ignored, as in BLEU.

    Args:
        lowercase: ignore case.
        kwargs: see `TextMetric`.

    Raises:
        ValueError: if an option is unknown.
    """

    source = "Rajpurkar et al. 2016, arXiv:1606.05250 (there after articles and punctuation are removed)"

    def __init__(self, *, lowercase: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.lowercase = lowercase

    def score(self, predictions: list[str], references: list[list[str]]) -> dict:
        """Score N predictions against R streams of N references."""
        predictions = [self.normalise(text) for text in predictions]
        references = [[self.normalise(text) for text in stream] for stream in references]
        hits = sum(prediction in texts for prediction, *texts in zip(predictions, *references, strict=True))
        return {"exact_match": hits / len(predictions)}

    def normalise(self, text: str) -> str:
        """Return the part of a sentence that is compared."""
        return text.strip().lower() if self.lowercase else text.strip()
