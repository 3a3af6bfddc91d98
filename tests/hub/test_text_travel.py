"""BERTs and GPTs carry their code: they load where the package is not installed, and are pushed on from there."""

import json

import pytest
import torch
from detr_helpers import drawn
from hub_helpers import run_python
from server import HubServer
from text_helpers import SHAPE, tokenizer
from transformers import AutoConfig, pipeline

import hf_tfm

BERT = {**SHAPE, "intermediate_size": 48}
DISTILBERT = {**BERT, "type_vocab_size": 0, "pooler": "relu"}
GPT = {**SHAPE, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
MODELS = {
    "pretraining": (hf_tfm.TfmBertForPreTraining, BERT),
    "masked": (hf_tfm.TfmBertForMaskedLM, {**BERT, "tie_word_embeddings": False}),
    "classifier": (hf_tfm.TfmBertForSequenceClassification, {**DISTILBERT, "num_labels": 3}),
    "tagger": (hf_tfm.TfmBertForTokenClassification, {**BERT, "pooler": "none", "num_labels": 3}),
    "chooser": (hf_tfm.TfmBertForMultipleChoice, {**BERT, "pooler": "tanh_relu"}),
    "reader": (hf_tfm.TfmBertForQuestionAnswering, BERT),
    "causal": (hf_tfm.TfmGPTForCausalLM, GPT),
    "post-norm": (hf_tfm.TfmGPTForCausalLM, {**GPT, "norm_first": False, "hidden_act": "gelu"}),
    "causal-classifier": (hf_tfm.TfmGPTForSequenceClassification, {**GPT, "num_labels": 3}),
}
HEADS = {name: model_class._auto_class for name, (model_class, _) in MODELS.items()}
PIPELINES = {"masked": "fill-mask", "causal": "text-generation", "classifier": "text-classification"}

# Runs here and there: what the Auto classes make of a repository or folder, in JSON that keeps every bit of a number.
OUTPUTS = """
import json
import torch
import transformers

torch.set_num_threads(1)


@torch.no_grad()
def outputs(repo, head, **code):
    found = {}
    for name in ("AutoModel", head):
        model = getattr(transformers, name).from_pretrained(repo, **code).eval()
        ids = torch.randint(1, 50, (2, 11), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        ids[1, 7:], mask[1, 7:] = 0, 0
        given = {"input_ids": ids, "attention_mask": mask}
        if name == "AutoModelForMultipleChoice":
            given = {key: value[None] for key, value in given.items()}
        labels = {
            "AutoModelForPreTraining": {"labels": ids, "next_sentence_label": torch.tensor([0, 1])},
            "AutoModelForSequenceClassification": {"labels": torch.tensor([0, 2])},
            "AutoModelForTokenClassification": {"labels": ids % 3},
            "AutoModelForMultipleChoice": {"labels": torch.tensor([1])},
            "AutoModelForQuestionAnswering": {"start_positions": ids[:, 0] % 7, "end_positions": ids[:, 1] % 7},
        }
        if name != "AutoModel":
            given |= labels.get(name, {"labels": ids})
        output = model(**given)
        names = ("loss", "logits", "prediction_logits", "seq_relationship_logits", "start_logits", "last_hidden_state")
        values = {key: output[key].tolist() for key in names if output.get(key) is not None}
        if name == "AutoModelForCausalLM":
            values["generated"] = model.generate(ids[:1, :5], max_new_tokens=8, num_beams=2).tolist()
        found[name] = [type(model).__name__, values]
    return found
"""

LOAD = """
try:
    import hf_tfm
    raise SystemExit("the package is importable")
except ModuleNotFoundError:
    pass
code = {"trust_remote_code": True}
found = {"pipelines": {}}
for name, head in HEADS.items():
    repo = f"user/{name}"
    found[repo] = outputs(repo, head, **code)
    getattr(transformers, head).from_pretrained(repo, **code).push_to_hub(f"{repo}-again")
    found[f"{repo}-again"] = outputs(f"{repo}-again", head, **code)
    found[f"{name}-folder"] = outputs(f"../{name}", head, **code)
for name, task in PIPELINES.items():
    options = {"max_new_tokens": 5, "do_sample": False} if task == "text-generation" else {"top_k": 3}
    found["pipelines"][name] = transformers.pipeline(task, f"../{name}", **code)("the [MASK] one", **options)
print(json.dumps(found))
"""

PUSH = """
import transformers
import hf_tfm

for name, head in HEADS.items():
    getattr(transformers, head).from_pretrained(name).push_to_hub(f"user/{name}")
print("{}")
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One process pushes, another one that lacks the package loads, pushes on and loads again."""
    folder = tmp_path_factory.mktemp("text")
    heads = f"HEADS, PIPELINES = {HEADS!r}, {PIPELINES!r}\n"
    for name, (model_class, fields) in MODELS.items():
        drawn(model_class(model_class.config_class(**fields))).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    with HubServer() as hub:
        run_python(heads + PUSH, folder, hub.environment(folder / "home-1"))
        clean = folder / "clean"
        clean.mkdir()
        found = run_python(heads + OUTPUTS + LOAD, clean, hub.environment(folder / "home-2"), without_package=True)
        yield {"folder": folder, "found": found, "hub": hub}


@pytest.fixture(autouse=True)
def one_thread():
    """As in the other processes: with another number sums are formed in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", ["user/{}", "user/{}-again", "{}-folder"])
def test_loads_bit_equal_without_the_package(story, name, place):
    namespace = {}
    exec(OUTPUTS, namespace)
    expected = namespace["outputs"](str(story["folder"] / name), HEADS[name])
    found = story["found"][place.format(name)]
    assert found.keys() == expected.keys() == {"AutoModel", HEADS[name]}
    for auto_class, (class_name, values) in expected.items():
        assert found[auto_class][0] == class_name
        assert found[auto_class][1] == values and values, auto_class
    assert expected[HEADS[name]][1]["loss"] > 0


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_answer_the_same_without_the_package(story, name):
    options = {"max_new_tokens": 5, "do_sample": False} if name == "causal" else {"top_k": 3}
    expected = pipeline(PIPELINES[name], str(story["folder"] / name))("the [MASK] one", **options)
    assert expected and json.loads(json.dumps(expected)) == story["found"]["pipelines"][name]


@pytest.mark.parametrize("name", MODELS)
def test_the_code_arrives_as_it_was(story, name):
    first, again = (
        {
            path: file.content
            for path, file in story["hub"].repositories[f"models/user/{name}{tail}"].files.items()
            if path.endswith(".py")
        }
        for tail in ("", "-again")
    )
    family = MODELS[name][0].config_class
    needed = {"modeling_gpt.py"} if family is hf_tfm.TfmGPTConfig else {"modeling_bert.py", "bert_parts.py"}
    assert first == again and {"attention.py", "blocks.py", "cross_entropy.py", *needed} <= first.keys()
    config = json.loads(story["hub"].repositories[f"models/user/{name}-again"].files["config.json"].content)
    assert config["auto_map"] == family.auto_classes


def test_every_head_travels():
    """One model of each class of both families, but for those without a head, which come with the others."""
    for family in (hf_tfm.TfmBertConfig, hf_tfm.TfmGPTConfig):
        tested = {model_class.__name__ for model_class, _ in MODELS.values()}
        heads = {path.split(".")[1] for auto, path in family.auto_classes.items() if auto.startswith("AutoModelFor")}
        assert heads <= tested
        assert AutoConfig.for_model(family.model_type).__class__ is family
