"""chrF and chrF++, computed by sacrebleu: F-score of character n-grams up to 6 and, for chrF++, of word n-grams."""

from sacrebleu.metrics import CHRF

from hf_tfm.metrics.text import TextMetric


class Chrf(TextMetric):
    """Corpus chrF (Popovic 2015) or chrF++ (Popovic 2017) as computed by sacrebleu (Post 2018).

        Chrf(word_order=2).compute(predictions=["a b"], references=["a c"])

    The result holds ``chrf`` in percent and sacrebleu's ``signature``.

    Args:
        word_order: maximum word n-gram order; 0 is chrF, 2 is chrF++.
        lowercase: ignore case.
        kwargs: see `TextMetric`.

    Raises:
        ValueError: if ``word_order`` is negative or an option is unknown.
    """

    source = (
        "Popovic 2015, doi:10.18653/v1/W15-3049; Popovic 2017, doi:10.18653/v1/W17-4770; Post 2018, arXiv:1804.08771"
    )

    def __init__(self, *, word_order: int = 0, lowercase: bool = False, **kwargs):
        if word_order < 0:
            raise ValueError(f"word_order must be at least 0, got {word_order}")
        super().__init__(**kwargs)
        self.scorer = CHRF(word_order=word_order, lowercase=lowercase)

    def score(self, predictions: list[str], references: list[list[str]]) -> dict:
        """Score N predictions against R streams of N references."""
        result = self.scorer.corpus_score(predictions, references)
        return {"chrf": result.score, "signature": str(self.scorer.get_signature())}
