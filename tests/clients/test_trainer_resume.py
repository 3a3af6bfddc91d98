"""transformers' Trainer resumes from a checkpoint and loads the best one with exactly the saved weights."""

import pytest
import torch
from every_class import CLASSES, DETECTORS, FAMILIES, class_of, inputs_of, tiny
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

NAMES = (*FAMILIES, "bert-masked", "gpt-untied", "detr-panoptic")


class Rows(Dataset):
    """Eight inputs with labels."""

    def __init__(self, name: str):
        self.rows = [{key: value[0] for key, value in inputs_of(name, 1, seed).items()} for seed in range(8)]
        family = name.split("-")[0]
        for number, row in enumerate(self.rows):
            row.pop("decoder_input_ids", None)
            row.pop("noise", None)
            if class_of(name)._auto_class in ("AutoModelForImageClassification", "AutoModelForSequenceClassification"):
                row["labels"] = torch.tensor(number % 3)
            elif family in ("bert", "gpt", "transformer", "rnn_seq2seq"):
                row["labels"] = row["input_ids"]
            elif class_of(name)._auto_class == "AutoModelForTimeSeriesPrediction":
                row["labels"] = row["pixel_values_videos"][:2]
            elif class_of(name)._auto_class in DETECTORS:
                row["labels"] = {
                    "class_labels": torch.tensor([number % 3]),
                    "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]]),
                }
                if name == "detr-panoptic":
                    row["labels"]["masks"] = torch.zeros(1, 64, 64, dtype=torch.bool)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def collate(rows):
    batch = {key: [row[key] for row in rows] for key in rows[0]}
    return {key: value if isinstance(value[0], dict) else torch.stack(value) for key, value in batch.items()}


def trainer(model, name, folder, **more) -> Trainer:
    arguments = {
        "max_steps": 4,
        "save_steps": 2,
        "save_strategy": "steps",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 0,
        **more,
    }
    return Trainer(
        model=model, args=TrainingArguments(str(folder), **arguments), train_dataset=Rows(name), data_collator=collate
    )


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]


class RecordInitialWeights(TrainerCallback):
    """Records the weights at the start of training."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.begun = weights(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.client("Trainer: resume", "transformers")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if "-" in name and name != "detr-panoptic" else ()) for name in NAMES],
)
def test_resuming_starts_with_the_saved_weights(name, tmp_path):
    model = tiny(name)
    trainer(model, name, tmp_path, max_steps=2).train()
    saved = weights(model)
    other = class_of(name)(class_of(name).config_class(**CLASSES[name][1]))
    assert any(not torch.equal(value, saved[key]) for key, value in weights(other).items())
    watch = RecordInitialWeights()
    again = trainer(other, name, tmp_path, max_steps=3, save_strategy="no")
    again.add_callback(watch)
    again.train(resume_from_checkpoint=True)
    assert_equal(watch.begun, saved)
    assert again.state.global_step == 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.client("Trainer: best model at the end", "transformers")
@pytest.mark.parametrize(  # a text, an image and objects; every family resumes in the test above
    "name", [name if name in ("bert", "vit", "detr") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_best_weights_are_loaded(name, tmp_path):
    """The first checkpoint is marked as the best one, so the last weights would be wrong."""
    model, seen = tiny(name), {}

    class MarkBest(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = weights(model)
            state.best_model_checkpoint, state.best_metric = str(tmp_path / "checkpoint-2"), 0.0
            state.best_global_step = 2

    run = trainer(model, name, tmp_path, max_steps=4)
    run.args.load_best_model_at_end = True  # as an argument it requires an evaluation
    run.add_callback(MarkBest())
    run.train()
    assert set(seen) == {2, 4} and any(not torch.equal(seen[2][key], seen[4][key]) for key in seen[2])
    assert_equal(weights(model), seen[2])
