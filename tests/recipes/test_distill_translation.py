"""Distillation of a translation model: online and from a cache, into a Transformer and a GRU."""

import runpy

import pytest
import torch
from recipe_helpers import ROOT, TINY, command_line, fresh_state, record, run_recipe, write_data
from safetensors.torch import load_file

MAIN = ROOT / "recipes" / "distill_translation.py"
TERMS = "[{kind: soft_target}, {kind: label}]"
INNER = "[{kind: soft_target}, {kind: hidden_state, stack: encoder}, {kind: attention_score, stack: cross}]"
TWO = TINY.replace("encoder_layers: 1", "encoder_layers: 2").replace("decoder_layers: 1", "decoder_layers: 2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.set_num_threads(1)
    return write_data(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert run_recipe(*command_line(data, folder, model=TWO)) == 0
    return folder


def distil(data, output_dir, **options):
    fresh_state()
    words = command_line(data, output_dir, **{"costs": "false", "terms": TERMS, **options})
    left_out = words.index("--vocab_size")
    assert runpy.run_path(str(MAIN))["main"](words[:left_out] + words[left_out + 2 :]) == 0
    fresh_state()
    return output_dir


def test_student_starts_with_layers_of_its_teacher_and_is_scored(data, teacher, tmp_path):
    layers = "{encoder: [1], decoder: [0]}"
    folder = distil(data, tmp_path / "run", teacher=teacher, student_layers=layers, learning_rate=1e-9, costs="true")
    ours, theirs = (load_file(one / "model.safetensors") for one in (folder, teacher))
    name = "model.encoder.layers.{}.self_attn.q_proj.weight"
    torch.testing.assert_close(ours[name.format(0)], theirs[name.format(1)], atol=1e-6, rtol=0)
    found = record(folder)
    assert {row["name"] for row in found.metrics} >= {"bleu", "chrf"}
    assert [cost["model"] for cost in found.costs] == ["teacher", "student"]
    assert found.costs[1]["gflops"] < found.costs[0]["gflops"]


def test_a_cached_teacher_trains_the_same_student(data, teacher, tmp_path):
    """Inner states of all stacks; also into a student of another family, by its predictions."""
    options = {"teacher": teacher, "terms": INNER, "adam_epsilon": 1e-3}  # key biases have gradients of rounding noise
    online = distil(data, tmp_path / "online", teacher_dtype="fp32", **options)
    cache = {"cache": tmp_path / "cache", "cache_dtype": "fp32"}
    distil(data, tmp_path / "none", write_cache="true", **cache, **options)
    cached = distil(data, tmp_path / "cached", **cache, **options)
    ours, theirs = (load_file(one / "model.safetensors") for one in (online, cached))
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-6
    rnn = "{embedding_size: 16, encoder_hidden_size: 8, hidden_size: 16}"
    folder = distil(data, tmp_path / "rnn", teacher=teacher, architecture="rnn_seq2seq", model=rnn)
    assert record(folder).model_type == "tfm_rnn_seq2seq"
