"""A tiny model and eight samples for every head with a loss; samples have different lengths, as in a data set."""

from dataclasses import dataclass
from typing import Any

import torch
from every_class import CLASSES, class_of, inputs_of, labels_of
from torch import Tensor
from transformers import PreTrainedModel

import hf_tfm
from hf_tfm.tasks.model_fields import dropout_fields

BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT = {**BERT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VIT = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
SEQ2SEQ = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "dropout": 0.0,
}
DETR = {
    "backbone": "test_resnet",
    "num_queries": 5,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_labels": 3,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
ROWS = 8
CONTINUOUS = {"problem_type": "regression", "num_labels": 1}
MANY = {"problem_type": "multi_label_classification", "num_labels": 4}
SOFT = {"problem_type": "single_label_classification", "num_labels": 3}


@dataclass
class Case:
    """A model class, its configuration, and the columns of the samples; columns that are lists are not stacked."""

    model_class: type[PreTrainedModel]
    fields: dict[str, Any]
    columns: dict[str, Any]
    targets: tuple[str, ...] = ("labels",)

    def model(self) -> PreTrainedModel:
        torch.manual_seed(1)
        return self.model_class(self.model_class.config_class(**self.fields))

    def rows(self) -> list[dict[str, Any]]:
        return [{name: values[i] for name, values in self.columns.items()} for i in range(ROWS)]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: torch.stack(values) if isinstance(values[0], Tensor) else values for name, values in columns.items()}


def scenes(masks: bool) -> dict[str, Any]:
    """Images with 0 to 3 objects."""
    generator = torch.Generator().manual_seed(3)
    labels = []
    for i in range(ROWS):
        n = i % 4
        label = {"class_labels": torch.arange(n) % 3, "boxes": 0.2 + 0.4 * torch.rand(n, 4, generator=generator)}
        labels.append(label | ({"masks": (torch.rand(n, 64, 64, generator=generator) > 0.5).float()} if masks else {}))
    return {"pixel_values": torch.rand(ROWS, 3, 64, 64, generator=generator), "labels": labels}


def make_cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (ROWS, 8), generator=generator)
    chance = torch.rand(ROWS, 8, generator=generator)
    tokens = ids.masked_fill(chance > torch.linspace(0.2, 0.8, ROWS)[:, None], -100)
    tokens[:, 3] = ids[:, 3]
    text = {"input_ids": ids}
    images = {"pixel_values": torch.rand(ROWS, 3, 8, 8, generator=generator)}
    classes = torch.arange(ROWS) % 3
    classes[2] = -100
    numbers, shares = torch.rand(ROWS, generator=generator), torch.rand(ROWS, 3, generator=generator).softmax(-1)
    many = (torch.rand(ROWS, 4, generator=generator) > 0.5).float()
    many[5, 1:] = -100
    starts, ends = torch.arange(ROWS) % 5, torch.arange(ROWS) % 3 + 3
    starts[6] = ends[6] = 8  # truncated
    pairs = {"next_sentence_label": torch.arange(ROWS) % 2}
    spans = ("start_positions", "end_positions")
    noise = {"noise": torch.rand(ROWS, 4, generator=generator)}
    panoptic = {**DETR, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
    return {
        "masked": Case(hf_tfm.TfmBertForMaskedLM, BERT, {**text, "labels": tokens}),
        "pretraining": Case(
            hf_tfm.TfmBertForPreTraining,
            BERT,
            {**text, "labels": tokens, **pairs},
            ("labels", "next_sentence_label"),
        ),
        "classes": Case(
            hf_tfm.TfmBertForSequenceClassification, {**BERT, "num_labels": 3}, {**text, "labels": classes}
        ),
        "regression": Case(
            hf_tfm.TfmBertForSequenceClassification, {**BERT, **CONTINUOUS}, {**text, "labels": numbers}
        ),
        "multi-label": Case(hf_tfm.TfmBertForSequenceClassification, {**BERT, **MANY}, {**text, "labels": many}),
        "tagger": Case(
            hf_tfm.TfmBertForTokenClassification,
            {**BERT, "num_labels": 3},
            {**text, "labels": (tokens % 3).where(tokens != -100, -100)},
        ),
        "chooser": Case(
            hf_tfm.TfmBertForMultipleChoice,
            BERT,
            {"input_ids": torch.stack([ids, ids.flip(1)], dim=1), "labels": torch.arange(ROWS) % 2},
        ),
        "reader": Case(
            hf_tfm.TfmBertForQuestionAnswering,
            BERT,
            {**text, "start_positions": starts, "end_positions": ends},
            spans,
        ),
        "causal": Case(hf_tfm.TfmGPTForCausalLM, GPT, {**text, "labels": tokens}),
        "gpt classes": Case(
            hf_tfm.TfmGPTForSequenceClassification, {**GPT, "num_labels": 3}, {**text, "labels": classes}
        ),
        "gpt regression": Case(
            hf_tfm.TfmGPTForSequenceClassification, {**GPT, **CONTINUOUS}, {**text, "labels": numbers}
        ),
        "vit": Case(hf_tfm.TfmViTForImageClassification, {**VIT, "num_labels": 3}, {**images, "labels": classes}),
        "distilled vit": Case(
            hf_tfm.TfmViTForImageClassification,
            {**VIT, "num_labels": 3, "distillation_token": True},
            {**images, "labels": classes},
        ),
        "soft labels": Case(hf_tfm.TfmViTForImageClassification, {**VIT, **SOFT}, {**images, "labels": shares}),
        "vit multi-label": Case(hf_tfm.TfmViTForImageClassification, {**VIT, **MANY}, {**images, "labels": many}),
        "autoencoder": Case(hf_tfm.TfmMAEForPreTraining, {**VIT, **DECODER}, {**images, **noise}, ()),
        "seq2seq": Case(hf_tfm.TfmTransformerForConditionalGeneration, SEQ2SEQ, {**text, "labels": tokens}),
        "detection": Case(hf_tfm.TfmDetrForObjectDetection, DETR, scenes(masks=False)),
        "panoptic": Case(hf_tfm.TfmDetrForPanopticSegmentation, panoptic, scenes(masks=True)),
    }


def more_cases(tested: set[type[PreTrainedModel]]) -> dict[str, Case]:
    """A case without dropout for every other class with a head in `every_class`, except multiple choice."""
    found = {}
    for name, (_, fields) in CLASSES.items():
        kind = class_of(name)
        has_head = kind._auto_class.startswith("AutoModelFor") and not kind.__name__.endswith("MultipleChoice")
        if has_head and kind not in tested:
            inputs = inputs_of(name, rows=ROWS)
            labels = labels_of(kind._auto_class, inputs)
            plain = dict.fromkeys(dropout_fields(kind.config_class), 0.0)
            found[name] = Case(kind, {**fields, **plain}, {**inputs, **labels}, tuple(labels))
    return found


CASES = make_cases()
CASES |= more_cases({case.model_class for case in CASES.values()})
# Cases whose labels are lists of dictionaries.
LISTS = tuple(name for name, case in CASES.items() if isinstance(case.columns.get("labels"), list))
