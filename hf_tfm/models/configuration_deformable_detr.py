"""Configuration of Deformable DETR (Zhu et al. 2021, arXiv:2010.04159)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .checks import fields_of_size, require_at_least, require_choice, require_common, require_multiple, require_share
from .configuration_backbone import check_backbone, fields_without_dilation, resolve_backbone
from .configuration_detr import NORMS, POSITIONS
from .travel import TravellingConfig

# "base" is the paper's model with four levels, without refinement. The others are ours, for small images and training
# from scratch: box refinement, batch norm, nothing frozen.
SIZES = {
    "tiny": {
        "backbone": "test_resnet",  # the smallest in timm
        "backbone_norm": "batch",
        "backbone_frozen_stages": 0,
        "num_feature_levels": 2,
        "num_queries": 50,
        "with_box_refine": True,
        "d_model": 128,
        "encoder_layers": 3,
        "encoder_ffn_dim": 512,
        "decoder_layers": 3,
        "decoder_ffn_dim": 512,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    },
    "small": {
        "backbone": "resnet18",
        "backbone_norm": "batch",
        "backbone_frozen_stages": 0,
        "num_feature_levels": 3,
        "num_queries": 100,
        "with_box_refine": True,
        "d_model": 192,
        "encoder_layers": 3,
        "encoder_ffn_dim": 768,
        "decoder_layers": 4,
        "decoder_ffn_dim": 768,
    },
    "base": {},
}
BACKBONE_LEVELS = 3  # maximum number of levels that are feature maps of the backbone (C3 to C5 of a ResNet)
GROUPS = 32  # of the group norm of every level
LEAST_1 = (
    *("num_channels", "num_queries", "query_groups", "d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim"),
    *("decoder_ffn_dim", "encoder_attention_heads", "decoder_attention_heads"),
    *("num_feature_levels", "encoder_n_points", "decoder_n_points"),
)
WEIGHTS = (
    *("class_cost", "bbox_cost", "giou_cost"),
    *("class_loss_coefficient", "bbox_loss_coefficient", "giou_loss_coefficient"),
)


@strict
class TfmDeformableDetrConfig(TravellingConfig):
    """Configuration of a `TfmDeformableDetrForObjectDetection`. Defaults to the paper's model with a ResNet-50 and
    four levels.

    Field names are those of transformers' `DeformableDetrConfig`. Defaults that differ from it are those of the
    authors' code: dropout also inside attention and feed-forward layers, auxiliary losses, and a weight of 2 for the
    classes in cost and loss.

    Args:
        backbone: model that computes the feature maps: name of a timm model; or folder or Hub id of a timm model, or
            of a ViT, masked autoencoder, Swin or any other model with an AutoBackbone class. A folder is replaced by
            its configuration in ``backbone_config``, or by the name of the timm model; its weights are not loaded.
        backbone_kwargs: arguments of the timm model.
        backbone_config: configuration of a backbone that is no timm model, as a dict with its ``model_type``.
        backbone_norm: how to convert its batch norms, if it has any: "frozen" (fixed statistics and affine parameters,
            for pretrained weights), "batch" (unchanged; uses the statistics of the micro-batch on each rank, so a step
            depends on how it is split) or "group" (group norm, for training from scratch with few images per batch).
        backbone_norm_momentum: momentum of the running statistics with "batch".
        backbone_frozen_stages: number of frozen stages, in addition to the stem: 1 in the paper. 0 freezes nothing,
            for random weights. A block of a plain ViT is a stage, and its embeddings are the stem.
        dilation: dilate the last stage of a timm model instead of reducing its resolution (DC5).
        num_channels: number of image channels.
        num_feature_levels: number of feature maps that attention samples from: up to three are the last ones of the
            backbone, with strides 8, 16 and 32 for a ResNet; each further one is a convolution of stride 2 on top.
        num_queries: number of object queries; with ``two_stage`` the number of proposals that become queries.
        query_groups: number of sets of ``num_queries`` queries in training (Group DETR, Chen et al. 2023,
            arXiv:2207.13085). Each attends to itself alone and is matched to the objects on its own; the loss is the
            mean over the sets. After training only the first is used. Must be 1 with ``two_stage``.
        d_model: hidden size, D; a multiple of 32 and of the numbers of heads.
        encoder_layers, decoder_layers: number of blocks.
        encoder_attention_heads, decoder_attention_heads: number of attention heads.
        encoder_n_points, decoder_n_points: number of points that a head samples from each level, for each query.
        encoder_ffn_dim, decoder_ffn_dim: hidden size of the feed-forward layers.
        with_box_refine: each decoder layer refines the boxes of the previous one (section 4.2 and appendix A.4).
        two_stage: the encoder proposes boxes, and the best become the queries of the decoder (section 4.2 and
            appendix A.4); needs ``with_box_refine``.
        activation_function: activation of the feed-forward layers.
        dropout: dropout rate of every sublayer's output.
        attention_dropout: dropout rate of the probabilities in the decoder's self-attention.
        activation_dropout: dropout rate inside the feed-forward layers.
        layer_norm_eps: epsilon of the layer norms.
        position_embedding_type: position embedding of the feature maps: "sine" (fixed) or "learned".
        init_xavier_std: gain of the Xavier initialisation.
        auxiliary_loss: compute the loss on the predictions of every decoder layer, not only of the last.
        class_cost, bbox_cost, giou_cost: weights of the terms of the matching cost.
        class_loss_coefficient, bbox_loss_coefficient, giou_loss_coefficient: weights of the loss terms.
        focal_alpha, focal_gamma: weight of a positive in the focal loss, and its exponent (Lin et al. 2017,
            arXiv:1708.02002, equation 5).
        nms_threshold: if not None, `hf-tfm evaluate` and `hf-tfm show` drop the lower of two detections of a class
            whose overlap (IoU) is above it. The outputs of the model stay as they are. After a short training some
            objects are still found twice.

    Raises:
        ValueError: a field has the wrong type or is out of range.
    """

    model_type = "tfm_deformable_detr"
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_deformable_detr.TfmDeformableDetrConfig",
        "AutoModel": "modeling_deformable_detr.TfmDeformableDetrModel",
        "AutoModelForObjectDetection": "modeling_deformable_detr.TfmDeformableDetrForObjectDetection",
    }
    attribute_map: ClassVar = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
        "intermediate_size": "encoder_ffn_dim",
        "hidden_act": "activation_function",
    }
    base_model_tp_plan: ClassVar = {
        f"{name}.{projection}": "rowwise" if projection in ("out_proj", "output_proj", "down_proj") else "colwise"
        for name, projections in {
            "encoder.layers.*.self_attn": ("sampling_offsets", "attention_weights", "value_proj", "output_proj"),
            "encoder.layers.*.feed_forward": ("up_proj", "down_proj"),
            "decoder.layers.*.self_attn": ("q_proj", "k_proj", "v_proj", "out_proj"),
            "decoder.layers.*.cross_attn": ("sampling_offsets", "attention_weights", "value_proj", "output_proj"),
            "decoder.layers.*.feed_forward": ("up_proj", "down_proj"),
        }.items()
        for projection in projections
    }
    base_model_fsdp_plan: ClassVar = {
        "backbone": "free_full_weight",
        "encoder.layers.*": "free_full_weight",
        "decoder.layers.*": "free_full_weight",
    }
    # The same for every Deformable DETR; required by the blocks and the loss.
    attention_score: ClassVar = "dot_product"
    norm_first: ClassVar = False
    class_scoring: ClassVar = "sigmoid"
    finite_predictions: ClassVar = True

    backbone: str | None = "resnet50"
    backbone_kwargs: dict[str, Any] | None = None
    backbone_config: dict | PreTrainedConfig | None = None
    backbone_norm: str = "frozen"
    backbone_norm_momentum: float = 0.1
    backbone_frozen_stages: int = 1
    dilation: bool = False
    num_channels: int = 3
    num_feature_levels: int = 4
    num_queries: int = 300
    query_groups: int = 1
    d_model: int = 256
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_n_points: int = 4
    encoder_ffn_dim: int = 1024
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_n_points: int = 4
    decoder_ffn_dim: int = 1024
    with_box_refine: bool = False
    two_stage: bool = False
    activation_function: str = "relu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    activation_dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5
    position_embedding_type: str = "sine"
    init_xavier_std: float | int = 1.0
    auxiliary_loss: bool = True
    class_cost: float | int = 2
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    class_loss_coefficient: float | int = 2
    bbox_loss_coefficient: float | int = 5
    giou_loss_coefficient: float | int = 2
    focal_alpha: float = 0.25
    focal_gamma: float | int = 2.0
    nms_threshold: float | int | None = None
    is_encoder_decoder: bool = True

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> "TfmDeformableDetrConfig":
        """Return the configuration of a named size, "tiny" to "base", overridden by ``fields``.

        Raises:
            ValueError: the size is unknown.
        """
        return cls(**{**fields_without_dilation(fields_of_size(SIZES, size), fields), **fields})

    @property
    def output_stride(self) -> int | None:
        """Stride of the last feature map of the backbone in pixels; None for its own."""
        return 16 if self.dilation else None

    def __post_init__(self, **kwargs):
        resolve_backbone(self)
        proposals = kwargs.pop("two_stage_num_proposals", None)  # in transformers a field of its own
        if self.two_stage and proposals is not None:
            self.num_queries = proposals
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Validate relations between fields; called by the strict validation of transformers and huggingface_hub."""
        require_common(self)
        check_backbone(self)
        require_choice(self, "backbone_norm", NORMS)
        require_choice(self, "position_embedding_type", POSITIONS)
        require_choice(self, "activation_function", ACT2FN)
        require_at_least(self, LEAST_1)
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            require_multiple(self, "d_model", getattr(self, name), name)
        require_multiple(self, "d_model", GROUPS, "the group norm of the feature maps")
        require_share(self, ("dropout", "attention_dropout", "activation_dropout"))
        require_at_least(self, (*WEIGHTS, "backbone_frozen_stages", "focal_gamma"), 0)
        for name in ("focal_alpha", "backbone_norm_momentum", "nms_threshold"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"{name} must be in (0, 1], got {value}")
        if self.two_stage and not self.with_box_refine:
            raise ValueError("two_stage needs with_box_refine=True, got False")
        if self.two_stage and self.query_groups > 1:
            raise ValueError(f"query_groups must be 1 with two_stage, got {self.query_groups}")
        if self.class_cost == self.bbox_cost == self.giou_cost == 0:
            raise ValueError(
                "class_cost, bbox_cost and giou_cost must not all be 0: predictions could not be matched to objects"
            )
