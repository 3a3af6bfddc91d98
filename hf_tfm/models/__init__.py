"""The models. Every file here may travel to the Hub beside the weights, so it imports only its siblings, torch,
transformers and timm; siblings in the form ``from .file import Name``."""

from .configuration_bert import TfmBertConfig
from .configuration_detr import TfmDetrConfig
from .configuration_gpt import TfmGPTConfig
from .configuration_mae import TfmMAEConfig
from .configuration_transformer import TfmTransformerConfig
from .configuration_vit import TfmViTConfig
from .modeling_bert import (
    TfmBertForMaskedLM,
    TfmBertForMultipleChoice,
    TfmBertForPreTraining,
    TfmBertForQuestionAnswering,
    TfmBertForSequenceClassification,
    TfmBertForTokenClassification,
    TfmBertModel,
)
from .modeling_detr import TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation, TfmDetrModel
from .modeling_gpt import TfmGPTForCausalLM, TfmGPTForSequenceClassification, TfmGPTModel
from .modeling_mae import TfmMAEForPreTraining, TfmMAEModel
from .modeling_transformer import TfmTransformerForConditionalGeneration, TfmTransformerModel
from .modeling_vit import TfmViTBackbone, TfmViTForImageClassification, TfmViTModel

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
]
