"""GPT against transformers' GPT-2: the same files, outputs, gradients and generated tokens, in both directions."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import hf_tfm

NATIVE = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "pad_token_id": 0}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
IDS = torch.randint(3, 50, (3, 11), generator=torch.Generator().manual_seed(0))
HEADS = {
    "Model": ("Model", {}),
    "ForCausalLM": ("LMHeadModel", {"labels": IDS}),
    "ForSequenceClassification": ("ForSequenceClassification", {"labels": torch.tensor([0, 1, 1])}),
}


def pair(head: str, folder) -> tuple:
    """transformers' model with random weights, and ours loaded from its files."""
    torch.manual_seed(0)
    native = getattr(transformers, f"GPT2{HEADS[head][0]}")(transformers.GPT2Config(**NATIVE, **TOKENS)).eval()
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.normal_(std=0.2)
    native.save_pretrained(folder)
    own, report = getattr(hf_tfm, f"TfmGPT{head}").from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return own.eval(), native


@pytest.mark.parametrize("head", HEADS)
def test_same_outputs_files_and_gradients(head, tmp_path):
    own, native = pair(head, tmp_path / "native")
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, 7:], mask[1, 7:] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False, **HEADS[head][1]}
    ours, theirs = own(**given), native(**given)
    assert set(ours) == set(theirs)
    for name in theirs:
        if isinstance(theirs[name], Tensor):
            assert (ours[name] - theirs[name]).abs().max() < 1e-5
    if "loss" in theirs:
        ours.loss.backward()
        theirs.loss.backward()
        total = [sum(p.grad.square().sum() for p in m.parameters() if p.grad is not None) for m in (own, native)]
        assert total[0].item() == pytest.approx(total[1].item(), rel=1e-5)
    own.save_pretrained(tmp_path / "own", save_original_format=True)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("native", "own"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again, report = type(native).from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.n_inner in (None, 128) and again.config.n_head == 4


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beam", "no cache"])
def test_same_generated_tokens(options, tmp_path):
    own, native = pair("ForCausalLM", tmp_path)
    given = {"attention_mask": torch.ones(3, 5, dtype=torch.long), "max_new_tokens": 8, "do_sample": False}
    expected = native.generate(IDS[:, :5], **given, num_beams=options.get("num_beams", 1))
    assert torch.equal(own.generate(IDS[:, :5], **given, **options), expected)


def test_the_loss_without_logits_and_the_auxiliary_loss(tmp_path):
    own, native = pair("ForCausalLM", tmp_path)
    found = own(input_ids=IDS, labels=IDS, return_logits=False)
    assert found.get("logits") is None
    assert found.loss.item() == pytest.approx(native(input_ids=IDS, labels=IDS).loss.item(), rel=1e-6)
    classifier = hf_tfm.TfmGPTForSequenceClassification(own.config)
    classifier.transformer.load_state_dict(own.transformer.state_dict())
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.tensor([0, 1, 1])}
    classifier.eval()
    both, alone = classifier(**given, language_weight=0.5).loss, classifier(**given).loss
    assert (both - alone).item() == pytest.approx(0.5 * found.loss.item(), rel=1e-5)


@pytest.mark.parametrize(("size", "millions"), [("gpt1", 116.5), ("small", 124.4), ("medium", 354.8), ("xl", 1557.6)])
def test_parameter_counts(size, millions):
    """Radford et al. 2018 (117 M); the GPT-2 authors' releases (124, 355, 1558 M)."""
    with torch.device("meta"):
        model = hf_tfm.TfmGPTModel(hf_tfm.TfmGPTConfig.of_size(size))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
