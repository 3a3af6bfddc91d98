"""transformers' common model tests on our Vision Transformer and masked autoencoder, and on its own beside them."""

import unittest

import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from upstream import upstream

from hf_tfm import (
    TfmMAEConfig,
    TfmMAEForPreTraining,
    TfmMAEModel,
    TfmViTConfig,
    TfmViTForImageClassification,
    TfmViTModel,
)

common = upstream("test_modeling_common")
configurations = upstream("test_configuration_common")

# By these tables the tests know which classes have a loss and which take labels.
MODEL_MAPPING_NAMES.update(tfm_vit="TfmViTModel", tfm_mae="TfmMAEModel")
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["tfm_vit"] = "TfmViTForImageClassification"


class ImageTester:
    """A tiny model and its inputs, in the form that the common tests ask for."""

    batch_size, image_size, patch_size, num_channels = 3, 16, 4, 3
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size = 32, 2, 4, 37
    num_labels = 10
    is_training = True
    mask_ratio: float | None = None

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
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
        pixels = torch.rand(self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": pixels}


class MaskedImageTester(ImageTester):
    """The same of a masked autoencoder, which hides half of the patches."""

    mask_ratio = 0.5

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        # What is hidden is drawn anew in every call: two calls agree where the noise is given.
        return config, inputs | {"noise": torch.rand(self.batch_size, self.mask_length)}


class ImageTests(common.ModelTesterMixin):
    """What both models answer for."""

    test_resize_embeddings = False
    model_tester_class = ImageTester

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.config_tester = configurations.ConfigTester(
            self, config_class=self.config_class, has_text_modality=False, hidden_size=32, num_attention_heads=4
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip("images have no embeddings of words")
    def test_inputs_embeds(self):
        pass

    def test_model_get_set_embeddings(self):
        """As the native tests have it: patches are embedded by another layer than words."""
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
