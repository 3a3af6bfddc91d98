"""Fixtures of the evaluation tests."""

from evaluation_helpers import data, fresh_accelerator, models

__all__ = ["data", "fresh_accelerator", "models"]
