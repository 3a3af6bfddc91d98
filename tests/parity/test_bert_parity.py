"""BERT against transformers' BERT: the same files, outputs and gradients, in both directions."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import hf_tfm

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.randint(1, 50, (3, 11), generator=torch.Generator().manual_seed(0))
MASKED = torch.where(IDS % 5 == 0, IDS, -100)
HEADS = {
    "Model": {},
    "ForMaskedLM": {"labels": MASKED},
    "ForPreTraining": {"labels": MASKED, "next_sentence_label": torch.tensor([0, 1, 1])},
    "ForSequenceClassification": {"labels": torch.tensor([0, 1, 1])},
    "ForTokenClassification": {"labels": IDS % 2},
    "ForMultipleChoice": {"labels": torch.tensor([2])},
    "ForQuestionAnswering": {
        "start_positions": torch.tensor([0, 1, 2]),
        "end_positions": torch.tensor([3, 4, 50]),
    },
}


def inputs(head: str) -> dict[str, Tensor]:
    """Three sequences, one of them padded, with two segments; for multiple choice, three choices for one prompt."""
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    segments = (torch.arange(11) > 4).long().expand(3, -1)
    found = {"input_ids": IDS, "attention_mask": mask, "token_type_ids": segments}
    return {name: value[None] for name, value in found.items()} if head == "ForMultipleChoice" else found


def difference(ours, theirs) -> float:
    """The largest difference over all outputs."""
    pairs = [(ours[name], theirs[name]) for name in theirs if isinstance(theirs[name], Tensor)]
    assert pairs and set(ours) == set(theirs)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("head", HEADS)
def test_same_outputs_files_and_gradients(head, tmp_path):
    torch.manual_seed(0)
    native_class, own_class = getattr(transformers, f"Bert{head}"), getattr(hf_tfm, f"TfmBert{head}")
    native = native_class(transformers.BertConfig(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.normal_(std=0.1)
    native.save_pretrained(tmp_path / "native")
    own, report = own_class.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    given = {**inputs(head), **HEADS[head]}
    ours, theirs = own.eval()(**given), native(**given)
    assert difference(ours, theirs) < 1e-6
    if "loss" in theirs:
        ours.loss.backward()
        theirs.loss.backward()
        total = [sum(p.grad.square().sum() for p in m.parameters() if p.grad is not None) for m in (own, native)]
        assert total[0] == pytest.approx(total[1].item(), rel=1e-5)
    own.save_pretrained(tmp_path / "own", save_original_format=True)
    again, report = native_class.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert difference(again.eval()(**given), theirs) < 1e-6
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("native", "own"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
def test_loss_computed_for_labelled_tokens_only(head):
    torch.manual_seed(0)
    model = getattr(hf_tfm, f"TfmBert{head}")(hf_tfm.TfmBertConfig(**SHAPE))
    given = {**inputs(head), **HEADS[head]}
    whole, rows = model(**given), model(**given, return_logits=False)
    positions = (MASKED.flatten() != -100).nonzero()[:, 0]
    compact = model(**given, return_logits=False, masked_positions=positions)
    assert rows.loss.item() == pytest.approx(whole.loss.item(), abs=1e-6)
    assert compact.loss.item() == rows.loss.item()
    name = "logits" if head == "ForMaskedLM" else "prediction_logits"
    assert rows.get(name) is None and whole[name].shape == (3, 11, 50)
    gradients = [torch.autograd.grad(out.loss, model.parameters(), allow_unused=True) for out in (whole, rows)]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-6))


@pytest.mark.parametrize(
    ("size", "millions"),
    [("tiny", 4.4), ("mini", 11.2), ("small", 28.8), ("medium", 41.4), ("base", 109.5), ("large", 335.1)],
)
def test_parameter_counts(size, millions):
    """Turc et al. 2019, table 1 (4.4, 11.3, 29.1, 41.7 M); Devlin et al. 2019, section 3 (110 and 340 M)."""
    with torch.device("meta"):
        model = hf_tfm.TfmBertModel(hf_tfm.TfmBertConfig.of_size(size))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(("size", "millions"), [("distilbert", 66.4), ("tinybert4", 14.35), ("tinybert6", 66.96)])
def test_parameter_counts_of_students(size, millions):
    """Sanh et al. 2019, table 3 (66 M); Jiao et al. 2020, table 1 (14.5 and 67.0 M)."""
    with torch.device("meta"):
        model = hf_tfm.TfmBertModel(hf_tfm.TfmBertConfig.of_size(size))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
