"""BLEU, computed by sacrebleu: word n-gram precision up to 4, times a brevity penalty."""

from sacrebleu.metrics import BLEU

from hf_tfm.metrics.text import TextMetric


class Bleu(TextMetric):
    """Corpus BLEU (Papineni et al. 2002) as computed by sacrebleu (Post 2018).

        Bleu(lowercase=True).compute(predictions=["a b"], references=[["a b", "a c"]])

    The result holds ``bleu`` and the four ``precisions`` in percent, the brevity penalty ``bp`` in (0, 1], ``sys_len``
    and ``ref_len`` in tokens, and sacrebleu's ``signature``, which is needed to compare scores.

    Args:
        lowercase: ignore case.
        tokenize: a sacrebleu tokenizer; "13a" is WMT's. Japanese and Korean need sacrebleu's extras; "flores101",
            "flores200" and similar ones download a model on first use.
        kwargs: see `TextMetric`.

    Raises:
        ValueError: if the tokenizer or an option is unknown.
    """

    source = "Papineni et al. 2002, doi:10.3115/1073083.1073135; Post 2018, arXiv:1804.08771"

    def __init__(self, *, lowercase: bool = False, tokenize: str = "13a", **kwargs):
        if tokenize not in BLEU.TOKENIZERS:
            raise ValueError(f'tokenize must be one of {", ".join(BLEU.TOKENIZERS)}, got "{tokenize}"')
        super().__init__(**kwargs)
        self.scorer = BLEU(lowercase=lowercase, tokenize=tokenize)

    def score(self, predictions: list[str], references: list[list[str]]) -> dict:
        """Score N predictions against R streams of N references."""
        result = self.scorer.corpus_score(predictions, references)
        return {
            "bleu": result.score,
            "precisions": result.precisions,
            "bp": result.bp,
            "sys_len": result.sys_len,
            "ref_len": result.ref_len,
            "signature": str(self.scorer.get_signature()),
        }
