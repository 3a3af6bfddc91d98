"""The models. Every file here may travel to the Hub beside the weights, so it imports only its siblings, torch and
transformers, in the form ``from .file import Name``."""

from .configuration_transformer import TfmTransformerConfig
from .modeling_transformer import TfmTransformerForConditionalGeneration, TfmTransformerModel

__all__ = ["TfmTransformerConfig", "TfmTransformerForConditionalGeneration", "TfmTransformerModel"]
