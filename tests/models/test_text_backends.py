"""BERT and GPT with every attention backend, checkpointing, half precision, compilation, export and resizing."""

import copy

import pytest
import torch
from tiny_models import largest_difference
from tiny_text import MODELS, gradients, main_output, text_batch, tiny_text
from torch import nn
from transformers import CompileConfig

every_model = pytest.mark.parametrize("name", MODELS)
# Biases that shift all logits of a softmax equally have no effect on the loss: of keys, choices, answer positions.
SHIFTS = {
    "chooser": ("k_proj.bias", "classifier.bias"),
    "reader": ("k_proj.bias", "qa_outputs.bias", "layers.1.feed_forward_residual.norm.bias"),
}
# The other heads are a linear layer or two on one of the first models.
every_base = pytest.mark.parametrize(
    "name",
    [name if name in ("pretraining", "causal") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
BASES = pytest.mark.parametrize("name", ["pretraining", "causal"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@torch.no_grad()  # flex attention has no backward on a CPU
@every_model
@pytest.mark.parametrize("backend", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_backends_agree(name, backend):
    model, inputs = tiny_text(name), text_batch(name)
    seen = inputs["attention_mask"].bool() if name in ("tagger", "masked", "causal") else ...
    model.set_attn_implementation("eager")
    expected = main_output(model(**inputs))[seen]
    model.set_attn_implementation(backend)
    assert largest_difference(main_output(model(**inputs))[seen], expected) < 1e-5


@torch.no_grad()
@every_model
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention", "flash_attention_2"])
def test_maps_with_every_backend(name, backend):
    """Flash attention itself needs a GPU, but with output_attentions a model computes the maps eagerly."""
    model, inputs = tiny_text(name).base_model, text_batch("causal")
    model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True)
    assert model(**inputs).attentions is None
    model.config._attn_implementation = backend
    output = model(**inputs, output_attentions=True)
    assert len(output.attentions) == 2 and output.attentions[0].shape == (3, 4, 9, 9)
    for maps, others in zip(output.attentions, expected.attentions, strict=True):
        assert torch.equal(maps, others)
        torch.testing.assert_close(maps.sum(dim=-1), torch.ones(3, 4, 9))
    padded = (inputs["attention_mask"] == 0)[:, None, None]
    assert output.attentions[1].masked_select(padded).abs().max() == 0
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert (output.attentions[1][..., future].abs().max() == 0) == ("causal" in name or name == "post-norm")
    assert largest_difference(output.last_hidden_state, expected.last_hidden_state) < 1e-5


@every_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    found = []
    for checkpointing in (False, True):
        model = tiny_text(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        output = model(**text_batch(name, loss=True), output_attentions=True)
        assert len(output.attentions) == 2
        output.loss.backward()
        found.append(gradients(model))
    assert found[0].abs().max() > 1e-3 and largest_difference(*found) < 1e-6


@every_model
def test_every_weight_gets_a_gradient(name):
    model = tiny_text(name)
    model(**text_batch(name, loss=True)).loss.backward()
    for weight, parameter in model.named_parameters():
        assert parameter.grad is not None, weight
        if not weight.endswith(SHIFTS.get(name, "k_proj.bias")):
            assert parameter.grad.abs().max() > 1e-8, weight


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision(name, dtype, tmp_path):
    model, inputs = tiny_text(name), text_batch(name, loss=True)
    expected = model(**inputs).loss.item()
    model.save_pretrained(tmp_path)
    converted = copy.deepcopy(model).to(dtype)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    for half in (converted, loaded):
        output = half(**inputs)
        assert main_output(output).dtype == dtype
        assert output.loss.item() == pytest.approx(expected, rel=0.03)


@every_model
def test_autocast(name):
    model = tiny_text(name).train()
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**text_batch(name, loss=True)).loss
        loss.backward()
        found.append((loss.item(), gradients(model)))
    (expected, exact), (got, rounded) = found
    assert got == pytest.approx(expected, rel=0.03) and exact.dtype == rounded.dtype == torch.float32
    assert (exact - rounded).norm() < 0.1 * exact.norm()


@torch.no_grad()
@every_base
@pytest.mark.parametrize(
    "asked",
    [{}, pytest.param({"output_attentions": True, "output_hidden_states": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_forward_compiles_in_one_graph(name, asked):
    """The graph alone, run eagerly by torch: graph breaks show up here."""
    model, inputs = tiny_text(name), text_batch(name)
    # The first, uncompiled call installs transformers\' output hooks.
    expected = model(**inputs, **asked)
    output = torch.compile(model, fullgraph=True, backend="eager")(**inputs, **asked)
    assert largest_difference(main_output(output), main_output(expected)) < 1e-6
    assert (output.attentions is not None) == bool(asked)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pretraining", {}),
        pytest.param("masked", {"return_logits": False}, marks=pytest.mark.slow),
        pytest.param("causal", {}, marks=pytest.mark.slow),
        pytest.param("causal", {"return_logits": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_compiles_in_one_graph(name, options):
    model, inputs = tiny_text(name), text_batch(name, loss=True)
    if name == "masked":  # label positions are computed outside the graph, because their number depends on the data
        options = {**options, "masked_positions": (inputs["labels"].flatten() >= 0).nonzero()[:, 0]}
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = run(**inputs, **options).loss
        loss.backward()
        found.append(torch.cat([loss[None], gradients(model)]))
    assert largest_difference(*found) < 1e-5


@pytest.mark.slow
@torch.no_grad()
@BASES
def test_forward_compiled_with_the_default_backend(name):
    model, inputs = tiny_text(name), text_batch(name)
    compiled = torch.compile(model, fullgraph=True)
    assert largest_difference(main_output(compiled(**inputs)), main_output(model(**inputs))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_compiled_decoding_gives_the_same_tokens(beams):
    """The decoding step as one graph with a static cache; on a CPU transformers compiles only if requested."""
    model = tiny_text("causal")
    inputs = {"input_ids": text_batch("causal")["input_ids"][:1, :5].repeat(2, 1)}
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": beams, "do_sample": False}
    expected = model.generate(**inputs, **arguments)
    config = CompileConfig(fullgraph=True)
    config._compile_all_devices = True
    compiled = model.generate(**inputs, **arguments, cache_implementation="static", compile_config=config)
    assert torch.equal(compiled, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["causal", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "causal")]
)
def test_export(name):
    """One graph for any number of texts of any length; for multiple choice, any number of choices."""
    model, inputs = tiny_text(name), text_batch(name)
    rows, length = torch.export.Dim("rows", min=2), torch.export.Dim("length", min=2, max=30)
    dims = {1: rows, 2: length} if name == "chooser" else {0: rows, 1: length}
    given = {**inputs, "use_cache": False} if "causal" in name or name == "post-norm" else inputs
    shapes = {key: (None if key == "use_cache" else dims) for key in given}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)
    for other in (inputs, text_batch(name, rows=5, length=13, seed=1)):
        exported = program.module()(**{**given, **other})
        assert largest_difference(main_output(exported), main_output(model(**other))) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["pretraining", "masked", "causal"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [41, 60])
def test_resized_embeddings(name, tied, size, tmp_path):
    """Remaining tokens keep their logits; the model can be saved, loaded and trained at its new size."""
    model = tiny_text(name, tie_word_embeddings=tied)
    inputs = text_batch(name)
    inputs["input_ids"] = inputs["input_ids"].clamp_max(40)
    expected = main_output(model(**inputs))
    model.resize_token_embeddings(size, mean_resizing=False)
    got = main_output(model(**inputs))
    assert got.shape[-1] == size == model.config.vocab_size == model.get_output_embeddings().out_features
    kept = min(size, 48)
    assert largest_difference(got[..., :kept], expected[..., :kept]) < 1e-5
    same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same == tied
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(main_output(again.eval()(**inputs)), got)


def test_parallel_plans_name_existing_modules():
    """For BERT; GPT has no plan, see its configuration."""
    model = tiny_text("masked")
    modules = {name for name, _ in model.bert.named_modules()}
    for plan in (type(model.config).base_model_tp_plan, type(model.config).base_model_fsdp_plan):
        assert plan and {pattern.replace("*", "1") for pattern in plan} <= modules
    blocks = {f"bert.{name}" for name, module in model.bert.named_modules() if isinstance(module, nn.Linear)}
    planned = {pattern.replace("*", str(layer)) for pattern in model.tp_plan for layer in range(2)}
    assert {name for name in blocks if "layers" in name} <= planned and "lm_head.decoder" in planned
