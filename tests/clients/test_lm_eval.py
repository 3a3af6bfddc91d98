"""lm-eval's scores of a GPT equal those computed here, also in batches."""

import pytest
import torch
from every_class import class_of, tiny
from torch import nn
from words import tokenizer

pytest.importorskip("lm_eval", reason="needs pip install hf-tfm[clients]")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.client("lm-eval: HFLM", "lm-eval", family="gpt", others="not a causal language model"),
]
PAIRS = [("w1 w2", " w3"), ("w4", " w5 w6 w7"), ("w8 w9 w10 w11", " w12 w13"), ("w14", " w15")]


def words():
    return tokenizer(bos_token="[CLS]", eos_token="[SEP]")


def varied_model():
    model = tiny("gpt-untied")
    nn.init.normal_(model.lm_head.weight)
    return model


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def wrapped(model, size: int) -> HFLM:
    return HFLM(pretrained=model, tokenizer=words(), backend="causal", batch_size=size, device="cpu")


@torch.no_grad()
def score(model, context: str, answer: str) -> tuple[float, bool]:
    """Log-probability of the continuation's tokens, and whether each is the most likely one."""
    start, ids = len(words()(context)["input_ids"]), words()(context + answer, return_tensors="pt")["input_ids"]
    logs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
    wanted = ids[0, start:]
    return logs.gather(1, wanted[:, None]).sum().item(), bool((logs.argmax(-1) == wanted).all())


@pytest.mark.parametrize("size", [1, 3])
def test_log_likelihoods(size):
    model = varied_model()
    with torch.no_grad():  # the most likely continuation
        likely = model(words()("w1 w2", return_tensors="pt")["input_ids"]).logits[0, -1, 5:].argmax().item()
    pairs = [*PAIRS, ("w1 w2", f" w{likely}")]
    found = wrapped(model, size).loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    expected = [score(model, *pair) for pair in pairs]
    assert [each[1] for each in found] == [each[1] for each in expected]
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=1e-4)


def test_rolling_log_likelihoods():
    """Of whole texts after the beginning-of-text token."""
    model = varied_model()
    texts = ["w1 w2 w3 w4", " ".join(f"w{i}" for i in range(20))]
    arguments = [(text,) for text in texts]
    found = wrapped(model, 2).loglikelihood_rolling(requests("loglikelihood_rolling", arguments), disable_tqdm=True)
    assert found == pytest.approx([score(model, "[CLS]", f" {text}")[0] for text in texts], abs=1e-3)


def test_generation():
    model = varied_model()
    options = {"until": ["w39"], "max_gen_toks": 5, "do_sample": False}
    found = wrapped(model, 2).generate_until(
        requests("generate_until", [(text, options) for text, _ in PAIRS]), disable_tqdm=True
    )
    for (text, _), answer in zip(PAIRS, found, strict=True):
        ids = words()(text, return_tensors="pt")["input_ids"]
        expected = words().decode(model.generate(ids, max_new_tokens=5)[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer.split() == expected.split("w39")[0].split()


def test_saved_folder(tmp_path):
    """lm-eval loads the model with AutoModelForCausalLM."""
    varied_model().save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    found = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32")
    assert type(found.model) is class_of("gpt") and found.max_length == 24
    scores = found.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    model = class_of("gpt").from_pretrained(tmp_path).eval()
    assert [each[0] for each in scores] == pytest.approx([score(model, *pair)[0] for pair in PAIRS], abs=1e-4)
