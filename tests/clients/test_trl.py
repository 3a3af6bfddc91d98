"""trl's trainers on a GPT: a few steps each, and a policy that initially equals its reference."""

import pytest
import torch
from every_class import class_of, tiny
from torch import nn
from words import tokenizer

import hf_tfm

trl = pytest.importorskip("trl", reason="needs pip install hf-tfm[clients]")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize("travels", [True, False], ids=["code travels", "code stays"]),
]
OTHERS = "not a causal language model"
PROMPTS = ["w1 w2", "w3 w4", "w5 w6", "w7 w8"]
PAIRS = {"prompt": PROMPTS, "chosen": [" w9 w10"] * 4, "rejected": [" w11 w12"] * 4}
RATES = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}


@pytest.fixture(autouse=True)
def code(travels):
    """The models are saved with or without their code."""
    hf_tfm.carry_code(travels)
    yield
    hf_tfm.carry_code(True)


def words():
    return tokenizer(eos_token="[SEP]", bos_token="[CLS]")


def saved(folder, name: str = "gpt", **fields):
    """A model with dropout loaded from a folder, because trl loads the reference from there."""
    tiny(name, max_position_embeddings=64, **{**RATES, **fields}).save_pretrained(folder / "model")
    words().save_pretrained(folder / "model")
    return class_of(name).from_pretrained(folder / "model")


def options(folder, **more):
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        **more,
    }


def trained(made) -> list[dict]:
    """Logged values of a run's steps; checks that the run changed the weights."""
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    made.train()
    after = made.model.state_dict()
    assert any(not torch.equal(after[key], before[key]) for key in before)
    records = [record for record in made.state.log_history if "loss" in record]
    assert len(records) == 2
    return records


def assert_no_dropout(model: nn.Module) -> None:
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert rates and not any(rates)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits)


@pytest.mark.client("trl: SFT", "trl", family="gpt", others=OTHERS)
def test_supervised(tmp_path):
    rows = datasets.Dataset.from_dict({"text": [f"{prompt} w9 w10" for prompt in PROMPTS]})
    arguments = trl.SFTConfig(**options(tmp_path, max_length=16, packing=False))
    records = trained(trl.SFTTrainer(saved(tmp_path), arguments, train_dataset=rows, processing_class=words()))
    assert all(record["loss"] > 0 for record in records)


@pytest.mark.client("trl: Reward", "trl", family="gpt", others=OTHERS)
def test_reward(tmp_path):
    rows = datasets.Dataset.from_dict(PAIRS)
    arguments = trl.RewardConfig(**options(tmp_path, max_length=16))
    model = saved(tmp_path, "gpt-classifier", num_labels=1)
    made = trl.RewardTrainer(model, arguments, train_dataset=rows, processing_class=words())
    records = trained(made)
    assert all(record["loss"] > 0 for record in records)


@pytest.mark.client("trl: DPO", "trl", family="gpt", others=OTHERS)
@pytest.mark.parametrize("reference", ["loaded by trl", "given"])
def test_preference_rewards_start_at_0(reference, tmp_path):
    rows = datasets.Dataset.from_dict(PAIRS)
    arguments = trl.DPOConfig(**options(tmp_path, max_length=16))
    model = saved(tmp_path)
    given = None if reference != "given" else class_of("gpt").from_pretrained(tmp_path / "model")
    made = trl.DPOTrainer(model, given, args=arguments, train_dataset=rows, processing_class=words())
    assert_no_dropout(made.model)
    assert_no_dropout(made.ref_model)
    first, second = trained(made)
    assert {first[f"rewards/{key}"] for key in ("chosen", "rejected", "margins")} == {0.0}
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert second["rewards/margins"] != 0.0


@pytest.mark.client("trl: KTO", "trl", family="gpt", others=OTHERS)
def test_unpaired_preferences(tmp_path):
    if not hasattr(trl, "KTOTrainer"):
        pytest.skip("trl has no KTOTrainer")
    rows = {"prompt": PROMPTS, "completion": [" w9 w10", " w11 w12"] * 2, "label": [True, False] * 2}
    arguments = trl.KTOConfig(**options(tmp_path, max_length=16))
    made = trl.KTOTrainer(
        saved(tmp_path), None, args=arguments, train_dataset=datasets.Dataset.from_dict(rows), processing_class=words()
    )
    first, _ = trained(made)
    assert first["kl"] == 0.0
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)


def reward(completions, **kwargs) -> list[float]:
    """Different completions get different rewards."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


METHODS = [
    pytest.param(method, marks=pytest.mark.client(f"trl: {method}", "trl", family="gpt", others=OTHERS))
    for method in ("GRPO", "RLOO")
]


@pytest.mark.parametrize("method", METHODS)
def test_online_divergence_starts_at_0(method, tmp_path):
    rows = datasets.Dataset.from_dict({"prompt": PROMPTS})
    sizes = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, "disable_dropout": True}
    arguments = getattr(trl, f"{method}Config")(**options(tmp_path, **sizes))
    model = saved(tmp_path)
    made = getattr(trl, f"{method}Trainer")(
        model, reward, args=arguments, train_dataset=rows, processing_class=words()
    )
    assert_no_dropout(made.model)
    assert_no_dropout(made.ref_model)
    first, second = trained(made)
    assert first["kl"] == 0.0 and second["kl"] != 0.0
    assert first["reward_std"] > 0
