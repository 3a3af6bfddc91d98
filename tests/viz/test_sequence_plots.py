"""Positions of text models compared in one picture."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

from hf_tfm import TfmBertConfig, TfmBertModel, TfmTransformerConfig, TfmTransformerModel
from hf_tfm.viz import plot_sequence_positions, sequence_similarity
from hf_tfm.viz.sequence_positions import by_distance, draw

TINY = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
STACKS = {"num_encoder_layers": 1, "num_decoder_layers": 1, "max_position_embeddings": 12}


def translator(**fields) -> TfmTransformerModel:
    torch.manual_seed(0)
    model = TfmTransformerModel(TfmTransformerConfig(**TINY, **STACKS, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "flow" in name:
                parameter.add_(torch.randn_like(parameter))
    return model


def test_each_kind_shows_what_it_changes():
    fixed = sequence_similarity(translator(), 9)
    assert list(fixed) == ["embedding"]
    table = translator().encoder.embedding.positions(torch.arange(9))
    expected = torch.nn.functional.cosine_similarity(table[:, None], table[None], dim=-1)
    np.testing.assert_allclose(fixed["embedding"], expected, atol=1e-6)
    learned = sequence_similarity(translator(position_embedding_type="learned"), 64)
    assert {label: values.shape for label, values in learned.items()} == {
        "encoder: embedding": (12, 12),
        "decoder: embedding": (12, 12),
    }
    rotary = sequence_similarity(translator(position_embedding_type="rotary"), 9)["score of equal query and key"]
    expected = [np.mean([np.cos(distance / 10000 ** (2 * i / 8)) for i in range(4)]) for distance in range(9)]
    np.testing.assert_allclose(by_distance(rotary), expected, atol=1e-6)
    alibi = sequence_similarity(translator(position_embedding_type="alibi"), 9)
    for label, slope in {"factor, first head": 2.0**-4, "factor, last head": 2.0**-8}.items():
        np.testing.assert_allclose(by_distance(alibi[label]), np.exp(-slope * np.arange(9)), atol=1e-6)
    floater = sequence_similarity(translator(position_embedding_type="floater"), 9)
    biases = [f"biases of {name}" for name in ("queries", "keys", "values")]
    assert list(floater) == ["encoder: embedding", *(f"{s}: {b}" for s in ("encoder", "decoder") for b in biases)]
    assert all(np.allclose(np.diagonal(values), 1, atol=1e-5) for values in floater.values())


def test_picture_of_several_models(tmp_path):
    bert = TfmBertModel(TfmBertConfig(**TINY, num_hidden_layers=1))
    stock = BertModel(BertConfig(**TINY, num_hidden_layers=1))
    models = {"fixed": translator(), "bert": bert, "stock": stock}
    assert plot_sequence_positions(models, tmp_path / "new" / "positions.png", 8).is_file()
    figure = draw({name: sequence_similarity(model, 8) for name, model in models.items()})
    assert [len(ax.images) for ax in figure.axes] == [0, 1, 0, 1, 0, 1]
    np.testing.assert_array_equal(figure.axes[3].images[0].get_array(), sequence_similarity(bert, 8)["embedding"])


def test_models_without_such_positions_are_refused():
    swin = SwinModel(SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[1], window_size=2))
    with pytest.raises(ValueError, match="SwinModel has no positions that can be shown"):
        sequence_similarity(swin, 8)
