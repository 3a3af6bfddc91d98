"""Models of every family are saved with their code: they load without the package, and can be pushed again.

One process pushes; another one without the package loads, pushes again and loads that. Every class of the family
table is covered, by the variants below or by `every_class`; by default one or two of every family are loaded.
"""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from detr_helpers import TINY as DETR
from detr_helpers import drawn
from every_class import CLASSES, inputs_of, labels_of, tiny
from hub_helpers import randomize, run_python
from server import HubServer
from text_helpers import SHAPE, tokenizer
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, pipeline

import hf_tfm
from hf_tfm.families import FAMILIES

IMAGE = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DECODER = {
    "decoder_hidden_size": 8,
    "decoder_intermediate_size": 12,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}
BERT = {**SHAPE, "intermediate_size": 48}
DISTILBERT = {**BERT, "type_vocab_size": 0, "pooler": "relu"}
GPT = {**SHAPE, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
LEARNED = {"position_embedding_type": "learned", "norm_first": True, "backbone_norm": "group", "dilation": True}
COMPRESSED = {
    "layer_num_attention_heads": [1, 2],
    "layer_intermediate_sizes": [5, 48],
    "low_rank": {"embeddings.word_embeddings": 4, "layers.0.self_attn.q_proj": 3},
}
CLUSTERED = {"encoder_attention": "clustered", "encoder_attention_kwargs": {"rounds": 3, "width": 2.0}}
# name: (class, fields of its configuration)
VARIANTS: dict[str, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    "vit": (
        hf_tfm.TfmViTForImageClassification,
        {**IMAGE, "num_labels": 5, "position_embedding_type": "learned_2d", "out_indices": [1, 2]},
    ),
    "hybrid": (
        hf_tfm.TfmViTForImageClassification,
        {**IMAGE, "patch_size": 1, "image_size": 64, "num_labels": 5, "backbone": "resnet18"},
    ),
    "mae": (hf_tfm.TfmMAEForPreTraining, {**IMAGE, **DECODER}),
    "pretraining": (hf_tfm.TfmBertForPreTraining, BERT),
    "masked": (
        hf_tfm.TfmBertForMaskedLM,
        {**BERT, "tie_word_embeddings": False, "position_embedding_type": "floater"},
    ),
    "classifier": (hf_tfm.TfmBertForSequenceClassification, {**DISTILBERT, "num_labels": 3}),
    "compressed": (hf_tfm.TfmBertForSequenceClassification, {**DISTILBERT, **COMPRESSED, "num_labels": 3}),
    "compressed-int8": (hf_tfm.TfmBertForSequenceClassification, {**DISTILBERT, "int8": "all", "num_labels": 3}),
    "tagger": (hf_tfm.TfmBertForTokenClassification, {**BERT, "pooler": "none", "num_labels": 3}),
    "chooser": (hf_tfm.TfmBertForMultipleChoice, {**BERT, "pooler": "tanh_relu"}),
    "reader": (hf_tfm.TfmBertForQuestionAnswering, BERT),
    "causal": (hf_tfm.TfmGPTForCausalLM, GPT),
    "post-norm": (hf_tfm.TfmGPTForCausalLM, {**GPT, "norm_first": False, "hidden_act": "gelu"}),
    "causal-classifier": (hf_tfm.TfmGPTForSequenceClassification, {**GPT, "num_labels": 3}),
    "detector": (hf_tfm.TfmDetrForObjectDetection, DETR),
    "learned": (hf_tfm.TfmDetrForObjectDetection, {**DETR, **LEARNED, **CLUSTERED}),
    "panoptic": (hf_tfm.TfmDetrForPanopticSegmentation, DETR),
    "detector-vit": (
        hf_tfm.TfmDetrForObjectDetection,
        {**DETR, "backbone_config": {**IMAGE, "model_type": "tfm_vit"}, "backbone_norm": "batch"},
    ),
}
PIPELINES = {"masked": "fill-mask", "causal": "text-generation", "classifier": "text-classification"}
# Files saved with a model, besides its configuration and modeling files.
NEEDED = {
    "tfm_vit": {"patches.py", "positions.py"},
    "tfm_mae": {"patches.py", "positions.py", "configuration_vit.py", "modeling_vit.py"},
    "tfm_bert": {"attention.py", "blocks.py", "cross_entropy.py", "bert_parts.py", "sequence_positions.py", "ode.py"},
    "tfm_gpt": {"attention.py", "blocks.py", "cross_entropy.py"},
    "tfm_detr": {"detr_stacks.py", "mask_head.py", "set_loss.py", "boxes.py", "modeling_vit.py", "modeling_swin.py"},
}


@dataclass
class Case:
    """A model, and keyword arguments for each Auto class that loads it."""

    model: PreTrainedModel
    inputs: dict[str, dict[str, Any]]


def make_case(name: str) -> Case:
    """A model of `VARIANTS` or `CLASSES` with inputs, and with labels if its head has a loss."""
    if name in VARIANTS:
        kind, fields = VARIANTS[name]
        change = randomize if name in ("vit", "hybrid", "mae") else drawn
        model = change(kind(kind.config_class(**fields)))
        plain = variant_inputs(model)
    else:
        model, plain = tiny(name), inputs_of(name)
    class_name = type(model).__name__
    auto_classes = model.config_class.auto_classes
    heads = [auto for auto, path in auto_classes.items() if path.rpartition(".")[2] == class_name]
    several = {key: value[None] for key, value in plain.items()}
    given = {
        auto: {**(several if auto == "AutoModelForMultipleChoice" else plain), **labels_of(auto, plain)}
        for auto in heads
    }
    backbone = {"AutoBackbone": plain} if "AutoBackbone" in auto_classes else {}
    return Case(model, {"AutoModel": plain, **given, **backbone})


def variant_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs of a model of `VARIANTS`: padded texts, padded images, or images larger than its image_size."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids":
        ids = torch.randint(1, 50, (2, 11), generator=generator)
        mask = torch.ones_like(ids)
        ids[1, 7:], mask[1, 7:] = 0, 0
        return {"input_ids": ids, "attention_mask": mask}
    if hasattr(model.config, "num_queries"):
        mask = torch.ones(2, 64, 96, dtype=torch.int64)
        mask[1, 40:] = 0
        return {"pixel_values": torch.randn(2, 3, 64, 96, generator=generator), "pixel_mask": mask}
    images = {"pixel_values": torch.randn(2, 3, 64, 64, generator=generator)}
    return (
        {**images, "noise": torch.rand(2, 256, generator=generator)} if hasattr(model.config, "mask_ratio") else images
    )


def uncovered() -> list[str]:
    """The first name in `CLASSES` of every class with a head that is not in `VARIANTS`."""
    names = {}
    for name, (class_name, _) in CLASSES.items():
        names.setdefault(class_name, name)
    tested = {kind.__name__ for kind, _ in VARIANTS.values()}
    paths = [
        path for family in FAMILIES for auto, path in family.auto_classes.items() if auto.startswith("AutoModelFor")
    ]
    heads = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    return [names[head] for head in heads if head not in tested]


NAMES = (*VARIANTS, *uncovered())
SLOW = (
    *("hybrid", "compressed-int8", "tagger", "chooser", "reader", "post-norm", "causal-classifier", "detector"),
    "learned",
)
# Models that are also loaded from a folder, and after having been pushed by a process without the package.
EVERYWHERE = ("vit", "causal", "panoptic", "transformer")
EVERY = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NAMES]
LOADED = [
    pytest.param(
        repo, name, marks=pytest.mark.slow if name in SLOW or (repo != "user/{}" and name not in EVERYWHERE) else ()
    )
    for repo in ("user/{}", "user/{}-again", "{}-folder")
    for name in NAMES
]

# Runs in both processes: outputs of the Auto classes for a repository or folder, as JSON with exact values.
OUTPUTS = """
import json
import torch
import transformers

torch.set_num_threads(1)


@torch.no_grad()
def outputs(repo, given, **code):
    found = {}
    for name, inputs in given.items():
        if name == "AutoBackbone":
            # Random weights: `from_pretrained` of this Auto class reads repositories alone.
            config = transformers.AutoConfig.from_pretrained(repo, **code)
            model = transformers.AutoBackbone.from_config(config, **code)
            found[name] = [type(model).__name__, 0, [list(x.shape) for x in model(inputs["pixel_values"])[0]]]
            continue
        model = getattr(transformers, name).from_pretrained(repo, **code).eval()
        output = model(**inputs)
        # A base model has a random pooler if that of its head has none.
        kept = {key: value for key, value in output.items() if key != "pooler_output"}
        values = {key: value.tolist() for key, value in kept.items() if isinstance(value, torch.Tensor)}
        if name == "AutoModelForCausalLM":
            values["generated"] = model.generate(inputs["input_ids"][:1, :5], max_new_tokens=8, num_beams=2).tolist()
        frozen = sum(not parameter.requires_grad for parameter in model.parameters())
        found[name] = [type(model).__name__, frozen, values]
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
    repo, given = f"user/{name}", torch.load(f"../{name}/inputs.pt")
    found[repo] = outputs(repo, given, **code)
    getattr(transformers, head).from_pretrained(repo, **code).push_to_hub(f"{repo}-again")
    for again, path in ((f"{repo}-again", f"{repo}-again"), (f"{name}-folder", f"../{name}")):
        if again in LOADED:
            found[again] = outputs(path, given, **code)
for name, task in PIPELINES.items():
    options = {"max_new_tokens": 5, "do_sample": False} if task == "text-generation" else {"top_k": 3}
    found["pipelines"][name] = transformers.pipeline(task, f"../{name}", **code)("the [MASK] one", **options)
inputs = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
backbone = transformers.AutoBackbone.from_pretrained("user/vit", **code).eval()
found["backbone"] = [features.tolist() for features in backbone(inputs).feature_maps]
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
def results(request, tmp_path_factory):
    """Results of the processes, the folder of the models of the selected tests, the Hub, and the inputs by name."""
    folder, given, heads = tmp_path_factory.mktemp("models"), {}, {}
    items = [item for item in request.session.items if item.getparent(pytest.Module) is request.node]
    selected = [item.callspec.params for item in items if hasattr(item, "callspec")]
    names = {"vit", *PIPELINES, *(params["name"] for params in selected)}
    loaded = {params["repo"].format(params["name"]) for params in selected if "repo" in params}
    for name in filter(names.__contains__, NAMES):
        one = make_case(name)
        one.model.save_pretrained(folder / name)
        if name in PIPELINES:
            tokenizer().save_pretrained(folder / name)
        torch.save(one.inputs, folder / name / "inputs.pt")
        given[name], heads[name] = one.inputs, type(one.model)._auto_class
    tables = f"HEADS, PIPELINES, LOADED = {heads!r}, {PIPELINES!r}, {loaded!r}\n"
    with HubServer() as hub:
        run_python(tables + PUSH, folder, hub.environment(folder / "home-1"))
        clean = folder / "clean"
        clean.mkdir()
        found = run_python(tables + OUTPUTS + LOAD, clean, hub.environment(folder / "home-2"), without_package=True)
        yield {"folder": folder, "found": found, "hub": hub, "inputs": given}


@pytest.fixture(autouse=True)
def one_thread():
    """As in the other processes, because the number of threads affects the order of summation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected(results):
    """Outputs of this process, which has the package, by name."""
    namespace: dict[str, Any] = {}
    exec(OUTPUTS, namespace)
    return {
        name: namespace["outputs"](str(results["folder"] / name), results["inputs"][name])
        for name in results["inputs"]
    }


@pytest.mark.parametrize(("repo", "name"), LOADED)
def test_loads_bit_equal_without_the_package(results, expected, name, repo):
    """Including losses, so matching works without the package; frozen parameters stay frozen."""
    found = results["found"][repo.format(name)]
    assert found.keys() == expected[name].keys() and len(found) >= 2
    for auto_class, value in expected[name].items():
        assert found[auto_class] == json.loads(json.dumps(value)) and value[2], auto_class
        if "labels" in results["inputs"][name][auto_class]:
            assert value[2]["loss"] > 0
        if auto_class == "AutoModelForCausalLM":
            assert value[2]["generated"]


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("detector", "learned")), "panoptic"]
)
def test_detectors_keep_frozen_parameters(expected, name):
    assert all(frozen > 0 for _, frozen, _ in expected[name].values())
    kinds = {"AutoModelForUniversalSegmentation", "AutoModelForImageSegmentation"}
    kinds = kinds if name == "panoptic" else {"AutoModelForObjectDetection"}
    assert expected[name].keys() == {"AutoModel", *kinds}
    for kind in kinds:
        values = expected[name][kind][2]
        assert {"loss", "logits", "pred_boxes"} <= values.keys() and ("pred_masks" in values) == (name == "panoptic")


@torch.no_grad()
def test_backbone_is_loaded_with_its_weights(results):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = hf_tfm.TfmViTBackbone.from_pretrained(results["folder"] / "vit").eval()
    expected = model(images).feature_maps
    assert results["found"]["backbone"] == [features.tolist() for features in expected] and len(expected) == 2


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_give_the_same_results_without_the_package(results, name):
    options = {"max_new_tokens": 5, "do_sample": False} if name == "causal" else {"top_k": 3}
    expected = pipeline(PIPELINES[name], str(results["folder"] / name))("the [MASK] one", **options)
    assert expected and json.loads(json.dumps(expected)) == results["found"]["pipelines"][name]


@pytest.mark.parametrize("name", EVERY)
def test_pushed_code_is_unchanged(results, name):
    first, again = (
        {
            path: file.content
            for path, file in results["hub"].repositories[f"models/user/{name}{tail}"].files.items()
            if path.endswith(".py")
        }
        for tail in ("", "-again")
    )
    config = json.loads(results["hub"].repositories[f"models/user/{name}-again"].files["config.json"].content)
    own = {f"{path.partition('.')[0]}.py" for path in config["auto_map"].values()}
    assert first == again and own | NEEDED.get(config["model_type"], set()) <= first.keys()
    family = next(family for family in FAMILIES if family.config.model_type == config["model_type"])
    assert config["auto_map"] == family.auto_classes


def test_every_head_is_covered():
    """One model for each class with a head; those without a head are loaded along with them."""
    tested = {(VARIANTS[name][0].__name__ if name in VARIANTS else CLASSES[name][0]) for name in NAMES}
    for family in FAMILIES:
        heads = {path.split(".")[1] for auto, path in family.auto_classes.items() if auto.startswith("AutoModelFor")}
        assert heads and heads <= tested
        assert AutoConfig.for_model(family.config.model_type).__class__ is family.config
