"""The language model benchmarks run with small models, and every variant trains or generates."""

import json

import pytest
from accelerate.state import AcceleratorState

from benchmarks import common, language_generation, language_training, rlhf


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Reads the results that a benchmark wrote."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    yield lambda name: json.loads((tmp_path / f"{name}.json").read_text())
    AcceleratorState._reset_state(reset_partial_state=True)


def test_both_models_generate_the_same_texts(results):
    options = {"vocab_size": 128, "prompt_length": 6, "new_tokens": 4, "rounds": 1}
    language_generation.main(sizes=("tiny",), batch_sizes=(1, 3), beams=(1, 2), **options)
    found = results("language_generation")["results"]
    assert len(found) == 4
    for result in found.values():
        assert result["identical_sentences"] == 1.0 and result["new_tokens"] == 4.0
        assert all(speed > 0 for speed in result["tokens_per_second"].values())


def test_every_variant_trains(results, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [json.dumps({"text": f"a film of {i} parts and {i * 7} words"}) for i in range(200)]
    (texts / "train.jsonl").write_text("\n".join(lines))
    sizes = {"bert_sizes": ("tiny",), "gpt_sizes": ("tiny",), "precisions": ("no",), "vocab_size": 300, "length": 8}
    language_training.main(str(texts), **sizes, batch_size=4, block=16, blocks=1, batches=1, rounds=1)
    models = results("language_training")["models"]
    equal = [f"bert, tiny, equal work, {kind}" for kind in ("training", "inference")]
    assert set(models) == {"bert, tiny", "gpt, tiny", *equal}
    assert set(models[equal[0]]["ratios"]) == {"ours_fp32 / bert_fp32", "ours_labelled_fp32 / bert_fp32"}
    assert set(models[equal[1]]["tokens_per_second"]) == {"ours_fp32", "bert_fp32"}
    for model, peer in (("bert, tiny", "bert"), ("gpt, tiny", "gpt2")):
        assert set(models[model]["tokens_per_second"]) == {"ours_fp32", f"{peer}_fp32"}


def test_steps_of_reinforcement_learning_are_counted(results, tmp_path):
    model = rlhf.new_model(tmp_path, layers=1, hidden_size=32, vocab_size=300)
    options = {"max_new_tokens": 4, "batch_size": 4, "num_generations": 2, "learning_rate": 1e-4}
    work = rlhf.ours("rloo", model, rlhf.prompts(tmp_path), str(tmp_path), 2, options)
    for _ in range(2):
        tokens, seconds = work()
        assert 8 <= tokens <= 32 and seconds > 0
