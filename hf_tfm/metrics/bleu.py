"""BLEU, by sacrebleu: precision of word n-grams up to 4, times a penalty for short output."""

from sacrebleu.metrics import BLEU

from hf_tfm.metrics.text import TextMetric


class Bleu(TextMetric):
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it (Post 2018).

        Bleu(lowercase=True).compute(predictions=["a b"], references=[["a b", "a c"]])

    The result holds ``bleu`` and the four ``precisions`` in percent, the brevity penalty ``bp`` in (0, 1], ``sys_len``
    and ``ref_len`` in tokens, and sacrebleu's ``signature``, without which a score cannot be compared.

    Args:
        lowercase: compare without case.
        tokenize: a tokeniser of sacrebleu, "13a" being WMT's. Those for Japanese and Korean need sacrebleu's extras;
            "flores101", "flores200" and the like download a model when first used.
        kwargs: see `TextMetric`.

    Raises:
        ValueError: the tokeniser or an option is unknown.
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
