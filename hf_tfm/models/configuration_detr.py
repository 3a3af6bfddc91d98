"""Configuration of DETR (Carion et al. 2020, arXiv:2005.12872)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .checks import fields_of_size, require_at_least, require_choice, require_common, require_multiple, require_share
from .configuration_backbone import check_backbone, fields_without_dilation, resolve_backbone
from .travel import TravellingConfig

# "base" is the paper's. The others are ours, for small images and training from scratch: batch norm, nothing frozen
# and, in "tiny", a higher-resolution feature map. From scratch, with the paper's box loss weights or with group norm,
# classification does not improve for the first thousand steps.
EQUAL_WEIGHTS = {"bbox_cost": 1.0, "giou_cost": 1.0, "bbox_loss_coefficient": 1.0, "giou_loss_coefficient": 1.0}
SIZES = {
    "tiny": {
        "backbone": "test_resnet",  # the smallest in timm
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
    """Configuration of a `TfmDetrForObjectDetection`. Defaults to the paper's DETR with a ResNet-50.

    Field names are those of transformers' `DetrConfig`. Unlike there, dropout is also applied inside attention and
    feed-forward layers, and auxiliary losses are on by default, as in the paper and the authors' code.

    Args:
        backbone: model that computes the feature maps: name of a timm model; or folder or Hub id of a timm model, or
            of a ViT, masked autoencoder, Swin or any other model with an AutoBackbone class. A folder is replaced by
            its configuration in ``backbone_config``, or by the name of the timm model; its weights are not loaded.
        backbone_kwargs: arguments of the timm model.
        backbone_config: configuration of a backbone that is no timm model, as a dict with its ``model_type``.
        backbone_norm: how to convert its batch norms, if it has any: "frozen" (fixed statistics and affine parameters,
            for pretrained weights), "batch" (unchanged; uses the statistics of the micro-batch on each rank, so a step
            depends on how it is split) or "group" (group norm, for training from scratch with few images per batch).
        backbone_norm_momentum: momentum of the running statistics with "batch". Over many steps a value below torch's
            0.1 is more stable, since the last batches matter less; over a few hundred steps it lags behind
            the weights.
        backbone_frozen_stages: number of frozen stages, in addition to the stem: 1 in the paper. 0 freezes nothing,
            for random weights. A block of a plain ViT is a stage, and its embeddings are the stem.
        dilation: dilate the last stage of a timm model instead of reducing its resolution (DC5).
        backbone_output_stride: stride of the last feature map of a timm model, 8 or 16 pixels, by dilating as many
            stages as that takes; default, that of the backbone, or half of it with ``dilation``.
        num_channels: number of image channels.
        num_queries: number of object queries, the maximum number of objects detected in an image.
        d_model: hidden size, D; a multiple of 4 and of the numbers of heads.
        encoder_layers, decoder_layers: number of blocks.
        encoder_attention_heads, decoder_attention_heads: number of attention heads.
        encoder_attention: self-attention of the encoder: "full" (exact) or a method, see `encoder_attention.METHODS`.
        encoder_attention_kwargs: options of ``encoder_attention``, for instance {"rounds": 32, "width": 8.0}.
        encoder_ffn_dim, decoder_ffn_dim: hidden size of the feed-forward layers.
        activation_function: activation of the feed-forward layers.
        dropout: dropout rate of every sublayer's output.
        attention_dropout: dropout rate of the attention probabilities.
        activation_dropout: dropout rate inside the feed-forward layers.
        norm_first: use pre-norm instead of post-norm blocks.
        layer_norm_eps: epsilon of the layer norms.
        position_embedding_type: position embedding of the feature map: "sine" (fixed) or "learned".
        init_xavier_std: gain of the Xavier initialisation.
        auxiliary_loss: compute the loss on the predictions of every decoder layer, not only of the last.
        class_cost, bbox_cost, giou_cost: weights of the terms of the matching cost.
        bbox_loss_coefficient, giou_loss_coefficient, mask_loss_coefficient, dice_loss_coefficient: weights of the loss
            terms; the weight of the classification loss is 1.
        eos_coefficient: weight of queries without an object in the classification loss.
        thing_ids: ids of the classes with countable instances; the others are stuff, with at most one segment per
            image. By default all classes are things.
        nms_threshold: if not None, `hf-tfm evaluate` and `hf-tfm show` drop the lower of two detections of a class
            whose overlap (IoU) is above it. The outputs of the model stay as they are. After a short training some
            objects are still found twice.

    Raises:
        ValueError: a field has the wrong type or is out of range.
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
        "backbone": "free_full_weight",
        "encoder.layers.*": "free_full_weight",
        "decoder.layers.*": "free_full_weight",
    }
    # The same for every DETR; required by the blocks and the loss.
    attention_score: ClassVar = "dot_product"
    class_scoring: ClassVar = "softmax"

    backbone: str | None = "resnet50"
    backbone_kwargs: dict[str, Any] | None = None
    backbone_config: dict | PreTrainedConfig | None = None
    backbone_norm: str = "frozen"
    backbone_norm_momentum: float = 0.1
    backbone_frozen_stages: int = 1
    dilation: bool = False
    backbone_output_stride: int | None = None
    num_channels: int = 3
    num_queries: int = 100
    d_model: int = 256
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_attention: str = "full"
    encoder_attention_kwargs: dict[str, int | float | bool | str | None] | None = None
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
    nms_threshold: float | int | None = None
    thing_ids: list[int] | None = None
    is_encoder_decoder: bool = True

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> "TfmDetrConfig":
        """Return the configuration of a named size, "tiny" to "base", overridden by ``fields``.

        Raises:
            ValueError: the size is unknown.
        """
        return cls(**{**fields_without_dilation(fields_of_size(SIZES, size), fields), **fields})

    @property
    def output_stride(self) -> int | None:
        """Stride of the last feature map in pixels; None for that of the backbone."""
        return self.backbone_output_stride or (16 if self.dilation else None)

    def __post_init__(self, **kwargs):
        resolve_backbone(self)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Validate relations between fields; called by the strict validation of transformers and huggingface_hub."""
        require_common(self)
        check_backbone(self)
        require_choice(self, "backbone_norm", NORMS)
        require_choice(self, "position_embedding_type", POSITIONS)
        require_choice(self, "activation_function", ACT2FN)
        if self.backbone_output_stride not in (None, 8, 16):
            raise ValueError(f"backbone_output_stride must be 8, 16 or null, got {self.backbone_output_stride}")
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
        for name in ("eos_coefficient", "backbone_norm_momentum", "nms_threshold"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"{name} must be in (0, 1], got {value}")
        if self.class_cost == self.bbox_cost == self.giou_cost == 0:
            raise ValueError(
                "class_cost, bbox_cost and giou_cost must not all be 0: predictions could not be matched to objects"
            )
