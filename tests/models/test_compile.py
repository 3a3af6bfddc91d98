"""torch.compile without graph breaks, and torch.export."""

import pytest
import torch
from tiny_models import largest_difference, mask_answers, tiny_batch, tiny_model
from transformers import CompileConfig

from hf_tfm.models.cross_entropy import IGNORE_INDEX

LEARNED = {"norm_first": True, "position_embedding_type": "learned"}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        pytest.param({}, {}, marks=pytest.mark.slow),
        ({}, {"output_attentions": True, "output_hidden_states": True}),
        pytest.param(LEARNED, {}, marks=pytest.mark.slow),
        pytest.param({"attention_score": "additive"}, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_forward_compiles_in_one_graph(fields, asked):
    """The graph alone, run eagerly by torch: graph breaks show up within a second."""
    model, batch = tiny_model(**fields), tiny_batch()
    # The first, uncompiled call installs transformers\' output hooks.
    expected = model(**batch, **asked)
    output = torch.compile(model, fullgraph=True, backend="eager")(**batch, **asked)
    assert largest_difference(output.logits, expected.logits) < 1e-6
    assert (output.cross_attentions is not None) == ("output_attentions" in asked)


@pytest.mark.slow  # tests/models/test_text_backends.py compiles the training of the same blocks
@pytest.mark.parametrize(("decoding", "return_logits"), [("autoregressive", True), ("mask_predict", False)])
def test_training_compiles_in_one_graph(decoding, return_logits):
    model, batch = tiny_model(decoding=decoding), tiny_batch()
    batch["labels"] = batch["decoder_input_ids"].masked_fill(batch["decoder_attention_mask"] == 0, IGNORE_INDEX)
    if decoding == "mask_predict":
        batch = mask_answers(batch)
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = run(**batch, return_logits=return_logits).loss
        loss.backward()
        found.append(torch.cat([loss[None], *(parameter.grad.flatten() for parameter in model.parameters())]))
    assert largest_difference(*found) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_forward_compiled_with_the_default_backend():
    model, batch = tiny_model(), tiny_batch()
    assert largest_difference(torch.compile(model, fullgraph=True)(**batch).logits, model(**batch).logits) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_compiled_decoding_gives_the_same_tokens(beams):
    """The decoding step as one graph with a static cache; on a CPU transformers compiles only if requested."""
    model, batch = tiny_model(tie_word_embeddings=False), tiny_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": beams}
    expected = model.generate(**inputs, **arguments)
    config = CompileConfig(fullgraph=True)
    config._compile_all_devices = True
    compiled = model.generate(**inputs, **arguments, cache_implementation="static", compile_config=config)
    assert torch.equal(compiled, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


SLOW = [pytest.param(fields, marks=pytest.mark.slow) for fields in (LEARNED, {"decoding": "mask_predict"})]


@pytest.mark.slow  # tests/models/test_swin.py and tests/clients/test_onnx_runtime.py export others
@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, *SLOW], ids=str)
def test_export(fields):
    """One graph for any number of sentences and any lengths."""
    model, batch = tiny_model(**fields), tiny_batch(rows=3, source=7, target=6)
    B, S, T = torch.export.Dim("B", min=2), torch.export.Dim("S", min=2, max=30), torch.export.Dim("T", min=2, max=30)
    shapes = {name: {0: B, 1: T if name.startswith("decoder") else S} for name in batch}
    inputs = {**batch, "use_cache": False}
    program = torch.export.export(model, (), inputs, dynamic_shapes={**shapes, "use_cache": None}, strict=False)
    for other in (batch, tiny_batch(rows=5, source=11, target=4, seed=1)):
        exported = program.module()(**other, use_cache=False).logits
        assert largest_difference(exported, model(**other).logits) < 1e-5
