"""Distillation of translation models: terms by hand, and teachers and students of other families."""

import pytest
import torch
from distillation_helpers import batches, distillation, losses, randomize, sentence_pairs, translation_task, translator
from torch.nn.functional import kl_div
from transformers import MarianConfig, MarianMTModel

from hf_tfm import TfmRNNSeq2SeqConfig, TfmRNNSeq2SeqForConditionalGeneration

TERMS = [{"kind": "soft_target", "temperature": 2.0}, {"kind": "label"}]


def marian():
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": 2}
    return randomize(MarianMTModel(MarianConfig(vocab_size=60, **sizes, **heads, **tokens)))


def recurrent():
    torch.manual_seed(2)
    sizes = {"embedding_size": 16, "encoder_hidden_size": 8, "hidden_size": 16, "dropout": 0.0}
    return TfmRNNSeq2SeqForConditionalGeneration(TfmRNNSeq2SeqConfig(vocab_size=60, **sizes))


@pytest.mark.parametrize("student", [lambda: translator(2, 16, seed=1), recurrent], ids=["transformer", "rnn"])
@pytest.mark.parametrize("teacher", [translator, marian], ids=["ours", "marian"])
def test_soft_targets_by_hand(teacher, student):
    """Of the target tokens only, whatever the padding."""
    teacher = teacher().eval()
    task, model = distillation(translation_task(), teacher, student(), TERMS)
    model.eval()
    (batch,) = batches(task, sentence_pairs(), [[0, 1, 2]])
    inputs = task.inputs(batch)
    with torch.no_grad():
        found = losses(task, model, batch)
        ours, theirs = (each(**inputs).logits.float() / 2.0 for each in (model.student, teacher))
    real = batch["labels"] != -100
    assert not real.all()
    expected = kl_div(ours[real].log_softmax(-1), theirs[real].log_softmax(-1), reduction="sum", log_target=True)
    assert found["soft_target"] == pytest.approx(4.0 * expected.item() / int(real.sum()), rel=1e-4)
    own = task.task.losses(model.student, batch)["token"].item() / int(real.sum())
    smoothing = {task.task.model.config.label_smoothing, model.student.config.label_smoothing}
    assert len(smoothing) == 1 and found["token"] == pytest.approx(own, rel=1e-5)


def test_targets_of_the_encoder_are_refused():
    terms = [{"kind": "hidden_state", "stack": "encoder", "tokens": "targets"}]
    task, model = distillation(translation_task(), translator(), translator(2, 16, seed=1), terms)
    with pytest.raises(ValueError, match=r'tokens "targets" of .*: the task has no such tokens with a target'):
        losses(task, model, batches(task, sentence_pairs(), [[0, 1]])[0])
