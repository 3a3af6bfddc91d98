"""The recipes of detection with Deformable DETR: training, evaluation, distillation, pictures, as for DETR."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from matplotlib.image import imread
from processes import run_ranks
from recipe_helpers import ROOT, record
from scene_recipes import command_line, scenes, train, write_hub
from test_distill_detection import distil
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline
from vision_recipes import distance, scores

from hf_tfm import cli
from hf_tfm.tasks.evaluation import evaluate

MODEL = (
    "backbone: test_resnet, backbone_norm: group, num_queries: 9, query_groups: 2, d_model: 32, encoder_layers: 1, "
    "decoder_layers: 2, encoder_ffn_dim: 32, decoder_ffn_dim: 32, with_box_refine: true"
)
FAMILY = {"architecture": "deformable_detr", "model": f"{{{MODEL}}}"}
RATES = "{backbone: 0.1, reference_points: 0.1, sampling_offsets: 0.1}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.set_num_threads(1)
    return write_hub(tmp_path_factory.mktemp("scenes") / "hub", scenes())


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train(data, folder, **FAMILY, max_steps=2, adam_epsilon=1e-4, rate_factors=RATES)


def test_the_run_is_scored_and_loaded(trained, data):
    found = record(trained)
    assert (found.task, found.model_type) == ("object-detection", "tfm_deformable_detr")
    assert "Deformable" in type(AutoImageProcessor.from_pretrained(trained)).__name__
    card = (trained / "README.md").read_text()
    assert "AutoModelForObjectDetection.from_pretrained" in card
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    result = evaluate(str(trained), dataset_name=str(data), split="test", batch_size=4, progress=False)
    again = {row["name"]: row["value"] for row in result["metrics"]}
    for name, value in scores(trained, "test").items():
        assert again[name] == pytest.approx(value, abs=1e-6), name


def test_the_pipeline_returns_pairs_of_query_and_class(trained):
    found = pipeline("object-detection", model=str(trained), threshold=0.0)(scenes()["test"][0]["image"])
    assert len(found) == 9 * 10, "of 9 queries and 10 classes; at most 100"


@pytest.mark.slow  # test_detection_train.py, with DETR
def test_micro_batches_and_two_processes_give_the_same_weights(trained, data, tmp_path):
    options = {**FAMILY, "max_steps": 2, "adam_epsilon": 1e-4, "rate_factors": RATES}
    single = train(data, tmp_path / "single", micro_batch_size=1, **options)
    assert distance(trained, single) < 5e-6  # of rounding; the steps are 1e-3 long
    command = ("-m", "hf_tfm.cli", "run", "detection_train")
    run_ranks(*command, *command_line(data, tmp_path / "two", **options), cwd=ROOT)
    assert distance(trained, tmp_path / "two") < 5e-6


def test_a_student_learns_from_it(trained, data, tmp_path, capsys):
    student = MODEL.replace("decoder_layers: 2", "decoder_layers: 1")
    start = {"architecture": "deformable_detr", "teacher": trained, "model": f"{{{student}}}"}
    distil(data, tmp_path / "run", **start, student_layers="{decoder: [1]}", max_steps=1)
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "run")
    assert model.config.decoder_layers == 1 and record(tmp_path / "run").model_type == "tfm_deformable_detr"
    with pytest.raises(ValueError, match="must score classes alike, got softmax and sigmoid"):
        distil(data, tmp_path / "other", teacher=trained, max_steps=1)


def test_pictures_of_queries(trained, data, tmp_path, capsys):
    cli.main(["show", "queries", str(trained), f"{data}:test:0", "--output", str(tmp_path / "a.png")])
    assert imread(tmp_path / "a.png").shape[0] > 300
