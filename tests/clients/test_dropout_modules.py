"""Tools that disable dropout, as trl does to compare a policy with its reference, find all of it."""

import pytest
import torch
from every_class import inputs_of, tiny
from torch import nn

RATES = {
    "transformer": ("dropout", "attention_dropout", "activation_dropout"),
    "rnn_seq2seq": ("dropout",),
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "gpt": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "vit": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}


@pytest.mark.parametrize("name", RATES)
@torch.no_grad()
def test_disabling_dropout_modules_disables_all_dropout(name):
    model = tiny(name, **dict.fromkeys(RATES[name], 0.4))
    expected = model(**inputs_of(name)).logits
    model.train()
    assert not torch.allclose(model(**inputs_of(name)).logits, expected)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(model(**inputs_of(name)).logits, expected)


@pytest.mark.parametrize("name", RATES)
def test_configuration_has_an_auto_map(name):
    """trl reads it; {} if the model was not saved with its code."""
    assert tiny(name).config.auto_map == {}
    assert "auto_map" not in tiny(name).config.to_dict()


def test_saving_one_family_leaves_the_auto_map_of_others_empty(tmp_path):
    """Also of other configurations of the same family."""
    saved = tiny("bert")
    saved.save_pretrained(tmp_path)
    assert saved.config.auto_map == saved.config.auto_classes
    assert tiny("gpt").config.auto_map == tiny("bert").config.auto_map == {}
    assert type(saved).from_pretrained(tmp_path).config.auto_map == saved.config.auto_classes
