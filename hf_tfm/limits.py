"""Limits of options: larger values are mistakes, refused before they exhaust memory or run forever."""

SEEDS = 2**32  # limit of numpy
LARGEST_VOCABULARY = 1_000_000  # the largest published one has 901,629 tokens (XLM-V)
LONGEST = 1_000_000  # tokens per text
MOST_BEAMS = 1024
LARGEST_BATCH = 10_000_000  # samples
LARGEST_SIDE = 16_384  # pixels of an image
MOST_FRAMES = 10_000  # of a video
MOST_BLOCKS = 10_000  # layers of a model

# Bounds of the options of hf-tfm show: (minimum, maximum).
LIMITS = {"mask_ratio": (0, 1), "threshold": (0, 1), "queries": (0, None), "length": (2, 1024)}
