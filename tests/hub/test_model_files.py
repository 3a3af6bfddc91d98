"""Files beside the weights of a saved model: JSON mappings, and image processors by which pixels stay finite."""

import json

import pytest

from hf_tfm.hub.loading import LoadingError, load_config, load_image_processor, load_tokenizer

GOOD = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "image_std": [0.5, 0.5, 0.5]}


def saved(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_std", [0, 0, 0]),
        ("image_std", ["a", 1, 1]),
        ("image_mean", [float("nan"), 0, 0]),
        ("size", {"height": -8, "width": 8}),
        ("crop_size", 0),
        ("rescale_factor", 0),
        ("rescale_factor", "x"),
        ("resample", 99),
    ],
)
def test_image_processors_that_spoil_every_image_are_refused_by_field(tmp_path, field, value):
    folder = saved(tmp_path, "preprocessor_config.json", {**GOOD, field: value})
    with pytest.raises(LoadingError, match=f"{field} of its preprocessor_config.json must be"):
        load_image_processor(folder)


def test_an_image_processor_without_these_faults_is_loaded(tmp_path):
    folder = saved(tmp_path, "preprocessor_config.json", {**GOOD, "crop_size": None, "resample": 3, "size": 16})
    assert load_image_processor(folder).size["height"] == 16


@pytest.mark.parametrize("content", ["[]", "{", "5"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_tokenizer_files_that_are_no_mappings_are_named(tmp_path, name, content):
    with pytest.raises(LoadingError, match=f"{name} (must be a mapping|is not a valid JSON file)"):
        load_tokenizer(saved(tmp_path, name, content))


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_image_processor])
def test_a_revision_of_a_local_folder_is_refused(tmp_path, load):
    with pytest.raises(LoadingError, match='revision "v1" can be given of a model on the Hub alone'):
        load(str(tmp_path), revision="v1")
