"""BLEU, chrF and exact match: values, input checks, and use as evaluate modules."""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evaluate
import processes
import pytest
import sacrebleu

from hf_tfm.metrics import METRICS, Bleu, Chrf, ExactMatch, path

PREDICTIONS = ["The cat sat on the mat .", "Two men, one dog.", "a man rides a bike"]
REFERENCES = [
    ["The cat is sitting on the mat.", "A cat sat on the mat."],
    ["two men and one dog.", "Two men with a dog."],
    ["a man rides a bike", "a man is riding his bicycle"],
]
STREAMS = [list(stream) for stream in zip(*REFERENCES, strict=True)]
FIRST = STREAMS[0]


def test_bleu_by_hand():
    # "the" twice, but once in the reference: 5 of 6 words; then 3 of 5, 2 of 4 and 1 of 3 n-grams.
    result = Bleu().compute(predictions=["the cat sat on the mat"], references=["the cat sat on a mat"])
    assert result["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert result["precisions"] == pytest.approx([100 * 5 / 6, 60, 50, 100 / 3])
    assert (result["bp"], result["sys_len"], result["ref_len"]) == (1.0, 6, 6)


def test_bleu_brevity_penalty_by_hand():
    result = Bleu().compute(predictions=["the cat sat on"], references=["the cat sat on a mat"])
    assert result["bp"] == pytest.approx(math.exp(1 - 6 / 4))
    assert result["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_chrf_by_hand():
    # Characters: 1 of 2; bigrams: 0 of 1. chrF++ adds the word: 0 of 1.
    assert Chrf().compute(predictions=["ab"], references=["ac"])["chrf"] == pytest.approx(100 * (1 / 2 + 0) / 2)
    plus = Chrf(word_order=2).compute(predictions=["ab"], references=["ac"])["chrf"]
    assert plus == pytest.approx(100 * (1 / 2 + 0 + 0) / 3)


@pytest.mark.parametrize("options", [{}, {"lowercase": True}, {"tokenize": "intl"}, {"tokenize": "none"}])
@pytest.mark.parametrize(("given", "streams"), [(FIRST, [FIRST]), (REFERENCES, STREAMS)])
def test_bleu_equals_sacrebleu(options, given, streams):
    expected = sacrebleu.BLEU(**options)
    score = expected.corpus_score(PREDICTIONS, streams)
    result = Bleu(**options).compute(predictions=PREDICTIONS, references=given)
    assert result == {
        "bleu": score.score,
        "precisions": score.precisions,
        "bp": score.bp,
        "sys_len": score.sys_len,
        "ref_len": score.ref_len,
        "signature": str(expected.get_signature()),
    }


@pytest.mark.parametrize("options", [{}, {"word_order": 2}, {"lowercase": True}])
@pytest.mark.parametrize(("given", "streams"), [(FIRST, [FIRST]), (REFERENCES, STREAMS)])
def test_chrf_equals_sacrebleu(options, given, streams):
    expected = sacrebleu.CHRF(**options)
    score = expected.corpus_score(PREDICTIONS, streams).score
    result = Chrf(**options).compute(predictions=PREDICTIONS, references=given)
    assert result == {"chrf": score, "signature": str(expected.get_signature())}


def test_signatures_describe_the_options():
    version = f"version:{sacrebleu.__version__}"
    bleu = Bleu(lowercase=True, tokenize="intl").compute(predictions=PREDICTIONS, references=REFERENCES)
    assert bleu["signature"] == f"nrefs:2|case:lc|eff:no|tok:intl|smooth:exp|{version}"
    chrf = Chrf(word_order=2).compute(predictions=PREDICTIONS, references=FIRST)
    assert chrf["signature"] == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|{version}"


@pytest.mark.parametrize(
    ("options", "references", "share"),
    [
        ({}, ["a", "B ", "x", "d"], 0.5),
        ({"lowercase": True}, ["a", "B ", "x", "d"], 0.75),
        ({}, [["x", "a"], ["b", "x"], ["x", "y"], ["d", "d"]], 0.75),
    ],
)
def test_exact_match_by_hand(options, references, share):
    result = ExactMatch(**options).compute(predictions=[" a", "b", "c", "d"], references=references)
    assert result == {"exact_match": share}


@pytest.mark.parametrize("metric", METRICS.values())
def test_adding_in_batches_equals_all_at_once(metric):
    whole = metric().compute(predictions=PREDICTIONS, references=REFERENCES)
    parts = metric()
    parts.add(prediction=PREDICTIONS[0], reference=REFERENCES[0])
    parts.add_batch(predictions=PREDICTIONS[1:2], references=REFERENCES[1:2])
    assert parts.compute(predictions=PREDICTIONS[2:], references=REFERENCES[2:]) == whole
    # The state was reset: the next result covers the new sentences only.
    assert parts.compute(predictions=PREDICTIONS, references=REFERENCES) == whole


def test_instances_are_independent_and_leave_no_file(tmp_path):
    good, bad = (ExactMatch(cache_dir=str(tmp_path)) for _ in range(2))
    for text in ("a", "b"):
        good.add(prediction=text, reference=text)
        bad.add(prediction=text, reference="x")
    assert [metric.compute()["exact_match"] for metric in (good, bad)] == [1.0, 0.0]
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_metrics_combine():
    result = evaluate.combine([Bleu(), ExactMatch()]).compute(predictions=PREDICTIONS, references=FIRST)
    assert result["exact_match"] == pytest.approx(1 / 3)
    assert result["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, [FIRST]).score


@pytest.mark.parametrize("metric", METRICS.values())
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "predictions is empty and nothing was added"),
        ({"predictions": [], "references": []}, "predictions is empty and nothing was added"),
        ({"predictions": ["a"], "references": ["a", "b"]}, "must have equal lengths, got 1 and 2"),
        ({"predictions": ["a", "b"], "references": [["a"], ["b", "c"]]}, r"same number of references.*got \[1, 2\]"),
        ({"predictions": ["a"], "references": [[]]}, r"at least 1, got \[0\]"),
        ({"predictions": "abc", "references": ["a"]}, "predictions must be a list of sentences, got str"),
        ({"predictions": ["a"]}, "references must be a list of sentences, got NoneType"),
        ({"predictions": ["a", 1], "references": ["a", "b"]}, r"predictions\[1\] must be a str, got int"),
        ({"predictions": ["a"], "references": [["b", None]]}, r"references\[0\]\[1\] must be a str, got NoneType"),
        ({"predictions": ["a"], "references": ["a"], "lowercase": True}, "lowercase: give options to"),
    ],
)
def test_invalid_input_is_refused(metric, arguments, message):
    with pytest.raises(ValueError, match=message):
        metric().compute(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bleu(tokenize="14a"), 'tokenize must be one of none, .*13a.*, got "14a"'),
        (lambda: Bleu(lowrcase=True), "lowrcase: not an option of Bleu"),
        (lambda: Chrf(word_order=-1), "word_order must be at least 0, got -1"),
        (lambda: ExactMatch(num_process=2, process_id=0), "num_process=2 needs an experiment_id"),
        (lambda: path("rouge"), 'name must be one of bleu, chrf, exact_match, .*, got "rouge"'),
    ],
)
def test_invalid_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_process_without_sentences_is_counted(tmp_path):
    """Three shares of one run, the last one empty, as with a small test set."""

    def share(rank: int) -> dict | None:
        metric = Bleu(num_process=3, process_id=rank, experiment_id="one", cache_dir=str(tmp_path))
        rows = [slice(0, 2), slice(2, 3), slice(3, 3)][rank]
        metric.add_batch(predictions=PREDICTIONS[rows], references=REFERENCES[rows])
        return metric.compute()

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(share, range(3)))
    assert results == [Bleu().compute(predictions=PREDICTIONS, references=REFERENCES), None, None]


RANK = """
import json, socket, sys

def refuse(*args):
    raise OSError("this test has no network")

socket.socket.connect = refuse
import evaluate
from hf_tfm.metrics import METRICS, path

rank, sentences = int(sys.argv[1]), json.loads(sys.argv[2])
results = {}
for name in METRICS:
    metric = evaluate.load(path(name), num_process=2, process_id=rank, experiment_id="one", lowercase=True)
    results[name] = metric.compute(**sentences)
print(json.dumps(results))
"""


@pytest.mark.slow  # two new processes import evaluate and torch, 12 s
def test_loaded_by_path_offline_in_two_processes(tmp_path):
    """Fresh processes with an empty cache and no network give the result of one process with all sentences."""
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    ranks = []
    for rank, rows in enumerate([slice(0, 2), slice(2, 3)]):
        sentences = {"predictions": PREDICTIONS[rows], "references": REFERENCES[rows]}
        words = ("-c", RANK, rank, json.dumps(sentences))
        ranks.append(processes.start(*words, environment=environment, server="torch", merge=False))
    results = []
    for rank in ranks:
        processes.finish(rank)
        results.append(json.loads(rank.stdout.read_text().splitlines()[-1]))
    alone = {
        name: metric(lowercase=True).compute(predictions=PREDICTIONS, references=REFERENCES)
        for name, metric in METRICS.items()
    }
    assert results == [alone, dict.fromkeys(METRICS)]
