"""Fixtures of the text distillation tests."""

import pytest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts of two classes. Tests that change the data create their own."""
    from distill_text_recipes import write_texts

    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def tokenizer(data):
    """A tokenizer trained on the texts."""
    from distill_text_recipes import train_tokenizer

    return train_tokenizer(data)


@pytest.fixture(scope="module")
def classifier(tokenizer, tmp_path_factory):
    """A teacher for text classification."""
    from distill_text_recipes import save_classifier

    return save_classifier(tmp_path_factory.mktemp("classifier"), tokenizer)


@pytest.fixture(scope="module")
def language_model(tokenizer, tmp_path_factory):
    """A teacher for masked language modeling."""
    from distill_text_recipes import save_language_model

    return save_language_model(tmp_path_factory.mktemp("language"), tokenizer)
