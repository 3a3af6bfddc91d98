"""sentence-transformers with our BERT: embeddings are means of the last hidden states, also for a published model."""

from pathlib import Path

import pytest
import torch
from every_class import tiny
from transformers import BertConfig, BertModel
from words import TEXTS, tokenizer

import hf_tfm
from hf_tfm.conversion import convert

sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs pip install hf-tfm[clients]")
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
CLIENT = "sentence-transformers"
OTHERS = "not a text encoder"
MINILM = Path(__file__).parents[3] / "shared" / "pretrained" / "minilm-l6"
SENTENCES = ["A man is eating food.", "Someone has a meal.", "The bank raised its rates again on Tuesday.", "Yes"]


def wrapped(folder, pooling: str = "mean"):
    modules = sentence_transformers.sentence_transformer.modules
    words = modules.Transformer(str(folder))
    pool = modules.Pooling(words.get_embedding_dimension(), pooling)
    return sentence_transformers.SentenceTransformer(modules=[words, pool], device="cpu")


@torch.no_grad()
def embed(model, words, texts, pooling: str = "mean"):
    batch = words(texts, padding=True, return_tensors="pt")
    states = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).last_hidden_state
    if pooling == "cls":
        return states[:, 0]
    mask = batch["attention_mask"][..., None]
    return (states * mask).sum(1) / mask.sum(1)


@pytest.mark.client(CLIENT, "sentence-transformers", family="bert", others=OTHERS)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("travels", [True, False])
def test_embeddings(pooling, travels, tmp_path):
    hf_tfm.carry_code(travels)
    try:
        model = tiny("bert-base")
        model.save_pretrained(tmp_path / "bert")
        tokenizer().save_pretrained(tmp_path / "bert")
        found = wrapped(tmp_path / "bert", pooling)
        expected = embed(model, tokenizer(), TEXTS, pooling)
        for size in (1, 2, 4):
            embeddings = found.encode(TEXTS, batch_size=size, convert_to_tensor=True)
            torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)
        found.save_pretrained(str(tmp_path / "saved"))
        again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
        torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-5)
    finally:
        hf_tfm.carry_code(True)


@pytest.mark.client(CLIENT, "sentence-transformers", family="bert", others=OTHERS)
def test_training(tmp_path):
    """Positive pairs get closer."""
    import datasets

    tiny("bert-base").save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    model = wrapped(tmp_path / "bert")
    rows = datasets.Dataset.from_dict({"anchor": TEXTS, "positive": ["w20 w21", "w22", "w23 w24 w25", "w26 w27"]})
    loss = sentence_transformers.sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    options = {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    options |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(str(tmp_path / "run"), **options)
    trainer = sentence_transformers.SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=loss)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < 0.8 * losses[0]


def with_pooling(source, folder) -> None:
    """Save an encoder as a model of sentence-transformers: means of its states, projected and normalised."""
    modules = sentence_transformers.sentence_transformer.modules
    parts = [*wrapped(source)]
    width = parts[0].get_embedding_dimension()
    parts += [modules.Dense(width, 8), modules.Normalize()]
    sentence_transformers.SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(folder))


def converted(source, folder):
    """The model of sentence-transformers in a folder, before and after `hf-tfm convert --to tfm`."""
    convert(source, "tfm", folder)
    stock, ours = (sentence_transformers.SentenceTransformer(str(path), device="cpu") for path in (source, folder))
    assert "TfmBert" in type(next(iter(ours)).auto_model).__name__
    assert [type(module) for module in ours] == [type(module) for module in stock]
    return stock, ours


@pytest.mark.client(CLIENT, "sentence-transformers", family="bert", others=OTHERS)
def test_conversion(tmp_path):
    """The converted folder has the pooling and the modules after it."""
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer()), **fields)).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    with_pooling(tmp_path / "bert", tmp_path / "stock")
    stock, ours = converted(tmp_path / "stock", tmp_path / "ours")
    found, expected = (model.encode(TEXTS, convert_to_tensor=True) for model in (ours, stock))
    assert found.shape == (len(TEXTS), 8)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.client(CLIENT, "sentence-transformers", family="bert", others=OTHERS)
def test_published_model(tmp_path):
    """all-MiniLM-L6-v2 after `hf-tfm convert --to tfm`."""
    if not (MINILM / "model.safetensors").exists():
        pytest.skip(f"{MINILM} is absent")
    with_pooling(MINILM, tmp_path / "stock")
    stock, ours = converted(tmp_path / "stock", tmp_path / "ours")
    found, expected = (model.encode(SENTENCES, convert_to_tensor=True) for model in (ours, stock))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    means = wrapped(tmp_path / "ours").encode(SENTENCES, convert_to_tensor=True)
    assert ours.similarity(means, means).fill_diagonal_(-1).argmax(1)[:2].tolist() == [1, 0]
