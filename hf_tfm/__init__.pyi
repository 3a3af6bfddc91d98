"""Generated from hf_tfm/families.py by `make stubs`."""

from .families import carry_code as carry_code
from .families import register as register
from .models.configuration_bert import TfmBertConfig as TfmBertConfig
from .models.configuration_detr import TfmDetrConfig as TfmDetrConfig
from .models.configuration_gpt import TfmGPTConfig as TfmGPTConfig
from .models.configuration_mae import TfmMAEConfig as TfmMAEConfig
from .models.configuration_swin import TfmSwinConfig as TfmSwinConfig
from .models.configuration_transformer import TfmTransformerConfig as TfmTransformerConfig
from .models.configuration_vit import TfmViTConfig as TfmViTConfig
from .models.modeling_bert import TfmBertForMaskedLM as TfmBertForMaskedLM
from .models.modeling_bert import TfmBertForMultipleChoice as TfmBertForMultipleChoice
from .models.modeling_bert import TfmBertForPreTraining as TfmBertForPreTraining
from .models.modeling_bert import TfmBertForQuestionAnswering as TfmBertForQuestionAnswering
from .models.modeling_bert import TfmBertForSequenceClassification as TfmBertForSequenceClassification
from .models.modeling_bert import TfmBertForTokenClassification as TfmBertForTokenClassification
from .models.modeling_bert import TfmBertModel as TfmBertModel
from .models.modeling_detr import TfmDetrForObjectDetection as TfmDetrForObjectDetection
from .models.modeling_detr import TfmDetrForPanopticSegmentation as TfmDetrForPanopticSegmentation
from .models.modeling_detr import TfmDetrModel as TfmDetrModel
from .models.modeling_gpt import TfmGPTForCausalLM as TfmGPTForCausalLM
from .models.modeling_gpt import TfmGPTForSequenceClassification as TfmGPTForSequenceClassification
from .models.modeling_gpt import TfmGPTModel as TfmGPTModel
from .models.modeling_mae import TfmMAEForPreTraining as TfmMAEForPreTraining
from .models.modeling_mae import TfmMAEModel as TfmMAEModel
from .models.modeling_swin import TfmSwinBackbone as TfmSwinBackbone
from .models.modeling_swin import TfmSwinForImageClassification as TfmSwinForImageClassification
from .models.modeling_swin import TfmSwinModel as TfmSwinModel
from .models.modeling_transformer import TfmTransformerForConditionalGeneration as TfmTransformerForConditionalGeneration
from .models.modeling_transformer import TfmTransformerModel as TfmTransformerModel
from .models.modeling_vit import TfmViTBackbone as TfmViTBackbone
from .models.modeling_vit import TfmViTForImageClassification as TfmViTForImageClassification
from .models.modeling_vit import TfmViTModel as TfmViTModel

__version__: str
