"""Visualisations of attention, detections, positions and reconstructions."""

from .attention import AttentionMaps, attention_maps, plot_alignment, plot_attention
from .detections import Detections, detect, plot_detections
from .image_maps import ImageMaps, image_attention_maps, plot_image_attention
from .images import NamedImage, read_image
from .positions import plot_positions, position_similarity
from .queries import QueryMaps, plot_queries, plot_query_slots, query_boxes, query_maps
from .reconstruction import Reconstruction, plot_reconstructions, reconstruct_images
from .rollout import attention_rollout
from .sequence_positions import plot_sequence_positions, sequence_similarity
from .text_attention import TextAttentionMaps, plot_beside, plot_text_attention, text_attention_maps

__all__ = [
    "AttentionMaps",
    "Detections",
    "ImageMaps",
    "NamedImage",
    "QueryMaps",
    "Reconstruction",
    "TextAttentionMaps",
    "attention_maps",
    "attention_rollout",
    "detect",
    "image_attention_maps",
    "plot_alignment",
    "plot_attention",
    "plot_beside",
    "plot_detections",
    "plot_image_attention",
    "plot_positions",
    "plot_queries",
    "plot_query_slots",
    "plot_reconstructions",
    "plot_sequence_positions",
    "plot_text_attention",
    "position_similarity",
    "query_boxes",
    "query_maps",
    "read_image",
    "reconstruct_images",
    "sequence_similarity",
    "text_attention_maps",
]
