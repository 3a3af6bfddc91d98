"""Data sets, tokenizers, and batches whose order is a pure function of (seed, epoch, sample index)."""
