"""Files next to the weights of a saved model: valid JSON, and image processors that give finite pixels."""

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
def test_image_processors_with_invalid_fields_are_refused(tmp_path, field, value):
    folder = saved(tmp_path, "preprocessor_config.json", {**GOOD, field: value})
    with pytest.raises(LoadingError, match=f"{field} of its preprocessor_config.json must be"):
        load_image_processor(folder)


def test_valid_image_processor_is_loaded(tmp_path):
    folder = saved(tmp_path, "preprocessor_config.json", {**GOOD, "crop_size": None, "resample": 3, "size": 16})
    assert load_image_processor(folder).size["height"] == 16


@pytest.mark.parametrize("content", ["[]", "{", "5"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_invalid_tokenizer_files_are_named(tmp_path, name, content):
    with pytest.raises(LoadingError, match=f"{name} (must be a mapping|is not a valid JSON file)"):
        load_tokenizer(saved(tmp_path, name, content))


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_image_processor])
def test_revision_of_a_local_folder_is_refused(tmp_path, load):
    with pytest.raises(LoadingError, match='revision "v1" applies only to a model on the Hub'):
        load(str(tmp_path), revision="v1")


ODD = {"id2label": {"1": "ant", "7": "bee"}, "label2id": {"ant": 1, "bee": 7}}


@pytest.mark.parametrize(
    ("model_type", "saved_as"),
    [("bert", "BertModel"), ("bert", "BertForMaskedLM"), ("gpt2", "GPT2LMHeadModel"), ("marian", "MarianMTModel")],
)
def test_models_without_classes_may_have_odd_id2label(tmp_path, model_type, saved_as):
    config = {"model_type": model_type, "architectures": [saved_as], **ODD}
    assert load_config(saved(tmp_path, "config.json", config)).id2label == {1: "ant", 7: "bee"}


@pytest.mark.parametrize(
    ("model_type", "saved_as"),
    [("bert", "BertForSequenceClassification"), ("vit", "ViTForImageClassification"), ("detr", "DetrForSegmentation")],
)
def test_odd_id2label_is_refused_where_it_is_used(tmp_path, model_type, saved_as):
    folder = saved(tmp_path, "config.json", {"model_type": model_type, "architectures": [saved_as], **ODD})
    with pytest.raises(LoadingError, match=r'id2label of its config\.json must number 2 names from 0 on, got "7"'):
        load_config(folder, "teacher")
    assert load_config(folder, "model_name_or_path").num_labels == 2  # which takes its classes from the data


def test_teacher_without_classes_may_have_odd_id2label(tmp_path):
    from transformers import GPT2Config

    from hf_tfm.distillation.model_spec import label_names

    assert label_names(GPT2Config(id2label={1: "ant", 7: "bee"})) is None
    assert label_names(GPT2Config(id2label={0: "ant", 1: "bee"})) == ("ant", "bee")


@pytest.mark.parametrize("content", [{}, {"model": 3}])
def test_tokenizer_file_without_a_model_is_named(tmp_path, content):
    with pytest.raises(LoadingError, match=r'its tokenizer\.json has no mapping "model", so it is not a saved'):
        load_tokenizer(saved(tmp_path, "tokenizer.json", content))
