"""Seq2SeqTrainer trains, accumulates gradients, evaluates generated texts, resumes, and loads the best model."""

import pytest
import torch
from every_class import tiny
from transformers import EarlyStoppingCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

pytestmark = [
    pytest.mark.client("Seq2SeqTrainer: predict_with_generate", "transformers", others="not an encoder-decoder"),
    pytest.mark.parametrize(
        "name",
        [
            *("transformer", "rnn_seq2seq", "transformer-mask-predict"),
            pytest.param("transformer-untied", marks=pytest.mark.slow),
        ],
    ),
    pytest.mark.filterwarnings("ignore"),
]
END = 2


def rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    """A text of three tokens to copy, followed by the end-of-sentence token."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.cat([torch.randint(5, 9, (3,), generator=generator), torch.tensor([END])]) for _ in range(count)]
    return [{"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text} for text in texts]


def collate(batch):
    return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}


def model_of(name: str):
    return tiny(name, dropout=0.0, label_smoothing=0.0, eos_token_id=END, pad_token_id=0, decoder_start_token_id=END)


def trainer(model, folder, **more) -> Seq2SeqTrainer:
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        found, answers = prediction.predictions, prediction.label_ids
        right = [row[row > 4].tolist() == text[text > 4].tolist() for row, text in zip(found, answers, strict=True)]
        return {"right": sum(right) / len(right)}

    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 6,
        "learning_rate": 1e-2,
        "predict_with_generate": True,
        "generation_max_length": 8,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **more,
    }
    made = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(str(folder), **options),
        data_collator=collate,
        train_dataset=rows(),
        eval_dataset=rows(),
        compute_metrics=metrics,
    )
    made.seen = seen
    return made


def test_metrics_are_computed_on_generated_texts(name, tmp_path):
    made = trainer(model_of(name), tmp_path)
    found = made.evaluate()
    batch = collate(rows())
    model = made.model.eval()
    expected = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_length=8)
    (prediction,) = made.seen
    width = expected.shape[1]
    assert prediction.predictions[:, :width].tolist() == expected.tolist()
    assert set(prediction.predictions[:, width:].flatten().tolist()) <= {0, -100}
    assert found["eval_loss"] > 0 and 0 <= found["eval_right"] <= 1
    assert made.predict(rows(3)).predictions.shape[0] == 3


def test_training_improves_generated_texts(name, tmp_path):
    made = trainer(model_of(name), tmp_path, max_steps=30)
    before = made.predict(rows())
    made.train()
    after = made.predict(rows())
    assert after.metrics["test_loss"] < 0.8 * before.metrics["test_loss"]
    assert after.predictions.tolist() != before.predictions.tolist()
    assert {token for text in after.predictions[:, 1:].tolist() for token in text} <= {-100, 0, END, 5, 6, 7, 8}


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_accumulation(name, tmp_path):
    if "mask" in name:
        pytest.skip("masks are drawn for each micro-batch")
    found = []
    for size, parts in ((8, 1), (2, 4)):
        noted = Gradients()
        made = trainer(
            model_of(name),
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_grad_norm=0,
        )
        made.add_callback(noted)
        made.train()
        found.append(noted.found)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


def test_resumed_run_equals_uninterrupted_run(name, tmp_path):
    whole = trainer(model_of(name), tmp_path / "whole")
    whole.train()
    trainer(model_of(name), tmp_path / "cut", save_strategy="steps", save_steps=2).train()
    other = model_of(name)
    torch.nn.init.normal_(other.lm_head.weight)
    again = trainer(other, tmp_path / "cut")
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert again.state.global_step == 4
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[key], value, msg=key)


def test_best_model_by_generated_texts(name, tmp_path):
    made = trainer(
        model_of(name),
        tmp_path,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        metric_for_best_model="right",
        load_best_model_at_end=True,
    )
    made.add_callback(EarlyStoppingCallback(early_stopping_patience=5))
    made.train()
    scores = [entry["eval_right"] for entry in made.state.log_history if "eval_right" in entry]
    assert len(scores) == 3 and made.state.best_metric == max(scores)
    assert made.evaluate()["eval_right"] == max(scores)
