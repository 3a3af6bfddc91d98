"""The table of model costs."""

import pytest
import torch
from test_card import RECORD
from torch import nn

from hf_tfm import TfmBertConfig, TfmBertForMaskedLM
from hf_tfm.hub.card import write_card
from hf_tfm.hub.cost import beside_teacher, count_flops, measure_cost
from hf_tfm.hub.results import RunRecord

T = 16
SAMPLE = {"input_ids": torch.zeros(1, T, dtype=torch.long)}


def bert(layers: int) -> TfmBertForMaskedLM:
    config = TfmBertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=layers
    )
    return TfmBertForMaskedLM(config)


def test_flops_are_those_of_the_matrix_products():
    cost = measure_cost("student", bert(2), SAMPLE)
    D, F, V = 32, 64, 50
    layer = 4 * D * D + 2 * D * F + 2 * T * D  # projections, feed-forward; scores and weighted values
    assert cost["gflops"] * 1e9 == pytest.approx(2 * T * (2 * layer + D * D + D * V))


def test_parameters_and_bytes_count_shared_weights_once():
    model = bert(1)
    cost = measure_cost("student", model, SAMPLE)
    assert cost["parameters"] == sum(p.numel() for p in model.parameters())
    assert cost["megabytes"] == pytest.approx(cost["parameters"] * 4 / 1e6)
    assert cost["samples_per_second"] == pytest.approx(32_000 / cost["milliseconds_32"])
    assert cost["threads"] == torch.get_num_threads()


def test_model_state_is_restored():
    model = bert(1).train()
    measure_cost("student", model, SAMPLE)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_score_relative_to_the_teacher():
    teacher, student = measure_cost("t", bert(2), SAMPLE, 0.8), measure_cost("s", bert(1), SAMPLE, 0.6)
    rows = beside_teacher(teacher, student, measure_cost("unscored", bert(1), SAMPLE))
    assert rows[1]["kept"] == pytest.approx(0.75)
    assert "kept" not in rows[0] and "kept" not in rows[2]


def test_any_module_has_a_cost():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, pixel_values):
            return self.layer(pixel_values)

    assert measure_cost("linear", Linear(), {"pixel_values": torch.zeros(1, 3)})["gflops"] == 2 * 3 * 5 / 1e9


def test_card_shows_the_table(tmp_path):
    rows = beside_teacher(measure_cost("teacher", bert(2), SAMPLE, 0.8), measure_cost("student", bert(1), SAMPLE, 0.6))
    record = RunRecord.from_dict({**RECORD, "costs": rows})
    record.save(tmp_path)
    assert RunRecord.load(tmp_path) == record
    bert(1).save_pretrained(tmp_path)
    card = write_card(tmp_path, record).read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("| student ")]
    assert line.endswith("| 0.6 | 75.0 % |") and f"| {rows[1]['parameters']:,} |" in line
    assert f"Sample: input_ids of {T}." in card


def test_student_card_names_teacher_and_terms(tmp_path):
    terms = [
        {"name": "label", "weight": 0.5, "temperature": 1.0, "tokens": "targets"}
        | {"pairs": [["logits", ""]], "projection": None},
        {"name": "hidden_state", "weight": 1.0, "temperature": 1.0, "tokens": "all"}
        | {"pairs": [["hidden/1", "hidden/2"], ["hidden/2", "hidden/4"]], "projection": [16, 32]},
    ]
    distillation = {"teacher": "runs/teacher", "student_layers": [1, 3], "cached": False, "terms": terms}
    record = RunRecord.from_dict({**RECORD, "distillation": distillation})
    record.save(tmp_path)
    assert RunRecord.load(tmp_path) == record
    bert(1).save_pretrained(tmp_path)
    card = write_card(tmp_path, record).read_text()
    assert (
        "distilled from `runs/teacher`, initialised with its layers 1, 3, for" in card and "from scratch" not in card
    )
    assert "| label | 0.5 | 1 | targets | true labels |" in card
    assert "| hidden_state | 1 | 1 | all | hidden/1 from hidden/2, hidden/2 from hidden/4, 16 to 32 features |" in card
    with pytest.raises(ValueError, match="distillation has no terms"):
        RunRecord.from_dict({**RECORD, "distillation": {k: v for k, v in distillation.items() if k != "terms"}})


def test_operations_are_counted_of_a_module_that_takes_a_parameter_as_argument():
    """As in inference mode, where an argument that requires a gradient has no history."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.inner = nn.Parameter(torch.ones(2, 3)), nn.Linear(3, 4, bias=False)

        def forward(self, pixel_values):
            return self.inner(self.rows * 1.0) + self.inner(self.rows)

    model = Outer()
    with torch.inference_mode():
        assert count_flops(model, {"pixel_values": torch.zeros(1)}) == 2 * (2 * 2 * 3 * 4)
    assert model.rows.requires_grad
