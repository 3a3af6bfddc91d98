"""Pictures of what a model does."""

from .attention import AttentionMaps, attention_maps, plot_alignment, plot_attention

__all__ = ["AttentionMaps", "attention_maps", "plot_alignment", "plot_attention"]
