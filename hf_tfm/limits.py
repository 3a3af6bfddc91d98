"""Limits of options: values beyond them are mistakes, refused before they fill the memory or run for ever."""

SEEDS = 2**32  # numpy takes no larger ones
LARGEST_VOCABULARY = 1_000_000  # the largest published one has 901,629 tokens (XLM-V)
LONGEST = 1_000_000  # tokens of a text
MOST_BEAMS = 1024
LARGEST_BATCH = 10_000_000  # samples
LARGEST_SIDE = 16_384  # pixels of an image
MOST_BLOCKS = 10_000  # layers of a model

# Least and largest values of options that evaluation and pictures share, beside those of `evaluation.results`.
LIMITS = {
    "length_penalty": (-100, 100),
    "mlm_probability": (0, 1),
    "mask_ratio": (0, 1),
    "threshold": (0, 1),
    "queries": (0, None),
}
