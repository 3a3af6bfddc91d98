"""transformers' common model tests on our video forecasters. None of its own classes predicts videos."""

import unittest
from typing import ClassVar

import torch
from adapter import ModelTests, Tester, enter
from transformers.testing_utils import torch_device

from hf_tfm import (
    TfmConvLSTMConfig,
    TfmConvLSTMForPrediction,
    TfmConvLSTMModel,
    TfmVideoTransformerConfig,
    TfmVideoTransformerForPrediction,
    TfmVideoTransformerModel,
)

enter(TfmConvLSTMConfig, TfmVideoTransformerConfig)
FRAMES = {"image_size": 8, "patch_size": 4, "num_channels": 1, "context_length": 3, "prediction_length": 2}


class VideoTester(Tester):
    fields: ClassVar = {}

    def get_config(self):
        return self.parent.config_class(**FRAMES, **self.fields)

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, 3, 1, 8, 8)
        return self.get_config(), {"pixel_values_videos": torch.rand(shape, device=torch_device)}


class ConvLSTMTester(VideoTester):
    fields: ClassVar = {"hidden_size": [8, 6], "num_hidden_layers": 2, "kernel_size": 3}


class VideoTransformerTester(VideoTester):
    fields: ClassVar = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
    }


class VideoTests(ModelTests):
    """Tests and exceptions that apply to both models."""

    of_text = False
    test_resize_embeddings = False

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Labels are the next frames."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class.__name__.endswith("ForPrediction"):
            inputs["labels"] = inputs["pixel_values_videos"][:, :2]
        return inputs

    @unittest.skip("videos have no embeddings of words")
    def test_inputs_embeds(self):
        pass

    @unittest.skip("videos have no embeddings of words")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("hidden states have other shapes than those of a sequence, see tests/models")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("attention is over time and over space, see tests/models/test_video_transformer.py")
    def test_attention_outputs(self):
        pass


class OursConvLSTM(VideoTests, unittest.TestCase):
    config_class = TfmConvLSTMConfig
    model_tester_class = ConvLSTMTester
    config_fields: ClassVar = {"hidden_size": 32, "common_properties": ["hidden_size", "num_hidden_layers"]}
    has_attentions = False
    all_model_classes = (TfmConvLSTMModel, TfmConvLSTMForPrediction)

    @unittest.skip("the first of its hidden states are the pixels, which need no gradient")
    def test_retain_grad_hidden_states_attentions(self):
        pass


class OursVideoTransformer(VideoTests, unittest.TestCase):
    config_class = TfmVideoTransformerConfig
    model_tester_class = VideoTransformerTester
    config_fields: ClassVar = {"hidden_size": 32, "num_attention_heads": 4}
    all_model_classes = (TfmVideoTransformerModel, TfmVideoTransformerForPrediction)
