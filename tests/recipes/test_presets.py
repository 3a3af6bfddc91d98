"""Every preset and launch file parses and states where its numbers come from."""

import dataclasses
import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from recipe_helpers import arguments_of

from hf_tfm.models.configuration_transformer import SIZES
from hf_tfm.options import parse_arguments
from hf_tfm.tasks.text_classification import PER_TASK
from hf_tfm.tasks.translation import METRICS, build_config

RECIPES = Path(__file__).parents[2] / "recipes"
PRESETS = sorted(RECIPES.glob("presets/*/*.yaml"))
LAUNCH = sorted(set(RECIPES.glob("launch/*.yaml")) - {RECIPES / "launch" / "trainjob.yaml"})


def test_every_recipe_has_presets():
    tools = {"distill_cache", "augment_texts"}  # they train nothing themselves
    recipes = {path.stem for path in RECIPES.glob("*.py")} - tools
    assert {path.parent.name for path in PRESETS} == recipes
    assert all((RECIPES / "presets" / recipe / "quickstart.yaml").is_file() for recipe in recipes)
    folders = [yaml.safe_load(path.read_text())["output_dir"] for path in PRESETS]
    assert len(set(folders)) == len(folders), "two presets would write to one folder"


def assert_within(part, whole):
    """Every value of a preset is parsed as written; groups of options may have more fields, and the model those that a
    pretrained backbone needs."""
    for key, value in part.items():
        if isinstance(value, dict) and key != "model":
            assert_within(value, whole[key])
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for one, other in zip(value, whole[key], strict=True):
                assert_within(one, other)
        elif isinstance(value, str) and whole.get("task") and key in PER_TASK:
            assert whole[key] == value.replace("{task}", whole["task"])
        elif key == "model":
            more = {name: whole[key][name] for name in ("backbone", "backbone_norm") if name in whole[key]}
            assert whole[key] == {**more, **value}
        else:
            assert whole[key] == value, key


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_preset_parses(preset):
    recipe = RECIPES / f"{preset.parent.name}.py"
    kind = arguments_of(recipe)
    by_name = parse_arguments(kind, recipe, ["--config", preset.stem])
    assert by_name == parse_arguments(kind, recipe, ["--config", str(preset)])
    content = yaml.safe_load(preset.read_text())
    written = dataclasses.asdict(by_name)
    assert_within(json.loads(json.dumps(content)), json.loads(json.dumps(written)))
    assert by_name.output_dir.startswith("runs/")
    assert preset.read_text().startswith("# ")  # description, cost and expected result


@pytest.mark.parametrize(("name", "parameters"), [("wmt14_base", 65e6), ("wmt14_big", 213e6)])
def test_paper_presets_have_the_published_sizes(name, parameters):
    """Table 3 of Vaswani et al. 2017, in millions."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    recipe = RECIPES / "translation_train.py"
    content = yaml.safe_load((RECIPES / "presets" / recipe.stem / f"{name}.yaml").read_text())
    args = parse_arguments(arguments_of(recipe), recipe, ["--config", name])
    config = build_config(dataclasses.replace(args, model={**args.model, "vocab_size": content["vocab_size"]}))
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.03)
    peak = config.hidden_size**-0.5 * content["warmup_steps"] ** -0.5  # equation 3
    assert content["learning_rate"] == pytest.approx(peak, rel=0.01)


def test_sizes_are_the_known_ones():
    hints = get_type_hints(arguments_of(RECIPES / "translation_train.py"))
    (metric,) = get_args(hints["metrics"])
    assert set(get_args(metric)) == set(METRICS)
    args = parse_arguments(
        arguments_of(RECIPES / "translation_train.py"), RECIPES / "translation_train.py", ["--config", "quickstart"]
    )
    with pytest.raises(ValueError, match=f"size must be one of {', '.join(SIZES)}, got"):
        dataclasses.replace(args, size="huge")


@pytest.mark.parametrize("file", LAUNCH, ids=lambda path: path.stem)
def test_launch_files_are_valid_for_accelerate(file):
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    content = yaml.safe_load(file.read_text())
    assert all(getattr(config, name) == value for name, value in content.items() if name != "distributed_type")
    assert config.distributed_type.value == content["distributed_type"]


def test_launch_files_state_their_command():
    for file in LAUNCH:
        assert file.read_text().startswith(f"# accelerate launch --config_file recipes/launch/{file.name} ")
