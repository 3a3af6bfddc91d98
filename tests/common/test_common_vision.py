"""transformers' common model tests on our Vision Transformer and masked autoencoder, and on its own for comparison."""

import unittest
from typing import ClassVar

import torch
from adapter import ModelTests, Tester, enter
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)
from transformers.testing_utils import torch_device

from hf_tfm import (
    TfmMAEConfig,
    TfmMAEForPreTraining,
    TfmMAEModel,
    TfmViTConfig,
    TfmViTForImageClassification,
    TfmViTModel,
)

enter(TfmViTConfig, TfmMAEConfig)


class ImageTester(Tester):
    image_size, patch_size, num_channels, num_labels = 16, 4, 3, 10
    mask_ratio: float | None = None

    def __init__(self, parent: unittest.TestCase):
        super().__init__(parent)
        patches = (self.image_size // self.patch_size) ** 2
        self.seq_length = self.encoder_seq_length = 1 + round(patches * (1 - (self.mask_ratio or 0.0)))
        self.mask_length, self.num_masks = patches, patches // 2

    def get_config(self):
        names = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers")
        fields = {name: getattr(self, name) for name in (*names, "num_attention_heads", "intermediate_size")}
        if self.mask_ratio is not None:
            fields |= {"mask_ratio": self.mask_ratio, "decoder_hidden_size": 32, "decoder_intermediate_size": 37}
            fields |= {"decoder_num_attention_heads": 4, "decoder_num_hidden_layers": 2}
        return self.parent.config_class(**fields, num_labels=self.num_labels)

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": torch.rand(shape, device=torch_device)}


class MaskedImageTester(ImageTester):
    """The same for a masked autoencoder, which masks half of the patches."""

    mask_ratio = 0.5

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        # The mask is drawn anew in every call; two calls agree if the noise is given.
        return config, inputs | {"noise": torch.rand(self.batch_size, self.mask_length, device=torch_device)}


class ImageTests(ModelTests):
    """Tests and exceptions that apply to both models."""

    model_tester_class = ImageTester
    config_fields: ClassVar = {"hidden_size": 32, "num_attention_heads": 4}
    of_text = False
    test_resize_embeddings = False

    @unittest.skip("images have no embeddings of words")
    def test_inputs_embeds(self):
        pass

    def test_model_get_set_embeddings(self):
        """As in the native tests: patches have another embedding layer than tokens."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
            self.assertIsNone(model.get_output_embeddings())


class MaskedImageTests(ImageTests):
    model_tester_class = MaskedImageTester


class OursViT(ImageTests, unittest.TestCase):
    config_class = TfmViTConfig
    all_model_classes = (TfmViTModel, TfmViTForImageClassification)


class NativeViT(ImageTests, unittest.TestCase):
    config_class = ViTConfig
    all_model_classes = (ViTModel, ViTForImageClassification)


class OursMAE(MaskedImageTests, unittest.TestCase):
    config_class = TfmMAEConfig
    all_model_classes = (TfmMAEModel, TfmMAEForPreTraining)


class NativeMAE(MaskedImageTests, unittest.TestCase):
    config_class = ViTMAEConfig
    all_model_classes = (ViTMAEModel, ViTMAEForPreTraining)
