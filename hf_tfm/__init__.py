"""The classic Transformer family for the Hugging Face ecosystem.

Importing this package registers its configurations and models with transformers' Auto classes.
"""

from .models import TfmTransformerConfig, TfmTransformerForConditionalGeneration, TfmTransformerModel
from .registration import carry_code, register

__version__ = "0.1.0"
__all__ = [
    "TfmTransformerConfig",
    "TfmTransformerForConditionalGeneration",
    "TfmTransformerModel",
    "carry_code",
    "register",
]

register()
