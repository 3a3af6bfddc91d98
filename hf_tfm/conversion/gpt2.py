"""TfmGPT <-> transformers' GPT-2: the same architecture with other weight names and shapes.

Our classes read files of transformers' GPT-2, and ``save_original_format=True`` writes them (`native_names` in
modeling_gpt.py), so only the configuration is converted.
"""

from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model, PreTrainedModel

from ..models.configuration_gpt import NATIVE_FIELDS, TfmGPTConfig
from ..models.modeling_gpt import TfmGPTForCausalLM, TfmGPTForSequenceClassification, TfmGPTModel
from .conversion import Conversion, carried, refuse, require_fixed
from .vit import LABELS

STOCK = {
    TfmGPTModel: GPT2Model,
    TfmGPTForCausalLM: GPT2LMHeadModel,
    TfmGPTForSequenceClassification: GPT2ForSequenceClassification,
}
# {ours: theirs}
FIELDS = {
    **{ours: theirs for theirs, ours in NATIVE_FIELDS.items()},
    **{
        field: field
        for field in (
            "vocab_size",
            "initializer_range",
            "use_cache",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "tie_word_embeddings",
            *LABELS,
        )
    },
}
# Fields of theirs for which we support only one value.
THEIRS_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
# Fields that do not affect the outputs are carried along.
OURS_CARRIED = ("activation_dropout", "classifier_dropout")
THEIRS_CARRIED = (
    "reorder_and_upcast_attn",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
)


def to_gpt2(config: TfmGPTConfig) -> GPT2Config:
    """Convert our configuration to transformers'.

    Raises:
        ValueError: a field has a value that `GPT2Model` cannot express.
    """
    require_fixed("gpt2", config, {"norm_first": True})
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    fields |= carried(config, (*OURS_CARRIED, *THEIRS_CARRIED))
    fields["embd_pdrop"] = config.hidden_dropout_prob
    if config.intermediate_size == 4 * config.hidden_size:
        fields["n_inner"] = None  # as in the published files
    return GPT2Config(**fields)


def from_gpt2(model: PreTrainedModel) -> TfmGPTConfig:
    """Convert the configuration of transformers' ``model`` to ours.

    Raises:
        ValueError: a field has a value that `TfmGPTConfig` cannot express.
    """
    config, target = model.config, TfmGPTConfig.__name__
    require_fixed(target, config, THEIRS_FIXED)
    if config.embd_pdrop != config.resid_pdrop:
        refuse(target, "embd_pdrop", config.embd_pdrop, f"the value of resid_pdrop, {config.resid_pdrop}")
    fields = {ours: getattr(config, theirs) for ours, theirs in FIELDS.items()}
    fields |= carried(config, (*OURS_CARRIED, *THEIRS_CARRIED))
    return TfmGPTConfig(**fields)


GPT2 = tuple(
    Conversion(name="gpt2", ours=ours, theirs=theirs, to_theirs=to_gpt2, to_ours=from_gpt2)
    for ours, theirs in STOCK.items()
)
CONVERSIONS = GPT2
