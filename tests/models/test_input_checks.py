"""Invalid arguments of forward give a one-line error that names the argument, the value and the limit."""

import pytest
import torch
from head_cases import CASES, collate
from tiny_detr import tiny_detr
from torch import nn

import hf_tfm
from hf_tfm.models.input_checks import look_up, readable, require_numbers, require_range

BERT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 8,
    "num_labels": 3,
}
VIT = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": 3,
}
SEQ2SEQ = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}
IDS = torch.full((2, 4), 7)
MODELS = {
    "masked": (hf_tfm.TfmBertForMaskedLM, BERT),
    "pretraining": (hf_tfm.TfmBertForPreTraining, BERT),
    "classifier": (hf_tfm.TfmBertForSequenceClassification, BERT),
    "regression": (hf_tfm.TfmBertForSequenceClassification, {**BERT, "num_labels": 1}),
    "many": (
        hf_tfm.TfmBertForSequenceClassification,
        {**BERT, "problem_type": "multi_label_classification"},
    ),
    "tagger": (hf_tfm.TfmBertForTokenClassification, BERT),
    "chooser": (hf_tfm.TfmBertForMultipleChoice, BERT),
    "reader": (hf_tfm.TfmBertForQuestionAnswering, BERT),
    "causal": (hf_tfm.TfmGPTForCausalLM, {**BERT, "bos_token_id": 1, "eos_token_id": 2}),
    "vit": (hf_tfm.TfmViTForImageClassification, VIT),
    "seq2seq": (hf_tfm.TfmTransformerForConditionalGeneration, SEQ2SEQ),
}


def model(name: str):
    model_class, fields = MODELS[name]
    return model_class(model_class.config_class(**fields))


def wrong(value, shape=(2, 4), dtype=torch.int64):
    values = torch.full(shape, 1, dtype=dtype)
    values.view(-1)[-1] = value
    return values


TEXT_CASES = [
    ("masked", {"labels": wrong(20)}, r"labels must be in \[0, 20\), the vocab_size, or -100 for none; got 20"),
    ("masked", {"labels": wrong(-1)}, "labels must be .* got -1"),
    ("masked", {"labels": wrong(20), "return_logits": False}, "labels must be .* got 20"),
    ("masked", {"labels": wrong(1, (2, 3))}, r"labels must have shape \(2, 4\), got \(2, 3\)"),
    ("masked", {"input_ids": wrong(20)}, r"input_ids must be in \[0, 20\), the vocab_size; got 20"),
    ("masked", {"input_ids": wrong(-1)}, "input_ids must be .* got -1"),
    ("masked", {"input_ids": IDS[:0]}, r"input_ids must not be empty, got shape \(0, 4\)"),
    ("masked", {"input_ids": IDS[:, :0]}, r"input_ids must not be empty, got shape \(2, 0\)"),
    ("masked", {"input_ids": IDS[0]}, r"input_ids must have shape \(batch, tokens\), got \(4,\)"),
    ("masked", {"token_type_ids": wrong(2)}, r"token_type_ids must be in \[0, 2\), the type_vocab_size; got 2"),
    ("masked", {"position_ids": wrong(8)}, r"position_ids must be in \[0, 8\), the max_position_embeddings; got 8"),
    ("masked", {"attention_mask": torch.ones(2, 3)}, r"attention_mask must have shape \(2, 4\), got \(2, 3\)"),
    ("pretraining", {"next_sentence_label": wrong(2, (2,))}, r"next_sentence_label must be in \[0, 2\).* got 2"),
    ("classifier", {"labels": wrong(3, (2,))}, r"labels must be in \[0, 3\), the number of classes, or -100 .* got 3"),
    ("classifier", {"labels": wrong(-1, (2,))}, "labels must be .* got -1"),
    ("classifier", {"labels": wrong(1, (3,))}, r"labels must have 2 elements, got shape \(3,\)"),
    ("regression", {"labels": wrong(torch.nan, (2,), torch.float32)}, "labels must be finite.* got nan"),
    ("regression", {"labels": wrong(torch.inf, (2,), torch.float32)}, "labels must be finite.* got inf"),
    ("many", {"labels": wrong(1.5, (2, 3), torch.float32)}, r"labels must be in \[0, 1\], or -100 for none; got 1.5"),
    ("many", {"labels": wrong(1, (2,), torch.float32)}, r"labels must have shape \(2, 3\) for problem_type=multi"),
    ("tagger", {"labels": wrong(3)}, r"labels must be in \[0, 3\).* got 3"),
    ("tagger", {"labels": wrong(1, (2,))}, r"labels must have shape \(2, 4\), got \(2,\)"),
    ("chooser", {"input_ids": IDS[:, None].repeat(1, 3, 1), "labels": wrong(3, (2,))}, r"labels .*\[0, 3\).* got 3"),
    ("reader", {"start_positions": wrong(-1, (2,)), "end_positions": wrong(1, (2,))}, "start_positions .* got -1"),
    ("reader", {"start_positions": wrong(1, (2,))}, "give start_positions and end_positions, or neither"),
    ("causal", {"labels": wrong(20)}, r"labels must be in \[0, 20\).* got 20"),
    ("causal", {"shift_labels": wrong(20)}, r"shift_labels must be in \[0, 20\).* got 20"),
    ("causal", {"input_ids": wrong(20)}, r"input_ids must be in \[0, 20\).* got 20"),
    ("causal", {"input_ids": IDS[:, :0]}, "input_ids must not be empty"),
    ("causal", {"position_ids": wrong(8)}, r"position_ids must be in \[0, 8\).* got 8"),
    ("seq2seq", {"labels": wrong(20)}, r"labels must be in \[0, 20\).* got 20"),
    ("seq2seq", {"labels": wrong(-1)}, "labels must be .* got -1"),
    ("seq2seq", {"labels": IDS[:, :0]}, "labels must not be empty"),
    ("seq2seq", {"decoder_input_ids": wrong(20)}, r"decoder_input_ids must be in \[0, 20\).* got 20"),
    ("seq2seq", {"decoder_input_ids": IDS[:, :3], "labels": IDS}, r"labels must have shape \(2, 3\), got \(2, 4\)"),
    ("seq2seq", {"input_ids": wrong(-5), "labels": IDS}, "input_ids must be .* got -5"),
    ("seq2seq", {"attention_mask": torch.ones(2, 3), "labels": IDS}, r"attention_mask must have shape \(2, 4\)"),
]


@pytest.mark.parametrize(("name", "given", "message"), TEXT_CASES)
def test_invalid_text_inputs(name, given, message):
    with pytest.raises(ValueError, match=message):
        model(name)(**{"input_ids": IDS, **given})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), r"labels must be in \[0, 3\).* got 3"),
        (torch.tensor([-1, 0]), "labels must be .* got -1"),
        (torch.tensor([0, 1, 2]), "labels must have 2 elements"),
    ],
)
def test_invalid_image_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        model("vit")(torch.rand(2, 3, 8, 8), labels=labels)


@pytest.mark.parametrize("name", ["masked", "classifier", "tagger", "causal", "seq2seq"])
def test_labels_must_be_tensors(name):
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        model(name)(input_ids=IDS, labels=["a", "b"])


def test_small_integer_dtypes_are_accepted_as_classes():
    """As from a loader that reads uint8 labels."""
    classifier = model("classifier").eval()
    expected = classifier(input_ids=IDS, labels=torch.tensor([0, 2])).loss
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert classifier(input_ids=IDS, labels=torch.tensor([0, 2], dtype=dtype)).loss == expected


def test_truncated_answers_are_ignored_and_bad_positions_refused():
    reader = model("reader").eval()
    given = {"input_ids": IDS, "start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([2, 99])}
    first = {name: values[:1] for name, values in given.items()}
    assert reader(**given).loss.item() == pytest.approx(reader(**first).loss.item(), rel=1e-5)


def test_values_are_not_read_where_that_is_slow_or_impossible():
    """On other devices, in graphs, and under torch's function transforms."""
    assert readable(IDS) and not readable(IDS.to("meta"))
    require_range("x", torch.full((2,), 9).to("meta"), 3, "limit")
    seen = []

    def inside(values):
        seen.append(readable(values))
        require_range("x", values, 3, "limit")
        require_numbers("x", values.float(), 0, 1)
        return values + 1

    assert torch.equal(torch.func.vmap(inside)(torch.full((2, 1), 9)), torch.full((2, 1), 10))
    torch.compile(inside, fullgraph=True, backend="eager")(torch.full((2,), 9))
    torch.jit.trace(inside, torch.full((2,), 9), check_trace=False)
    assert seen == [False] * 3


def test_embedding_without_a_size_raises_its_own_error():
    class Table(nn.Module):
        def forward(self, indices):
            raise IndexError("its own")

    with pytest.raises(IndexError, match="its own"):
        look_up(Table(), IDS, "input_ids", "vocab_size")


@pytest.mark.parametrize("name", ["vit", "autoencoder", "detection", "panoptic"])
def test_unknown_arguments_of_image_models(name):
    """Misspelt arguments are refused; those of transformers and of custom attention backends are passed on."""
    case = CASES[name]
    image_model, batch = case.model().eval(), collate(case.rows()[:2])
    for wrong in ("lables", "pixel_value", "head_mask"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'"):
            image_model(**batch, **{wrong: 1})
    image_model(**batch, output_hidden_states=True, output_attentions=True, return_dict=False)
    image_model.config._attn_implementation = "my_own"
    with pytest.raises(KeyError, match="my_own"):  # the lookup shows that the argument was passed on
        image_model(**batch, temperature=1)


@pytest.mark.parametrize("name", ["detection", "panoptic"])
def test_input_embeddings_of_a_detector(name):
    """PEFT and gradient checkpointing use the layer that embeds the input."""
    detector = CASES[name].model()
    assert isinstance(detector.get_input_embeddings(), nn.Conv2d)
    detector.enable_input_require_grads()
    assert detector(**collate(CASES[name].rows()[:2])).loss.requires_grad


def test_detr_ignores_standard_decoder_inputs():
    """Like transformers' DETR, whose common tests pass them. A misspelt argument is still refused."""
    model = tiny_detr()
    images = torch.zeros(1, 3, 64, 64)
    expected = model(images).logits
    torch.testing.assert_close(model(images, decoder_input_ids=torch.zeros(1, 3, dtype=torch.long)).logits, expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'pixel_maks'"):
        model(images, pixel_maks=None)
