"""The losses of supervised fine-tuning, reward models and preference optimization equal those of trl."""

import pytest
import torch
from accelerate import Accelerator
from every_class import class_of, tiny

from hf_tfm.data.instructions import demonstration_rows, ranking_rows, tokenize_demonstrations, tokenize_rankings
from hf_tfm.data.vocabulary import train_bytes
from hf_tfm.tasks.completions import RankingCollator
from hf_tfm.tasks.preference_optimization import PreferenceTask
from hf_tfm.tasks.reward_modeling import RewardTask
from hf_tfm.tasks.supervised_fine_tuning import DemonstrationCollator, FineTuningTask

trl = pytest.importorskip("trl", reason="needs pip install hf-tfm[clients]")
datasets = pytest.importorskip("datasets")

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
PROMPTS = ["Two and two?\n", "Name a colour.\n", "Hi\n"]
PAIRS = {"prompt": PROMPTS, "chosen": ["Four.", "Green is one.", "Hello!"], "rejected": ["Five, I think.", "No.", "?"]}
FIELDS = {"vocab_size": 258, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bytes(["a"], 258)


def saved(folder, seed=0, head="gpt", **fields):
    torch.manual_seed(seed)
    model = tiny(head, **{**FIELDS, "initializer_range": 0.5, **fields})
    model.save_pretrained(folder)
    return class_of(head).from_pretrained(folder).eval()


def options(folder, **more):
    given = {"per_device_train_batch_size": 3, "report_to": "none", "use_cpu": True, "bf16": False}
    return {"output_dir": str(folder / "run"), "gradient_checkpointing": False, "max_length": 64, **given, **more}


def loss_of(trainer):
    (batch,) = trainer.get_train_dataloader()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model.eval(), batch).item()


def mean_of(task, model, batch):
    (loss,) = task.losses(model, batch).values()
    return loss.item() / task.count(batch)[task.term]


def task_of(kind, model, tokenizer, **given):
    task = kind.for_model(model, tokenizer, output_dir="", train_split="train", max_steps=1, **given)
    task.accelerator = Accelerator(cpu=True)
    return task


def test_supervised_fine_tuning(tmp_path, tokenizer):
    rows = datasets.Dataset.from_dict({"prompt": PROMPTS, "completion": PAIRS["chosen"]})
    model = saved(tmp_path)
    arguments = trl.SFTConfig(**options(tmp_path, completion_only_loss=True))
    theirs = loss_of(trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer))
    examples = tokenize_demonstrations(demonstration_rows(rows), tokenizer, "plain", 64)
    batch = DemonstrationCollator(tokenizer)(list(examples), [0, 1, 2], 0)
    assert mean_of(task_of(FineTuningTask, model, tokenizer), model, batch) == pytest.approx(theirs, rel=1e-5)


def rankings(tokenizer):
    rows = ranking_rows(datasets.Dataset.from_dict(PAIRS))
    return RankingCollator(tokenizer)(list(tokenize_rankings(rows, tokenizer, "plain", 64)), [0, 1, 2], 0)


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_reward_model(coefficient, tmp_path, tokenizer):
    model = saved(tmp_path, head="gpt-classifier", num_labels=1)
    rows = datasets.Dataset.from_dict(PAIRS)
    arguments = trl.RewardConfig(**options(tmp_path, center_rewards_coefficient=coefficient or None))
    theirs = loss_of(trl.RewardTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer))
    task = task_of(RewardTask, model, tokenizer, center_rewards_coefficient=coefficient)
    assert mean_of(task, model, rankings(tokenizer)) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("loss_type", "smoothing"), [("sigmoid", 0.0), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.2)], ids=lambda x: str(x)
)
def test_preference_optimization(loss_type, smoothing, tmp_path, tokenizer):
    model, reference = saved(tmp_path / "policy"), saved(tmp_path / "reference", seed=1)
    rows = datasets.Dataset.from_dict(PAIRS)
    given = {"loss_type": loss_type, "label_smoothing": smoothing, "beta": 0.3}
    trainer = trl.DPOTrainer(
        model,
        reference,
        args=trl.DPOConfig(**options(tmp_path, **given)),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    theirs = loss_of(trainer)
    task, batch = task_of(PreferenceTask, model, tokenizer, **given), rankings(tokenizer)
    log_probs = task.log_ratios(reference, batch, "train")[0].detach()
    task.reference = {"train": log_probs}
    assert mean_of(task, model, batch) == pytest.approx(theirs, rel=1e-5)
