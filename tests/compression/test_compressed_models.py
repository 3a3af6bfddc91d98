"""Compressed models compute what they should, and are saved, loaded and trained further like any other model."""

import copy

import pytest
import torch
from every_class import inputs_of, tiny
from torch import nn
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

from hf_tfm.compression.low_rank import factorize_model
from hf_tfm.compression.methods import Calibration, apply_methods, read_methods
from hf_tfm.compression.structured import Blocks, Importance, gated, kept_of
from hf_tfm.models.compressed import Int8Embedding, Int8Linear

STACK = [
    {"name": "layers", "keep": [1]},
    {"name": "heads", "ratio": 0.5},
    {"name": "neurons", "ratio": 0.4},
    {"name": "low_rank", "modules": "all", "rank": 8},
    {"name": "magnitude", "sparsity": 0.3},
]


def loss(model, batch):
    labels = torch.arange(len(next(iter(batch.values())))) % model.config.num_labels
    return {"label": nn.functional.cross_entropy(model(**batch).logits, labels, reduction="sum")}


def calibration(name, batches=2):
    return Calibration(loss, [inputs_of(name, 3, seed=seed) for seed in range(batches)])


@torch.no_grad()
def logits(model, name):
    return model.eval()(**inputs_of(name, 3, seed=9)).logits


def reloaded(model, folder):
    model.save_pretrained(folder)
    found, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return found.eval()


# --- int8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_int8_equals_torch_ao(name, tmp_path):
    model = tiny(name)
    theirs = quantize_dynamic(copy.deepcopy(model), {nn.Linear: per_channel_dynamic_qconfig}, dtype=torch.qint8)
    linear = sum(type(module) is nn.Linear for module in model.modules())
    done = apply_methods(model, read_methods({"name": "int8", "layers": "linear"}))
    assert done[0]["quantized layers"] == linear == sum(isinstance(m, Int8Linear) for m in model.modules())
    torch.testing.assert_close(logits(model, name), logits(theirs, name), rtol=0, atol=0)
    found = reloaded(model, tmp_path)
    assert found.get_parameter(f"{found.base_model_prefix}.layers.0.feed_forward.up_proj.weight").dtype == torch.int8
    torch.testing.assert_close(logits(found, name), logits(model, name), rtol=0, atol=0)


def test_int8_embedding(tmp_path):
    model = tiny("bert")
    table = model.get_input_embeddings().weight.detach().clone()
    before = logits(model, "bert")
    apply_methods(model, read_methods("int8"))
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, Int8Embedding)
    rows = embedding(torch.arange(len(table)))
    assert ((rows - table).abs() <= embedding.scale[:, None] * 0.5 + 1e-7).all()
    assert 0 < (logits(model, "bert") - before).norm() / before.norm() < 0.05
    torch.testing.assert_close(logits(reloaded(model, tmp_path), "bert"), logits(model, "bert"), rtol=0, atol=0)
    torch.testing.assert_close(logits(copy.deepcopy(model), "bert"), logits(model, "bert"), rtol=0, atol=0)
    assert logits(model.to(torch.bfloat16), "bert").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="int8 weights, which cannot be compressed further"):
        apply_methods(model, read_methods("int8"))


# --- structured pruning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["heads", "neurons"])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_masked_equals_pruned(name, unit, tmp_path):
    model = tiny(name, num_attention_heads=4)
    counts = Blocks(model).counts(unit)
    kept = [[0, counts[0] - 1], [1]]
    masks = [torch.zeros(count).index_fill(0, torch.tensor(own), 1.0) for count, own in zip(counts, kept, strict=True)]
    with gated(model, unit, lambda i, _: masks[i]):
        expected = logits(model, name)
    size = sum(p.numel() for p in model.parameters())
    assert (logits(model, name) - expected).abs().max() > 1e-4
    Blocks(model).remove(unit, kept)
    torch.testing.assert_close(logits(model, name), expected, rtol=0, atol=1e-6)
    assert Blocks(model).counts(unit) == [2, 1] and sum(p.numel() for p in model.parameters()) < size
    torch.testing.assert_close(logits(reloaded(model, tmp_path), name), expected, rtol=0, atol=1e-6)


def test_importance_is_the_derivative_of_the_gates():
    model, data = tiny("bert"), calibration("bert")
    found = Importance(model, "heads").measure(data.loss, data.batches)
    expected, step = torch.zeros(2, 2, dtype=torch.float64), 1e-3
    samples = [{k: v[i : i + 1] for k, v in batch.items()} for batch in data.batches for i in range(3)]
    for number, sample in enumerate(samples):
        for layer in range(2):
            for head in range(2):
                values = []
                for sign in (1, -1):
                    gates = torch.ones(2, 2)
                    gates[layer, head] += sign * step
                    with torch.no_grad(), gated(model, "heads", lambda i, _, gates=gates: gates[i]):
                        label = torch.tensor([number % 3])
                        values.append(nn.functional.cross_entropy(model(**sample).logits.double(), label))
                expected[layer, head] += abs(values[0] - values[1]).item() / (2 * step) / len(samples)
    torch.testing.assert_close(torch.stack(found), expected, rtol=2e-2, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_choice_of_units():
    importance = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.1, 0.3, 0.2])]
    assert kept_of(importance, 4, "layer") == [[0, 2], [1, 2]]
    assert kept_of(importance, 2, "model") == [[0], [1]]
    assert kept_of([torch.tensor([9.0, 9.0, 9.0]), torch.tensor([1.0, 0.0, 0.0])], 4, "model") == [[0, 1, 2], [0]]
    assert kept_of(importance, 3, "model", round_to=2) == [[0, 2], [1, 2]]


# --- low rank --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_full_rank_equals_the_original(name, tmp_path):
    model = tiny(name)
    expected = logits(model, name)
    ranks = factorize_model(model, "all" if name == "bert" else "linear", None, 1.0)
    assert len(ranks) == 12 + (name == "bert")
    torch.testing.assert_close(logits(model, name), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(reloaded(model, tmp_path), name), logits(model, name), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(12, 7), (50, 7)], ids=["svd", "eigh"])
def test_best_approximation(shape):
    from hf_tfm.compression.low_rank import factors

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tall, wide = factors(weight, 3)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(tall @ wide, left[:, :3] * values[:3] @ right[:3], rtol=1e-4, atol=1e-4)


# --- stacked ---------------------------------------------------------------------------------------------------------


def test_stack_is_saved_loaded_and_trained_further(tmp_path):
    model = tiny("bert")
    done = apply_methods(model, read_methods(STACK), calibration("bert"))
    assert [one["name"] for one in done] == [one["name"] for one in STACK]
    assert done[1]["left"] == [1] and done[2]["left"] == [19]
    found = reloaded(model, tmp_path / "pruned")
    torch.testing.assert_close(logits(found, "bert"), logits(model, "bert"), rtol=0, atol=0)
    assert found.config.num_hidden_layers == 1 and found.config.intermediate_size == 19
    found.train()
    sum(loss(found, inputs_of("bert", 3)).values()).backward()
    assert all(parameter.grad is not None for parameter in found.parameters())
    apply_methods(found, read_methods("int8"))
    again = reloaded(found, tmp_path / "int8")
    torch.testing.assert_close(logits(again, "bert"), logits(found, "bert"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("int4", 'method must be among .*, got "int4"; did you mean int8?'),
        ({"name": "heads", "share": 0.5}, 'method: "heads" has the options ratio, scope.*, got "share"'),
        ({"name": "heads", "ratio": 1.0}, "method: heads: ratio must be above 0 and below 1, got 1.0"),
        (["int8", "heads"], "must be in the order .* heads cannot follow int8"),
        (["int8", "onnx"], "onnx cannot follow int8"),
        (3, "method must be names or mappings with a name, got 3"),
    ],
)
def test_refused_methods(methods, message):
    with pytest.raises(ValueError, match=message):
        read_methods(methods)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("bert", "heads", 'method "heads" measures importance on data: give dataset_name'),
        ("bert", {"name": "layers", "count": 2}, "count of layers must be in"),
        ("bert-masked", "int8", "shares the weights of its embeddings"),
        (
            "gpt-classifier",
            {"name": "layers", "count": 1},
            "structured pruning: a tfm_gpt model has no",
        ),
        ("vit", {"name": "low_rank", "rank": 4}, 'has no module for modules "embedding"'),
        ("bert", {"name": "low_rank", "rank": 400}, "rank must be at most 16, .* got 400"),
    ],
)
def test_refused_models(name, method, message):
    with pytest.raises(ValueError, match=message):
        apply_methods(tiny(name), read_methods(method))
