"""One estimate of memory for new and saved models, on every operating system."""

import importlib
import sys

import psutil
import pytest

from hf_tfm import (
    TfmBertConfig,
    TfmBertForMaskedLM,
    TfmTransformerConfig,
    TfmTransformerForConditionalGeneration,
    memory,
)

TINY = {"vocab_size": 48, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
MODELS = {
    "bert": (TfmBertForMaskedLM, TfmBertConfig(**TINY, num_hidden_layers=5)),
    "transformer": (
        TfmTransformerForConditionalGeneration,
        TfmTransformerConfig(**TINY, num_encoder_layers=4, num_decoder_layers=3),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_repeated_blocks_are_counted_without_building_all(name, monkeypatch):
    kind, config = MODELS[name]
    model = kind(config)
    expected = tuple(sum(t.numel() for t in tensors) for tensors in (model.parameters(), model.buffers()))
    monkeypatch.setattr(memory, "COUNTED_AS_BUILT", 1)
    assert memory.count_values(kind, config) == memory.count_values(kind, config, reduce=False) == expected


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_new_models_have_the_same_estimate(name, monkeypatch):
    kind, config = MODELS[name]
    needed = memory.WEIGHT * sum(memory.count_values(kind, config))
    monkeypatch.setattr(memory, "TRAINING", memory.WEIGHT)
    for room, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(memory, "usable_memory", lambda room=room: room)
        for check in (memory.new_model, memory.check_saved_size):
            if fits:
                check(kind, config)
            else:
                with pytest.raises(memory.TooLarge, match="this machine has"):
                    check(kind, config)


def test_model_that_cannot_be_built_on_the_meta_device_is_not_checked():
    def build(config):
        raise NotImplementedError

    memory.check_saved_size(build, MODELS["bert"][1])


def test_process_memory_limit_is_respected(monkeypatch):
    if memory.resource is None:
        pytest.skip("the system has no such limits")
    for limit, expected in ((10**6, 10**6), (memory.resource.RLIM_INFINITY, psutil.virtual_memory().total)):
        monkeypatch.setattr(memory.resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert memory.usable_memory() == expected


def test_systems_without_resource_limits(monkeypatch):
    try:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "resource", None)
            without = importlib.reload(memory)
            assert without.resource is None and without.usable_memory() == psutil.virtual_memory().total
    finally:
        importlib.reload(memory)
