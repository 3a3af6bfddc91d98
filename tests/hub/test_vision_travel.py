"""Image models carry their code: they load where the package is not installed, and are pushed on from there."""

import json

import pytest
import torch
from hub_helpers import randomize, run_python
from server import HubServer

import hf_tfm

SIZES = {
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
MODELS = {
    "vit": lambda: hf_tfm.TfmViTForImageClassification(
        hf_tfm.TfmViTConfig(**SIZES, num_labels=5, position_embedding_type="learned_2d", out_indices=[1, 2])
    ),
    "hybrid": lambda: hf_tfm.TfmViTForImageClassification(
        hf_tfm.TfmViTConfig(**{**SIZES, "patch_size": 1, "image_size": 64}, num_labels=5, backbone="resnet18")
    ),
    "mae": lambda: hf_tfm.TfmMAEForPreTraining(hf_tfm.TfmMAEConfig(**SIZES, **DECODER)),
}
HEADS = {
    "vit": "AutoModelForImageClassification",
    "hybrid": "AutoModelForImageClassification",
    "mae": "AutoModelForPreTraining",
}

# Runs here and there: what the Auto classes make of a repository or folder, in JSON that keeps every bit of a number.
OUTPUTS = """
import json
import torch
import transformers

torch.set_num_threads(1)


@torch.no_grad()
def outputs(repo, head, **code):
    config = transformers.AutoConfig.from_pretrained(repo, **code)
    inputs = {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    if hasattr(config, "mask_ratio"):
        inputs["noise"] = torch.rand(2, 256, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, value in (("AutoModel", "last_hidden_state"), (head, "logits")):
        model = getattr(transformers, name).from_pretrained(repo, **code).eval()
        found[name] = [type(model).__name__, model(**inputs)[value].tolist()]
    if "AutoBackbone" in config.auto_map:
        # Random weights: `from_pretrained` of this Auto class reads repositories alone.
        model = transformers.AutoBackbone.from_config(config, **code)
        found["AutoBackbone"] = [type(model).__name__, [list(x.shape) for x in model(inputs["pixel_values"])[0]]]
    return found
"""

LOAD = """
import transformers

try:
    import hf_tfm
    raise SystemExit("the package is importable")
except ModuleNotFoundError:
    pass
code = {"trust_remote_code": True}
found = {}
for name, head in HEADS.items():
    repo = f"user/{name}"
    found[repo] = outputs(repo, head, **code)
    getattr(transformers, head).from_pretrained(repo, **code).push_to_hub(f"{repo}-again")
    found[f"{repo}-again"] = outputs(f"{repo}-again", head, **code)
    found[f"{name}-folder"] = outputs(f"../{name}", head, **code)
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
def story(tmp_path_factory):
    """One process pushes, another one that lacks the package loads, pushes on and loads again."""
    folder = tmp_path_factory.mktemp("vision")
    heads = f"HEADS = {HEADS!r}\n"
    for name, build in MODELS.items():
        randomize(build()).save_pretrained(folder / name)
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
    assert found.keys() == expected.keys() and "AutoModel" in found
    for auto_class, value in expected.items():
        assert found[auto_class] == value, auto_class


@torch.no_grad()
def test_a_backbone_is_loaded_with_its_weights(story):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = hf_tfm.TfmViTBackbone.from_pretrained(story["folder"] / "vit").eval()
    expected = model(images).feature_maps
    assert story["found"]["backbone"] == [features.tolist() for features in expected] and len(expected) == 2


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
    assert first == again and {"patches.py", "positions.py", "configuration_vit.py", "modeling_vit.py"} <= first.keys()
    config = json.loads(story["hub"].repositories[f"models/user/{name}-again"].files["config.json"].content)
    model_class = type(MODELS[name]())
    assert config["auto_map"] == model_class.config_class.auto_classes
