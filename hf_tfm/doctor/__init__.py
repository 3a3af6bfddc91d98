"""Checks before a run: what would make it fail, found in a minute on a CPU."""
