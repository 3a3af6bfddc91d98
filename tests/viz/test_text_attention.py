"""Attention of encoders and decoders on a text, alone and side by side."""

import matplotlib.image
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from hf_tfm import TfmBertConfig, TfmBertModel, TfmGPTConfig, TfmGPTModel
from hf_tfm.data.vocabulary import train_bytes, train_wordpiece
from hf_tfm.show import show_attention
from hf_tfm.viz import plot_beside, plot_text_attention, text_attention_maps
from hf_tfm.viz.grid import Grid

TEXT = "the quick fox jumped over the lazy dog"
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([TEXT] * 3, 100)


def bert(tokenizer, layers: int, kind=TfmBertModel, config=TfmBertConfig):
    torch.manual_seed(layers)
    return kind(config(vocab_size=len(tokenizer), num_hidden_layers=layers, **SMALL))


@pytest.fixture
def drawn(monkeypatch) -> list[Grid]:
    """The grids that are drawn, in order."""
    grids = []
    save = Grid.save
    monkeypatch.setattr(Grid, "save", lambda grid, path: grids.append(grid) or save(grid, path))
    return grids


@pytest.mark.parametrize(("kind", "config"), [(TfmBertModel, TfmBertConfig), (BertModel, BertConfig)])
def test_maps_of_an_encoder(kind, config, tokenizer):
    model = bert(tokenizer, 3, kind, config).train()
    backend = model.config._attn_implementation
    found = text_attention_maps(model, tokenizer, TEXT, "a fox")
    assert found.tokens[0] == "[CLS]" and found.tokens.count("[SEP]") == 2 and found.text == f"{TEXT} | a fox"
    T = len(found.tokens)
    assert found.maps.shape == (3, 2, T, T)
    np.testing.assert_allclose(found.maps.sum(axis=-1), 1.0, rtol=1e-5)
    assert model.training and model.config._attn_implementation == backend


def test_decoder_attends_only_backwards():
    tokenizer = train_bytes([TEXT] * 3, 300)
    torch.manual_seed(0)
    model = TfmGPTModel(TfmGPTConfig.of_size("tiny", vocab_size=len(tokenizer), num_hidden_layers=2))
    found = text_attention_maps(model, tokenizer, TEXT)
    assert found.maps.shape[:2] == (2, 4)
    assert not np.triu(found.maps, 1).any()


def test_plot(tokenizer, drawn, tmp_path):
    found = text_attention_maps(bert(tokenizer, 3), tokenizer, TEXT)
    path = plot_text_attention(found, tmp_path / "text.png", layers=[-1, 0], heads=[1])
    assert matplotlib.image.imread(path).ndim == 3
    (grid,) = drawn
    np.testing.assert_array_equal(grid.panels, found.maps[[2, 0]][:, [1]])
    assert grid.rows == ["layer 2", "layer 0"] and grid.columns == ["head 1"]


def test_teacher_and_student_side_by_side(tokenizer, drawn, tmp_path):
    teacher, student = (text_attention_maps(bert(tokenizer, n), tokenizer, TEXT) for n in (6, 2))
    plot_beside(teacher, student, tmp_path / "both.png")
    plot_beside(teacher, student, tmp_path / "heads.png", layers=[1], heads=[0])
    mean, heads = drawn
    assert mean.rows == ["layers 2, 0", "layers 5, 1"] and mean.columns == ["left, mean", "right, mean"]
    assert heads.columns == ["left, 0", "right, 0"]
    np.testing.assert_allclose(mean.panels[1, 0], teacher.maps[5].mean(axis=0))
    np.testing.assert_allclose(mean.panels[0, 1], student.maps[0].mean(axis=0))
    np.testing.assert_array_equal(heads.panels, np.stack([teacher.maps[5, 0], student.maps[1, 0]])[None])


def test_invalid_input_is_refused(tokenizer, tmp_path):
    model = bert(tokenizer, 1)
    with pytest.raises(ValueError, match="text must hold at least one word"):
        text_attention_maps(model, tokenizer, " ")
    with pytest.raises(ValueError, match="text must have at most 32 tokens"):
        text_attention_maps(model, tokenizer, TEXT * 9)
    other = train_wordpiece(["other words"], 40)
    torch.manual_seed(0)
    one = text_attention_maps(model, tokenizer, TEXT)
    two = text_attention_maps(bert(other, 1), other, TEXT)
    with pytest.raises(ValueError, match="must read the same tokens"):
        plot_beside(one, two, tmp_path / "x.png")


def test_the_command(tokenizer, tmp_path, capsys):
    for name, layers in (("teacher", 4), ("student", 2)):
        bert(tokenizer, layers).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    show_attention(
        str(tmp_path / "student"), text=TEXT, beside=str(tmp_path / "teacher"), output_dir=str(tmp_path / "out")
    )
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "text.png")
    with pytest.raises(ValueError, match="target is for a translation model"):
        show_attention(str(tmp_path / "student"), text=TEXT, target="x")
