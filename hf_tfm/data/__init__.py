"""Data sets, tokenizers, and batches in an order that is a pure function of (seed, epoch, sample index)."""
