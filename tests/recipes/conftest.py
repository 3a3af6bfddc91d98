"""What the tests of distilling texts share."""

import pytest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts of two classes. Other tests have data of their own."""
    from distill_text_recipes import write_texts

    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def tokenizer(data):
    """Trained on them."""
    from distill_text_recipes import teach_tokenizer

    return teach_tokenizer(data)


@pytest.fixture(scope="module")
def classifier(tokenizer, tmp_path_factory):
    """A teacher of the classes."""
    from distill_text_recipes import save_classifier

    return save_classifier(tmp_path_factory.mktemp("classifier"), tokenizer)


@pytest.fixture(scope="module")
def language_model(tokenizer, tmp_path_factory):
    """A teacher of masked tokens."""
    from distill_text_recipes import save_language_model

    return save_language_model(tmp_path_factory.mktemp("language"), tokenizer)
