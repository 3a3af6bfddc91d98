"""Distillation of language models: masked and causal, initialized from the teacher, streamed, over all tokens."""

import pytest
import torch
from distill_text_recipes import SMALL, WIDE, command_line, run, save
from recipe_helpers import fresh_state, record
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

from hf_tfm import TfmBertConfig, TfmBertForMaskedLM, TfmGPTConfig, TfmGPTForCausalLM
from hf_tfm.data.vocabulary import train_bytes

GPT = SMALL.replace("}", ", max_position_embeddings: 64}")
LANGUAGE = {"batch_tokens": 128, "vocab_size": None, "costs": "false"}


def test_student_is_initialized_from_the_teacher(data, language_model, tmp_path):
    model = "{hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, num_hidden_layers: 2, "
    model += "type_vocab_size: 0, pooler: none, max_position_embeddings: 64}"
    terms = "[{kind: soft_target, weight: 5, temperature: 2}, {kind: label, weight: 2}, {kind: cosine}]"
    common = {"teacher": language_model, "terms": terms, "model": model, "batch_tokens": 128, "vocab_size": None}
    argv = command_line(data, tmp_path / "run", **common, student_layers="[1, 3]", max_steps=1, learning_rate=1e-9)
    assert run("distill_pretrain", *argv) == 0
    fresh_state()
    student = AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    teacher = AutoModelForMaskedLM.from_pretrained(language_model)
    for mine, theirs in zip(student.bert.layers, [teacher.bert.layers[1], teacher.bert.layers[3]], strict=True):
        for own, given in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own, given, rtol=0, atol=1e-6)
    assert {row["name"] for row in record(tmp_path / "run").metrics} == {"perplexity", "token_loss"}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run")) == student.config.vocab_size


def test_student_is_initialized_from_a_native_teacher(data, tokenizer, tmp_path):
    torch.manual_seed(0)
    native = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), num_hidden_layers=4, **WIDE))
    teacher = save(tmp_path / "teacher", native, tokenizer)
    model = "{hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, num_hidden_layers: 2, "
    model += "type_vocab_size: 0, pooler: none, max_position_embeddings: 64}"
    options = {"teacher": teacher, "terms": "[{kind: soft_target}]", "model": model, "costs": "false"}
    options |= {"batch_tokens": 128, "vocab_size": None, "student_layers": "[1, 3]", "max_steps": 1}
    assert run("distill_pretrain", *command_line(data, tmp_path / "run", **options, learning_rate=1e-9)) == 0
    student = AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    for mine, number in zip(student.bert.layers, (1, 3), strict=True):
        own = mine.state_dict()["feed_forward.up_proj.weight"]
        given = native.bert.encoder.layer[number].intermediate.dense.weight
        torch.testing.assert_close(own, given, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", ["[]", pytest.param("[1, 3]", marks=pytest.mark.slow)])
def test_teacher_may_have_more_embeddings_than_its_tokenizer(layers, data, tokenizer, tmp_path):
    config = TfmBertConfig(vocab_size=128, num_hidden_layers=4, **WIDE)
    teacher = save(tmp_path / "teacher", TfmBertForMaskedLM(config), tokenizer)
    model = "{hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, num_hidden_layers: 2, "
    model += "max_position_embeddings: 64}"
    options = {"teacher": teacher, "terms": "[{kind: soft_target}]", "costs": "false", "batch_tokens": 128}
    argv = command_line(data, tmp_path / "run", **options, model=model, student_layers=layers, max_steps=1)
    assert run("distill_pretrain", *argv) == 0
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "run").config.vocab_size == 128 > len(tokenizer)


def test_causal_model_learns_from_its_teacher(data, tmp_path):
    torch.manual_seed(0)
    texts = [f"the cat number {i} sleeps" for i in range(40)]
    tokenizer = train_bytes(texts, 300)
    config = TfmGPTConfig(vocab_size=len(tokenizer), num_hidden_layers=4, **WIDE)
    teacher = save(tmp_path / "teacher", TfmGPTForCausalLM(config), tokenizer)
    terms = "[{kind: soft_target, temperature: 2}, {kind: label}, {kind: hidden_state}, {kind: attention_score}]"
    options = {**LANGUAGE, "teacher": teacher, "terms": terms, "objective": "causal", "model": GPT}
    assert run("distill_pretrain", *command_line(data, tmp_path / "run", **options)) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert student.config.model_type == "tfm_gpt" and student.config.vocab_size == len(tokenizer)
    assert [term["name"] for term in record(tmp_path / "run").distillation["terms"]] == [
        *("soft_target", "label", "hidden_state", "attention_score")
    ]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"streaming": "true"}, marks=pytest.mark.slow),
        {"terms": "[{kind: soft_target, tokens: all}]"},
    ],
    ids=str,
)
def test_streaming_and_all_tokens(options, data, language_model, tmp_path):
    given = {**LANGUAGE, "teacher": language_model, "terms": "[{kind: soft_target}]", **options}
    assert run("distill_pretrain", *command_line(data, tmp_path / "run", **given)) == 0
    fresh_state()
    assert run("distill_pretrain", *command_line(data, tmp_path / "start", **given, learning_rate=1e-12)) == 0
    ours, start = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "start"))
    assert any(not torch.equal(ours[name], start[name]) for name in ours)
