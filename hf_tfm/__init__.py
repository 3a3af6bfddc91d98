"""The classic Transformer family for the Hugging Face ecosystem.

Importing this package registers its configurations and models with transformers' Auto classes.
"""

from .models import (
    TfmBertConfig,
    TfmBertForMaskedLM,
    TfmBertForMultipleChoice,
    TfmBertForPreTraining,
    TfmBertForQuestionAnswering,
    TfmBertForSequenceClassification,
    TfmBertForTokenClassification,
    TfmBertModel,
    TfmDetrConfig,
    TfmDetrForObjectDetection,
    TfmDetrForPanopticSegmentation,
    TfmDetrModel,
    TfmGPTConfig,
    TfmGPTForCausalLM,
    TfmGPTForSequenceClassification,
    TfmGPTModel,
    TfmMAEConfig,
    TfmMAEForPreTraining,
    TfmMAEModel,
    TfmTransformerConfig,
    TfmTransformerForConditionalGeneration,
    TfmTransformerModel,
    TfmViTBackbone,
    TfmViTConfig,
    TfmViTForImageClassification,
    TfmViTModel,
)
from .registration import carry_code, register

__version__ = "0.1.0"
__all__ = [
    "TfmBertConfig",
    "TfmBertForMaskedLM",
    "TfmBertForMultipleChoice",
    "TfmBertForPreTraining",
    "TfmBertForQuestionAnswering",
    "TfmBertForSequenceClassification",
    "TfmBertForTokenClassification",
    "TfmBertModel",
    "TfmDetrConfig",
    "TfmDetrForObjectDetection",
    "TfmDetrForPanopticSegmentation",
    "TfmDetrModel",
    "TfmGPTConfig",
    "TfmGPTForCausalLM",
    "TfmGPTForSequenceClassification",
    "TfmGPTModel",
    "TfmMAEConfig",
    "TfmMAEForPreTraining",
    "TfmMAEModel",
    "TfmTransformerConfig",
    "TfmTransformerForConditionalGeneration",
    "TfmTransformerModel",
    "TfmViTBackbone",
    "TfmViTConfig",
    "TfmViTForImageClassification",
    "TfmViTModel",
    "carry_code",
    "register",
]

register()
