"""Configuration of DETR (Carion et al. 2020, arXiv:2005.12872)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .checks import fields_of_size, require_at_least, require_choice, require_common, require_multiple, require_share
from .travel import TravellingConfig

# "base" is the paper's. The others are ours, for small images and training from scratch: batch norm, nothing frozen,
# and in "tiny" a finer feature map. From scratch, the paper's weights of boxes or group norm leave classes unlearned
# for the first thousand steps.
EQUAL_WEIGHTS = {"bbox_cost": 1.0, "giou_cost": 1.0, "bbox_loss_coefficient": 1.0, "giou_loss_coefficient": 1.0}
SIZES = {
    "tiny": {
        "backbone": "test_resnet",  # timm's smallest
        "backbone_norm": "batch",
        "backbone_frozen_stages": 0,
        "dilation": True,
        "num_queries": 25,
        "d_model": 128,
        "encoder_layers": 2,
        "encoder_ffn_dim": 512,
        "decoder_layers": 3,
        "decoder_ffn_dim": 512,
        "norm_first": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        **EQUAL_WEIGHTS,
    },
    "small": {
        "backbone": "resnet18",
        "backbone_norm": "batch",
        "backbone_frozen_stages": 0,
        "num_queries": 100,
        "d_model": 192,
        "encoder_layers": 3,
        "encoder_ffn_dim": 768,
        "decoder_layers": 4,
        "decoder_ffn_dim": 768,
        **EQUAL_WEIGHTS,
    },
    "base": {},
}
NORMS = ("frozen", "batch", "group")
POSITIONS = ("sine", "learned")
LEAST_1 = (
    *("num_channels", "num_queries", "d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim"),
    *("decoder_ffn_dim", "encoder_attention_heads", "decoder_attention_heads"),
)
WEIGHTS = (
    "class_cost",
    "bbox_cost",
    "giou_cost",
    "bbox_loss_coefficient",
    "giou_loss_coefficient",
    "mask_loss_coefficient",
    "dice_loss_coefficient",
)


@strict
class TfmDetrConfig(TravellingConfig):
    """What defines a `TfmDetrForObjectDetection`. The defaults are the paper's DETR with a ResNet-50.

    Names are those of transformers' `DetrConfig`. Unlike there, dropout also works inside attention and feed-forward
    layers and auxiliary losses are on, as in the paper and the authors' code.

    Args:
        backbone: name of a timm model whose feature maps are read.
        backbone_norm: what its batch norms become: "frozen" (statistics and affine parameters fixed, for pretrained
            weights), "batch" (as they are, with the statistics of a micro-batch on its rank: a step then depends on
            how it is cut) or "group" (for training from scratch with few images a batch).
        backbone_norm_momentum: of the running statistics of "batch". Over many steps, less than torch's 0.1 is
            steadier: it matters less which batches came last; over a few hundred steps it lags behind the weights.
        backbone_frozen_stages: its stem and this many stages do not learn: 1 in the paper; 0 for random weights.
        dilation: the last stage keeps the size of the feature map (DC5).
        num_channels: of the images.
        num_queries: objects that can be found in an image.
        d_model: features a token, D; a multiple of 4 and of the numbers of heads.
        encoder_layers, decoder_layers: blocks.
        encoder_attention_heads, decoder_attention_heads: heads of every attention.
        encoder_ffn_dim, decoder_ffn_dim: width inside the feed-forward layers.
        activation_function: of the feed-forward layers.
        dropout: on every sublayer's output.
        attention_dropout: on attention probabilities.
        activation_dropout: inside the feed-forward layers.
        norm_first: pre-norm blocks instead of post-norm ones.
        layer_norm_eps: added to the variance in layer norms.
        position_embedding_type: "sine" (fixed) or "learned" positions of the feature map.
        init_xavier_std: gain of the Xavier initialisation.
        auxiliary_loss: every decoder layer's predictions are learned from, not the last one's alone.
        class_cost, bbox_cost, giou_cost: weights in the matching cost.
        bbox_loss_coefficient, giou_loss_coefficient, mask_loss_coefficient, dice_loss_coefficient: weights in the
            loss; that of the classes is 1.
        eos_coefficient: weight of queries without an object in the class loss.
        thing_ids: classes that are counted; the others are stuff, of which an image has one segment at most. Default,
            all are things.

    Raises:
        ValueError: a field has the wrong type or a value outside its range.
    """

    model_type = "tfm_detr"
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_detr.TfmDetrConfig",
        "AutoModel": "modeling_detr.TfmDetrModel",
        "AutoModelForObjectDetection": "modeling_detr.TfmDetrForObjectDetection",
        "AutoModelForUniversalSegmentation": "modeling_detr.TfmDetrForPanopticSegmentation",
        "AutoModelForImageSegmentation": "modeling_detr.TfmDetrForPanopticSegmentation",
    }
    attribute_map: ClassVar = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
        "intermediate_size": "encoder_ffn_dim",
        "hidden_act": "activation_function",
    }
    base_model_tp_plan: ClassVar = {
        f"{name}.{projection}": "rowwise" if projection in ("out_proj", "down_proj") else "colwise"
        for name, projections in {
            "encoder.layers.*.self_attn": ("q_proj", "k_proj", "v_proj", "out_proj"),
            "encoder.layers.*.feed_forward": ("up_proj", "down_proj"),
            "decoder.layers.*.self_attn": ("q_proj", "k_proj", "v_proj", "out_proj"),
            "decoder.layers.*.cross_attn": ("q_proj", "k_proj", "v_proj", "out_proj"),
            "decoder.layers.*.feed_forward": ("up_proj", "down_proj"),
        }.items()
        for projection in projections
    }
    base_model_fsdp_plan: ClassVar = {
        "encoder.layers.*": "free_full_weight",
        "decoder.layers.*": "free_full_weight",
    }
    attention_score: ClassVar = "dot_product"  # part of every DETR; the blocks ask for it

    backbone: str = "resnet50"
    backbone_norm: str = "frozen"
    backbone_norm_momentum: float = 0.1
    backbone_frozen_stages: int = 1
    dilation: bool = False
    num_channels: int = 3
    num_queries: int = 100
    d_model: int = 256
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    activation_function: str = "relu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    activation_dropout: float | int = 0.1
    norm_first: bool = False
    layer_norm_eps: float = 1e-5
    position_embedding_type: str = "sine"
    init_xavier_std: float | int = 1.0
    auxiliary_loss: bool = True
    class_cost: float | int = 1
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    bbox_loss_coefficient: float | int = 5
    giou_loss_coefficient: float | int = 2
    mask_loss_coefficient: float | int = 1
    dice_loss_coefficient: float | int = 1
    eos_coefficient: float = 0.1
    thing_ids: list[int] | None = None
    is_encoder_decoder: bool = True

    @classmethod
    def of_size(cls, size: str, **fields):
        """The configuration of a named size, "tiny" to "base", with ``fields`` changed.

        Raises:
            ValueError: the size is not known.
        """
        return cls(**{**fields_of_size(SIZES, size), **fields})

    def __post_init__(self, **kwargs):
        if (native := kwargs.pop("backbone_config", None)) is not None:
            self.backbone, self.dilation = timm_name(native), dilated(native) or self.dilation
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of transformers' and huggingface_hub's strict validation: relations between fields."""
        require_common(self)
        require_choice(self, "backbone_norm", NORMS)
        require_choice(self, "position_embedding_type", POSITIONS)
        require_choice(self, "activation_function", ACT2FN)
        require_at_least(self, LEAST_1)
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            require_multiple(self, "d_model", getattr(self, name), name)
        require_multiple(self, "d_model", 4, "positions in two directions")
        require_share(self, ("dropout", "attention_dropout", "activation_dropout"))
        require_at_least(self, (*WEIGHTS, "backbone_frozen_stages"), 0)
        if self.thing_ids is not None and not set(self.thing_ids) <= set(range(self.num_labels)):
            raise ValueError(
                f"thing_ids must be in [0, {self.num_labels}), the number of labels, got {self.thing_ids}"
            )
        for name in ("eos_coefficient", "backbone_norm_momentum"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if self.class_cost == self.bbox_cost == self.giou_cost == 0:
            raise ValueError("class_cost, bbox_cost and giou_cost must not all be 0: nothing would decide a match")


def timm_name(backbone: Any) -> str:
    """The timm model that the ``backbone_config`` of transformers' `DetrConfig` names.

    Raises:
        ValueError: it is of another library.
    """
    fields = backbone if isinstance(backbone, dict) else backbone.to_dict()
    if fields.get("model_type") != "timm_backbone":
        raise ValueError(f"backbone_config must be a timm_backbone, got {fields.get('model_type')}")
    return fields["backbone"]


def dilated(backbone: Any) -> bool:
    """Whether a ``backbone_config`` keeps the size of the last feature map."""
    fields = backbone if isinstance(backbone, dict) else backbone.to_dict()
    return fields.get("output_stride") == 16
