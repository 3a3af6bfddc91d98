"""Shared helpers that adapt all models to transformers' common tests."""

import functools
import unittest
from typing import ClassVar
from unittest import mock

import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from upstream import upstream

from hf_tfm.models.bert_parts import NATIVE_NAMES
from hf_tfm.models.native_names import OwnNamesPreTrainedModel

READ_ONLY = {source for source, target in NATIVE_NAMES if target.endswith("(?!)")}  # names that are never written

common = upstream("test_modeling_common")
configurations = upstream("test_configuration_common")


def enter(*config_classes: type) -> None:
    """Register classes in transformers' tables of classes that have a loss or take labels."""
    for config_class in config_classes:
        for auto_class, path in config_class.auto_classes.items():
            if auto_class != "AutoConfig":
                names = getattr(transformers, auto_class)._model_mapping._model_mapping
                names[config_class.model_type] = path.split(".")[-1]


def names_written(*args, **options) -> list:
    """Return the conversions of `get_model_conversion_mapping` that `save_pretrained` can reverse."""
    found = get_model_conversion_mapping(*args, **options)
    return [one for one in found if READ_ONLY.isdisjoint(one.source_patterns)]


class Tester:
    """A tiny model and its inputs, in the form that the common tests expect."""

    batch_size = 3
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size = 32, 2, 4, 37
    is_training = True

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent


class ModelTests(common.ModelTesterMixin):
    """The common tests of a model and of its configuration."""

    model_tester_class: type[Tester]
    config_class: type[transformers.PreTrainedConfig]
    config_fields: ClassVar = {}  # of the configuration that the configuration tests create
    of_text = True

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.config_tester = configurations.ConfigTester(
            self, config_class=self.config_class, has_text_modality=self.of_text, **self.config_fields
        )

    def test_reverse_loading_mapping(self, **options):
        """For our models the native names are requested, because they save the names of their modules by default.

        Names that are only read, never written, are left out, as the test does with transformers' own legacy names.
        """
        save = OwnNamesPreTrainedModel.save_pretrained
        written = functools.partialmethod(save, save_original_format=True)
        with (
            mock.patch.object(OwnNamesPreTrainedModel, "save_pretrained", written),
            mock.patch.object(common, "get_model_conversion_mapping", names_written),
        ):
            super().test_reverse_loading_mapping(**options)

    def test_config(self):
        self.config_tester.run_common_tests()
