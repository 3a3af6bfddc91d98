"""A tiny random model of every class of every family, with inputs: what tests of other libraries' clients share."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_tfm

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
DETR = {
    "backbone": "test_resnet",  # of timm: four stages, 0.4 M parameters
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
# name: (class, fields of its configuration). The first of a family stands for it where one is enough.
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
}
FAMILIES = ("transformer", "bert", "gpt", "vit", "mae", "detr")


def class_of(name: str) -> type[PreTrainedModel]:
    return getattr(hf_tfm, CLASSES[name][0])


@torch.no_grad()
def tiny(name: str, seed: int = 0, **fields) -> PreTrainedModel:
    """A model of `CLASSES` in evaluation mode whose every weight is random: fresh biases are 0 and hide mistakes."""
    torch.manual_seed(seed)
    model_class = class_of(name)
    model = model_class(model_class.config_class(**{**CLASSES[name][1], **fields})).eval()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs_of(name: str, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Inputs without labels."""
    generator = torch.Generator().manual_seed(seed)
    family = name.split("-")[0]
    if family in ("vit", "mae"):
        images = {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
        return images if family == "vit" else {**images, "noise": torch.rand(rows, 4, generator=generator)}
    if family == "detr":
        return {"pixel_values": torch.randn(rows, 3, 64, 64, generator=generator)}
    ids = torch.randint(5, 48, (rows, 9), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "transformer":
        inputs["decoder_input_ids"] = ids.flip(1)
    return {key: value[None] for key, value in inputs.items()} if name == "bert-chooser" else inputs


@torch.no_grad()
def outputs_of(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """Every tensor that the model in evaluation mode returns, caches excepted."""
    output = model.eval()(**inputs_of(name))
    return {key: value for key, value in output.items() if isinstance(value, Tensor)}
