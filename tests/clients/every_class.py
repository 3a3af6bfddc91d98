"""A tiny random model of every class of every family, with inputs, for tests with other libraries.

A new family needs one entry in `FIELDS`; all of its classes are then in `CLASSES`.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_tfm
from hf_tfm import families

TEXT = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
    "num_labels": 3,
    "pad_token_id": 0,
}
GPT = {**TEXT, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "max_position_embeddings": 24,
}
RNN = {
    "vocab_size": 48,
    "embedding_size": 16,
    "encoder_hidden_size": 8,
    "hidden_size": 16,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
}
LONG = {**TEXT, "position_embedding_type": "learned"}
IMAGE = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
CLASSIFIER = {**IMAGE, "num_labels": 3}
MAE = {
    **IMAGE,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 3,  # divides neither of the stages, of 8 x 8 and 4 x 4 tokens
    "num_labels": 3,
}
DETR = {
    "backbone": "test_resnet",  # timm test model: four stages, 0.4 M parameters
    "num_queries": 5,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_labels": 3,
}
DEFORMABLE_DETR = {**DETR, "num_feature_levels": 2, "encoder_n_points": 2, "decoder_n_points": 2}
FASTER_RCNN = {
    "backbone": "test_resnet",
    "d_model": 16,
    "representation_size": 32,
    "anchor_size": 8,
    "num_proposals": 50,
    "num_labels": 3,
}
FRAMES = {"image_size": 16, "num_channels": 1, "context_length": 3, "prediction_length": 2}
CONVLSTM = {**FRAMES, "patch_size": 4, "hidden_size": [8, 6], "num_hidden_layers": 2, "kernel_size": 3}
VIDEO = {**FRAMES, **{name: value for name, value in IMAGE.items() if name != "image_size"}}
DETECTORS = ("AutoModelForObjectDetection", "AutoModelForUniversalSegmentation", "AutoModelForImageSegmentation")
# Fields of a tiny configuration of each family, in the order of the table of clients.
FIELDS = {
    "transformer": SEQ2SEQ,
    "rnn_seq2seq": RNN,
    "bert": TEXT,
    "long_range": LONG,
    "gpt": GPT,
    "vit": CLASSIFIER,
    "mae": MAE,
    "swin": SWIN,
    "detr": DETR,
    "deformable_detr": DEFORMABLE_DETR,
    "faster_rcnn": FASTER_RCNN,
    "convlstm": CONVLSTM,
    "video_transformer": VIDEO,
}
FAMILIES = tuple(FIELDS)
# name: (class, fields of its configuration). The entry named after its family represents it where one is enough.
CLASSES = {
    "transformer": ("TfmTransformerForConditionalGeneration", SEQ2SEQ),
    "transformer-base": ("TfmTransformerModel", SEQ2SEQ),
    "transformer-untied": ("TfmTransformerForConditionalGeneration", {**SEQ2SEQ, "tie_word_embeddings": False}),
    "transformer-mask-predict": ("TfmTransformerForConditionalGeneration", {**SEQ2SEQ, "decoding": "mask_predict"}),
    "bert": ("TfmBertForSequenceClassification", TEXT),
    "bert-base": ("TfmBertModel", TEXT),
    "bert-masked": ("TfmBertForMaskedLM", TEXT),
    "bert-untied": ("TfmBertForMaskedLM", {**TEXT, "tie_word_embeddings": False}),
    "bert-pretraining": ("TfmBertForPreTraining", TEXT),
    "bert-tagger": ("TfmBertForTokenClassification", TEXT),
    "bert-chooser": ("TfmBertForMultipleChoice", TEXT),
    "bert-reader": ("TfmBertForQuestionAnswering", TEXT),
    "gpt": ("TfmGPTForCausalLM", GPT),
    "gpt-base": ("TfmGPTModel", GPT),
    "gpt-untied": ("TfmGPTForCausalLM", {**GPT, "tie_word_embeddings": False}),
    "gpt-post-norm": ("TfmGPTForCausalLM", {**GPT, "norm_first": False}),
    "gpt-classifier": ("TfmGPTForSequenceClassification", GPT),
    "vit": ("TfmViTForImageClassification", CLASSIFIER),
    "vit-base": ("TfmViTModel", IMAGE),
    "vit-mean": ("TfmViTForImageClassification", {**CLASSIFIER, "pooling": "mean"}),
    "vit-distilled": ("TfmViTForImageClassification", {**CLASSIFIER, "distillation_token": True}),
    "vit-represented": ("TfmViTForImageClassification", {**CLASSIFIER, "representation_layer": True}),
    "vit-backbone": ("TfmViTBackbone", IMAGE),
    "mae": ("TfmMAEForPreTraining", MAE),
    "mae-base": ("TfmMAEModel", MAE),
    "detr": ("TfmDetrForObjectDetection", DETR),
    "detr-base": ("TfmDetrModel", DETR),
    "detr-panoptic": ("TfmDetrForPanopticSegmentation", DETR),
    "video_transformer": ("TfmVideoTransformerForPrediction", VIDEO),
    "video_transformer-causal": ("TfmVideoTransformerForPrediction", {**VIDEO, "autoregressive": True}),
}


def add_classes() -> None:
    """Add the classes of the family table that are not in `CLASSES`: NAME for the first head, then NAME-AUTO_CLASS."""
    for name in FAMILIES:
        for auto_class, path in families.family_of(name).auto_classes.items():
            kind = path.rpartition(".")[2]
            if auto_class == "AutoConfig" or kind in {known for known, _ in CLASSES.values()}:
                continue
            is_first = auto_class.startswith("AutoModelFor") and name not in CLASSES
            CLASSES[name if is_first else f"{name}-{auto_class}"] = (kind, FIELDS[name])


add_classes()


def class_of(name: str) -> type[PreTrainedModel]:
    return getattr(hf_tfm, CLASSES[name][0])


@torch.no_grad()
def tiny(name: str, seed: int = 0, **fields) -> PreTrainedModel:
    """A model of `CLASSES` in evaluation mode with all weights random, because default biases of 0 would hide bugs."""
    torch.manual_seed(seed)
    model_class = class_of(name)
    model = model_class(model_class.config_class(**{**CLASSES[name][1], **fields})).eval()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs_of(name: str, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Inputs without labels."""
    generator = torch.Generator().manual_seed(seed)
    kind, (_, fields) = class_of(name), CLASSES[name]
    takes = inspect.signature(kind.forward).parameters
    if kind.main_input_name == "pixel_values_videos":
        shape = (rows, *(fields[name] for name in ("context_length", "num_channels", "image_size", "image_size")))
        return {"pixel_values_videos": torch.rand(shape, generator=generator)}
    if kind.main_input_name == "pixel_values":
        side = fields.get("image_size", 64)  # a detector accepts images of any size
        images = {"pixel_values": torch.randn(rows, 3, side, side, generator=generator)}
        patches = (side // fields.get("patch_size", side)) ** 2
        return {**images, "noise": torch.rand(rows, patches, generator=generator)} if "noise" in takes else images
    ids = torch.randint(5, 48, (rows, 9), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = ids.flip(1)
    several = kind.__name__.endswith("MultipleChoice")
    return {key: value[None] for key, value in inputs.items()} if several else inputs


def labels_of(auto_class: str, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Labels for the head of an Auto class with inputs of `inputs_of`; none if its loss needs none."""
    rows, ids = len(next(iter(inputs.values()))), inputs.get("input_ids")
    if auto_class in DETECTORS:
        size = inputs["pixel_values"].shape[2:]
        return {"labels": [objects(1 + i % 2, size) for i in range(1, rows + 1)]}
    if auto_class == "AutoModelForTimeSeriesPrediction":
        return {"labels": inputs["pixel_values_videos"][:, :2].flip(1)}
    if auto_class in ("AutoModelForImageClassification", "AutoModelForSequenceClassification"):
        return {"labels": torch.arange(rows) % 3}
    if ids is None or not auto_class.startswith("AutoModelFor"):
        return {}
    return {
        "AutoModelForPreTraining": {"labels": ids, "next_sentence_label": torch.arange(rows) % 2},
        "AutoModelForTokenClassification": {"labels": ids % 3},
        "AutoModelForMultipleChoice": {"labels": torch.tensor([1])},
        "AutoModelForQuestionAnswering": {"start_positions": ids[:, 0] % 7, "end_positions": ids[:, 1] % 7},
    }.get(auto_class, {"labels": ids})


def objects(count: int, size: tuple[int, int]) -> dict[str, Tensor]:
    """Random objects of an image, with masks."""
    generator = torch.Generator().manual_seed(count)
    boxes = 0.2 + 0.3 * torch.rand(count, 4, generator=generator)
    masks = (torch.rand(count, *size, generator=generator) > 0.5).float()
    return {"class_labels": torch.arange(count), "boxes": boxes, "masks": masks}


@torch.no_grad()
def outputs_of(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """Every tensor that the model returns in evaluation mode, except caches."""
    output = model.eval()(**inputs_of(name))
    return {key: value for key, value in output.items() if isinstance(value, Tensor)}
