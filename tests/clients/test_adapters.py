"""PEFT's adapters on every linear layer and convolution, and its prompts in generation."""

import pytest
import torch
from every_class import inputs_of, tiny
from test_called_layers import assert_same, language_batch, outputs_of
from torch import nn

import hf_tfm.models.generation as generation

peft = pytest.importorskip("peft", reason="needs pip install hf-tfm[clients]")
pytestmark = pytest.mark.clients

# Untied: merging an adapter of an output layer into tied weights also changes the word embeddings.
NAMES = ["transformer-untied", "bert-untied", "gpt-untied", "vit", "mae", "detr", "detr-panoptic"]


def with_adapters(model: nn.Module, kinds: tuple[type, ...] = (nn.Linear, nn.Conv2d)) -> peft.PeftModel:
    """LoRA with random weights on every layer of these kinds."""
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()


@pytest.mark.client("PEFT: LoRA on every layer, merged", "peft")
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_adapters_change_the_output_and_merge(name, kind):
    model = tiny(name).double()
    layers = sum(isinstance(module, kind) for module in model.modules())
    if not layers:
        pytest.skip("has no such layer")
    plain = {key: value.clone() for key, value in outputs_of(model, name).items()}
    adapted = with_adapters(model, (kind,))
    assert sum("Layer" in str(type(m).__mro__) and hasattr(m, "lora_A") for m in adapted.modules()) == layers
    found = outputs_of(adapted.get_base_model(), name)
    key = next(iter(key for key in ("logits", "last_hidden_state") if key in plain))
    assert (found[key] - plain[key]).abs().max() > 1e-3
    assert_same(outputs_of(adapted.merge_and_unload(), name), found)


@pytest.mark.parametrize("name", ["transformer-untied", "bert-untied", "bert-pretraining", "gpt-untied", "gpt"])
def test_a_loss_without_logits_uses_adapters(name):
    model = with_adapters(tiny(name), (nn.Linear,))
    batch = language_batch(name.split("-")[0] if "untied" not in name else name)
    found = {}
    for return_logits in (True, False):
        model.zero_grad()
        found[return_logits] = model(**{**batch, "return_logits": return_logits}).loss
        found[return_logits].backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found[return_logits] = torch.cat([found[return_logits].detach()[None], *grads])
    torch.testing.assert_close(found[False], found[True], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "task"), [("gpt-untied", "CAUSAL_LM"), ("transformer-untied", "SEQ_2_SEQ_LM")])
def test_prompts_are_seen_by_generation(name, task, monkeypatch):
    """Not prefix tuning: peft 0.21 does not know the cache under the name it has in transformers 5.24."""
    model, inputs = tiny(name, max_position_embeddings=40), inputs_of(name)
    inputs.pop("decoder_input_ids", None)
    nn.init.normal_(model.lm_head.weight)
    plain = model.generate(**inputs, max_new_tokens=5)
    sizes = {"token_dim": 16, "num_attention_heads": 2, "num_layers": 2, "num_transformer_submodules": 1}
    prompted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4, **sizes))
    for weight in prompted.prompt_encoder.parameters():
        nn.init.normal_(weight, std=3.0)
    found = prompted.generate(**inputs, max_new_tokens=5)
    assert found.shape != plain.shape or not torch.equal(found, plain)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), plain), "afterwards the model is as before"
    monkeypatch.setattr(generation, "greedy_suits", lambda *_: False)
    assert torch.equal(prompted.generate(**inputs, max_new_tokens=5), found)
