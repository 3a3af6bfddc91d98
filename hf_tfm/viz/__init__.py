"""Pictures of what a model does."""

from .attention import AttentionMaps, attention_maps, plot_alignment, plot_attention
from .image_maps import ImageMaps, image_attention_maps, plot_image_attention
from .images import NamedImage, read_image
from .positions import plot_positions, position_similarity
from .reconstruction import Reconstruction, plot_reconstructions, reconstruct_images
from .rollout import attention_rollout

__all__ = [
    "AttentionMaps",
    "ImageMaps",
    "NamedImage",
    "Reconstruction",
    "attention_maps",
    "attention_rollout",
    "image_attention_maps",
    "plot_alignment",
    "plot_attention",
    "plot_image_attention",
    "plot_positions",
    "plot_reconstructions",
    "position_similarity",
    "read_image",
    "reconstruct_images",
]
