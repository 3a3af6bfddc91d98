"""DETRs carry their code: they load where the package is not installed, and are pushed on from there."""

import json

import pytest
import torch
from detr_helpers import TINY, drawn
from hub_helpers import run_python
from server import HubServer

import hf_tfm

MODELS = {
    "detector": lambda: hf_tfm.TfmDetrForObjectDetection(hf_tfm.TfmDetrConfig(**TINY)),
    "learned": lambda: hf_tfm.TfmDetrForObjectDetection(
        hf_tfm.TfmDetrConfig(
            **TINY, position_embedding_type="learned", norm_first=True, backbone_norm="group", dilation=True
        )
    ),
    "panoptic": lambda: hf_tfm.TfmDetrForPanopticSegmentation(hf_tfm.TfmDetrConfig(**TINY)),
}
HEADS = {
    "detector": ["AutoModelForObjectDetection"],
    "learned": ["AutoModelForObjectDetection"],
    "panoptic": ["AutoModelForUniversalSegmentation", "AutoModelForImageSegmentation"],
}

# Runs here and there: what the Auto classes make of a repository or folder, in JSON that keeps every bit of a number.
OUTPUTS = """
import json
import torch
import transformers

torch.set_num_threads(1)


def outputs(repo, heads, **code):
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 64, 96, dtype=torch.int64)
    mask[1, 40:] = 0
    labels = []
    for count in (2, 1):
        generator = torch.Generator().manual_seed(count)
        boxes = 0.2 + 0.3 * torch.rand(count, 4, generator=generator)
        masks = (torch.rand(count, 64, 96, generator=generator) > 0.5).float()
        labels.append({"class_labels": torch.arange(count), "boxes": boxes, "masks": masks})
    found = {}
    for name in ("AutoModel", *heads):
        model = getattr(transformers, name).from_pretrained(repo, **code).eval()
        given = {"pixel_values": images, "pixel_mask": mask}
        if name != "AutoModel":
            given["labels"] = labels
        with torch.no_grad():
            output = model(**given)
        names = ("loss", "logits", "pred_boxes", "pred_masks", "last_hidden_state")
        values = {key: output[key].tolist() for key in names if output.get(key) is not None}
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
found = {}
for name, heads in HEADS.items():
    repo = f"user/{name}"
    found[repo] = outputs(repo, heads, **code)
    getattr(transformers, heads[0]).from_pretrained(repo, **code).push_to_hub(f"{repo}-again")
    found[f"{repo}-again"] = outputs(f"{repo}-again", heads, **code)
    found[f"{name}-folder"] = outputs(f"../{name}", heads, **code)
print(json.dumps(found))
"""

PUSH = """
import transformers
import hf_tfm

for name, heads in HEADS.items():
    getattr(transformers, heads[0]).from_pretrained(name).push_to_hub(f"user/{name}")
print("{}")
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One process pushes, another one that lacks the package loads, pushes on and loads again."""
    folder = tmp_path_factory.mktemp("detr")
    heads = f"HEADS = {HEADS!r}\n"
    for name, build in MODELS.items():
        drawn(build()).save_pretrained(folder / name)
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
    """Losses too, so that matching travels; and what is frozen stays so."""
    namespace = {}
    exec(OUTPUTS, namespace)
    expected = namespace["outputs"](str(story["folder"] / name), HEADS[name])
    found = story["found"][place.format(name)]
    assert found.keys() == expected.keys() == {"AutoModel", *HEADS[name]}
    for auto_class, value in expected.items():
        assert found[auto_class] == value, auto_class
        assert value[1] > 0
    values = expected[HEADS[name][0]][2]
    assert {"loss", "logits", "pred_boxes"} <= values.keys() and ("pred_masks" in values) == (name == "panoptic")


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
    needed = {"modeling_detr.py", "detr_stacks.py", "mask_head.py", "set_loss.py", "boxes.py"}
    assert first == again and needed <= first.keys()
    config = json.loads(story["hub"].repositories[f"models/user/{name}-again"].files["config.json"].content)
    assert config["auto_map"] == hf_tfm.TfmDetrConfig.auto_classes
