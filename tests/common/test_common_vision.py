"""transformers' common model tests on our Vision Transformer, masked autoencoder and Swin, and on its own."""

import unittest
from typing import ClassVar

import torch
from adapter import ModelTests, Tester, enter
from transformers import (
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
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
    TfmSwinBackbone,
    TfmSwinConfig,
    TfmSwinForImageClassification,
    TfmSwinModel,
    TfmViTConfig,
    TfmViTForImageClassification,
    TfmViTModel,
)

enter(TfmViTConfig, TfmMAEConfig, TfmSwinConfig)


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


class WindowTester(ImageTester):
    """A model of two stages with 8 x 8 and 4 x 4 tokens."""

    image_size, patch_size = 16, 2

    def get_config(self):
        shape = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
        shape |= {"image_size": self.image_size, "patch_size": self.patch_size, "num_channels": self.num_channels}
        return self.parent.config_class(**shape, num_labels=self.num_labels, out_features=["stage1", "stage2"])


class WindowTests(ImageTests):
    """Common tests of a model with windows, with the exceptions of the native tests."""

    model_tester_class = WindowTester
    config_fields: ClassVar = {"embed_dim": 32, "depths": [1], "num_heads": [4]}

    @unittest.skip("attention is within windows, see tests/models/test_swin.py")
    def test_attention_outputs(self):
        pass

    @unittest.skip("stages have hidden states of other shapes, see tests/models/test_swin.py")
    def test_hidden_states_output(self):
        pass


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


class OursSwin(WindowTests, unittest.TestCase):
    config_class = TfmSwinConfig
    all_model_classes = (TfmSwinModel, TfmSwinForImageClassification, TfmSwinBackbone)


class NativeSwin(WindowTests, unittest.TestCase):
    config_class = SwinConfig
    all_model_classes = (SwinModel, SwinForImageClassification, SwinBackbone)
