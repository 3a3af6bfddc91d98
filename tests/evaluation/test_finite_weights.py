"""Models with an infinite or NaN weight are not evaluated, and the error names the weight."""

import pytest
import torch
from evaluation_helpers import SIZES, TINY
from transformers import AutoModelForImageClassification, AutoTokenizer

from hf_tfm import (
    TfmBertConfig,
    TfmBertForSequenceClassification,
    TfmMAEConfig,
    TfmMAEForPreTraining,
    TfmTransformerConfig,
    TfmTransformerForConditionalGeneration,
    TfmViTConfig,
    TfmViTForImageClassification,
)
from hf_tfm.finite import check_finite, first_not_finite
from hf_tfm.hub.loading import load_with_processor
from hf_tfm.tasks.text_model import load_text_classifier
from hf_tfm.tasks.translation import load_seq2seq
from hf_tfm.viz.images import load_autoencoder, load_encoder
from hf_tfm.viz.text_attention import load_text_model

SEQ2SEQ = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 40}


def vit():
    return TfmViTForImageClassification(TfmViTConfig(**SIZES))


def mae():
    decoder = {f"decoder_{name}": value for name, value in TINY.items()}
    return TfmMAEForPreTraining(TfmMAEConfig(**SIZES, **decoder))


def bert():
    return TfmBertForSequenceClassification(TfmBertConfig(**TINY, vocab_size=40))


def seq2seq():
    return TfmTransformerForConditionalGeneration(
        TfmTransformerConfig(**SEQ2SEQ, num_encoder_layers=1, num_decoder_layers=1)
    )


CASES = {
    "image classifier": (vit, lambda folder: load_with_processor(AutoModelForImageClassification, folder)),
    "encoder": (vit, load_encoder),
    "autoencoder": (mae, load_autoencoder),
    "text classifier": (bert, load_text_classifier),
    "translator": (seq2seq, load_seq2seq),
    "text model": (bert, load_text_model),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_model_is_not_scored(name, value, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    make, load = CASES[name]
    model = make()
    spoilt = [name for name, _ in model.named_parameters() if "layer" in name][-1]
    with torch.no_grad():
        model.get_parameter(spoilt).view(-1)[-1] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf'".*{tmp_path.name}": its weight \S+ holds values that are not finite'):
        load(str(tmp_path))


def test_first_nonfinite_weight_is_named():
    model = vit()
    assert first_not_finite(model) is None
    check_finite(model, "it")
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("-inf")
    assert first_not_finite(model) == "classifier.weight"
    with torch.no_grad():
        model.vit.embeddings.cls_token.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the model has weights that are not finite: vit.embeddings.cls_token"):
        check_finite(model, "the model")


def test_weights_on_the_meta_device_are_skipped():
    assert first_not_finite(torch.nn.Linear(2, 2, device="meta")) is None
