"""Families as added by another package: thin subclasses of transformers' classes, and a custom detector.

They follow only docs/add_a_family.md: `of_size`, ``auto_classes``, and the members that a head needs. Their forward
passes have none of the additional arguments of this package's language models.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)
from transformers.utils import ModelOutput

from hf_tfm.families import Family
from hf_tfm.models.set_loss import hungarian_match, normalizers, set_losses, total_loss

MODULE = __name__.rpartition(".")[2]


class Sized:
    """A configuration with a single size, "tiny"."""

    tiny: ClassVar[dict] = {}

    @classmethod
    def of_size(cls, size, **fields):
        if size != "tiny":
            raise ValueError(f"size must be tiny, got {size!r}")
        return cls(**{**cls.tiny, **fields})


class ToySwinConfig(Sized, SwinConfig):
    model_type = "toy_swin"
    auto_classes: ClassVar = {
        "AutoConfig": f"{MODULE}.ToySwinConfig",
        "AutoModelForImageClassification": f"{MODULE}.ToySwinForImageClassification",
    }
    tiny: ClassVar = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 4}


class ToySwinForImageClassification(SwinForImageClassification):
    config_class = ToySwinConfig


class ToyMAEConfig(Sized, ViTMAEConfig):
    model_type = "toy_mae"
    auto_classes: ClassVar = {
        "AutoConfig": f"{MODULE}.ToyMAEConfig",
        "AutoModelForPreTraining": f"{MODULE}.ToyMAEForPreTraining",
    }
    tiny: ClassVar = {
        **{
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "patch_size": 8,
        },
        **{"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
        "decoder_intermediate_size": 8,
    }


class ToyMAEForPreTraining(ViTMAEForPreTraining):
    config_class = ToyMAEConfig


TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


class ToyRobertaConfig(Sized, RobertaConfig):
    model_type = "toy_roberta"
    auto_classes: ClassVar = {
        "AutoConfig": f"{MODULE}.ToyRobertaConfig",
        "AutoModelForMaskedLM": f"{MODULE}.ToyRobertaForMaskedLM",
        "AutoModelForSequenceClassification": f"{MODULE}.ToyRobertaForSequenceClassification",
    }
    tiny: ClassVar = {**TEXT, "max_position_embeddings": 64}


class ToyRobertaForMaskedLM(RobertaForMaskedLM):
    config_class = ToyRobertaConfig


class ToyRobertaForSequenceClassification(RobertaForSequenceClassification):
    config_class = ToyRobertaConfig


class ToyGPT2Config(Sized, GPT2Config):
    model_type = "toy_gpt2"
    auto_classes: ClassVar = {
        "AutoConfig": f"{MODULE}.ToyGPT2Config",
        "AutoModelForCausalLM": f"{MODULE}.ToyGPT2LMHeadModel",
        "AutoModelForSequenceClassification": f"{MODULE}.ToyGPT2ForSequenceClassification",
    }
    tiny: ClassVar = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64}


class ToyGPT2LMHeadModel(GPT2LMHeadModel):
    config_class = ToyGPT2Config


class ToyGPT2ForSequenceClassification(GPT2ForSequenceClassification):
    config_class = ToyGPT2Config


class ToyBartConfig(Sized, BartConfig):
    model_type = "toy_bart"
    auto_classes: ClassVar = {
        "AutoConfig": f"{MODULE}.ToyBartConfig",
        "AutoModelForSeq2SeqLM": f"{MODULE}.ToyBartForConditionalGeneration",
    }
    tiny: ClassVar = {
        **{"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
        **{"decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 64},
        "forced_eos_token_id": None,
    }


class ToyBartForConditionalGeneration(BartForConditionalGeneration):
    config_class = ToyBartConfig


class ToyDetectorConfig(Sized, PreTrainedConfig):
    """A detector without a timm backbone: patches, and slots that attend to them."""

    model_type = "toy_detector"
    auto_classes: ClassVar = {
        "AutoConfig": f"{MODULE}.ToyDetectorConfig",
        "AutoModelForObjectDetection": f"{MODULE}.ToyForObjectDetection",
    }
    tiny: ClassVar = {"width": 8}

    width: int = 64
    num_queries: int = 12
    num_channels: int = 3
    eos_coefficient: float = 0.1
    class_cost: float = 1.0
    bbox_cost: float = 5.0
    giou_cost: float = 2.0
    bbox_loss_coefficient: float = 5.0
    giou_loss_coefficient: float = 2.0
    mask_loss_coefficient: float = 1.0
    dice_loss_coefficient: float = 1.0


class ToySlots(PreTrainedModel):
    config_class = ToyDetectorConfig
    base_model_prefix = "slots"
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.patches = nn.Conv2d(config.num_channels, config.width, 16, stride=16)
        self.table = nn.Embedding(config.num_queries, config.width)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        cells = self.patches(pixel_values).flatten(2).transpose(1, 2)  # (B, N, D)
        return self.table.weight + (self.table.weight @ cells.transpose(1, 2)).softmax(-1) @ cells  # (B, Q, D)


class ToyForObjectDetection(PreTrainedModel):
    config_class = ToyDetectorConfig
    base_model_prefix = "slots"
    main_input_name = "pixel_values"
    classifier_modules: ClassVar = ("scores",)
    query_modules: ClassVar = ("table",)
    head_modules: ClassVar = ("scores", "corners")
    image_processor_name: ClassVar = "ConditionalDetrImageProcessor"

    def __init__(self, config):
        super().__init__(config)
        self.slots = ToySlots(config)
        self.scores = nn.Sequential(nn.Tanh(), nn.Linear(config.width, config.num_labels))
        self.corners = nn.Linear(config.width, 4)
        self.post_init()

    def count_items(self, labels):
        counts = [len(label["class_labels"]) for label in labels]
        return normalizers(counts, self.config)

    def forward(self, pixel_values: Tensor, labels: list | None = None, return_dict: bool = True) -> ModelOutput:
        states = self.slots(pixel_values)
        logits, boxes = self.scores(states), self.corners(states).sigmoid()
        found = {}
        if labels is not None:
            shares = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1)[None]  # "no object" has no weights
            matching = hungarian_match(shares, boxes[None], labels, self.config)
            terms = set_losses(shares, boxes[None], matching, self.config)
            found = total_loss(terms, matching, self.config, None)
        return ModelOutput(**found, logits=logits, pred_boxes=boxes)


FAMILIES = [
    Family("toy_swin", ToySwinConfig, reads=("swin",)),
    Family("toy_mae", ToyMAEConfig),
    Family("toy_roberta", ToyRobertaConfig),
    Family("toy_gpt2", ToyGPT2Config),
    Family("toy_bart", ToyBartConfig),
    Family("toy_detector", ToyDetectorConfig),
]
