"""transformers' common model tests on our DETR and Deformable DETR, and for comparison on its own with the same timm
backbone."""

import unittest
from typing import ClassVar

import torch
from adapter import ModelTests, Tester, enter
from torch import Tensor
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrModel,
    DetrConfig,
    DetrForObjectDetection,
    DetrForSegmentation,
    DetrModel,
)
from transformers.testing_utils import torch_device

from hf_tfm import (
    TfmDeformableDetrConfig,
    TfmDeformableDetrForObjectDetection,
    TfmDeformableDetrModel,
    TfmDetrConfig,
    TfmDetrForObjectDetection,
    TfmDetrForPanopticSegmentation,
    TfmDetrModel,
)

enter(TfmDetrConfig, TfmDeformableDetrConfig)


class DetectionTester(Tester):
    image_size, num_channels, num_labels, num_objects = 64, 3, 10, 5
    encoder_seq_length = 4  # cells of the last feature map, whose stride is 32
    # Equal to the image width: test_eager_matches_sdpa_inference takes the size of the decoder mask from there.
    num_queries = decoder_seq_length = image_size
    num_attention_heads = 8  # the mask head adds the heads to the width, and requires groups of eight channels

    def get_config(self):
        fields = {"d_model": self.hidden_size, "num_queries": self.num_queries, "num_labels": self.num_labels}
        for part in ("encoder", "decoder"):
            fields[f"{part}_layers"] = self.num_hidden_layers
            fields[f"{part}_attention_heads"] = self.num_attention_heads
            fields[f"{part}_ffn_dim"] = self.intermediate_size
        # Auxiliary losses would add an output that the tests do not expect.
        return self.parent.config_class(**fields, backbone="test_resnet", auxiliary_loss=False)

    def prepare_config_and_inputs_for_common(self):
        size = (self.image_size, self.image_size)
        inputs = {
            "pixel_values": torch.rand(self.batch_size, self.num_channels, *size, device=torch_device),
            "pixel_mask": torch.ones(self.batch_size, *size, dtype=torch.long, device=torch_device),
        }
        return self.get_config(), inputs

    def labels(self) -> list[dict[str, Tensor]]:
        """The same objects, which cover the whole image, for every image."""
        objects = {
            "class_labels": torch.arange(self.num_objects),
            "boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(self.num_objects, 1),
            "masks": torch.ones(self.num_objects, self.image_size, self.image_size),
        }
        return [{name: values.to(torch_device) for name, values in objects.items()}] * self.batch_size


class DetectionTests(ModelTests):
    """Tests and exceptions that apply to both models. The first of the classes has no head."""

    model_tester_class = DetectionTester
    config_fields: ClassVar = {"d_model": 32, "encoder_attention_heads": 4}
    of_text = False
    is_encoder_decoder = True
    test_resize_embeddings = False

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is not self.all_model_classes[0]:
            inputs["labels"] = self.model_tester.labels()
        return inputs

    def test_attention_outputs(self):
        """The common test counts all outputs, and a head has more; here only its attention maps are counted."""
        classes = self.all_model_classes
        self.all_model_classes = classes[:1]
        super().test_attention_outputs()
        self.check_attentions(classes[1:])

    def attention_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each attention output, without the batch."""
        heads, cells, queries = (
            getattr(self.model_tester, name) for name in ("num_attention_heads", "encoder_seq_length", "num_queries")
        )
        return {
            "encoder_attentions": (heads, cells, cells),
            "decoder_attentions": (heads, queries, queries),
            "cross_attentions": (heads, queries, cells),
        }

    def check_attentions(self, classes: tuple[type, ...]) -> None:
        shapes = self.attention_shapes()
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in classes:
            model = model_class._from_config(config, attn_implementation="eager").to(torch_device).eval()
            plain, outputs = model(**inputs), model(**inputs, output_attentions=True)
            self.assertEqual(set(outputs) - set(plain), set(shapes))
            for name, shape in shapes.items():
                self.assertEqual(len(outputs[name]), self.model_tester.num_hidden_layers)
                self.assertEqual(outputs[name][0].shape[1:], shape)

    def test_retain_grad_hidden_states_attentions(self):
        """The common test also requires a gradient for the decoder's first states, which are zeros here."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.all_model_classes[0]._from_config(config, attn_implementation="eager").to(torch_device)
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        names = ("encoder_hidden_states", "encoder_attentions", "decoder_attentions", "cross_attentions")
        for name in names:
            outputs[name][0].retain_grad()
        outputs.last_hidden_state[0, 0, 0].backward()
        for name in names:
            self.assertIsNotNone(outputs[name][0].grad, name)

    @unittest.skip("images have no embeddings of words")
    def test_inputs_embeds(self):
        pass

    @unittest.skip("images have no embeddings of words")
    def test_inputs_embeds_matches_input_ids(self):
        pass

    @unittest.skip("images have no embeddings of words")
    def test_model_get_set_embeddings(self):
        pass


class OursDetr(DetectionTests, unittest.TestCase):
    """One test more is skipped than for the native model: our configuration has no nested backbone configuration."""

    config_class = TfmDetrConfig
    all_model_classes = (TfmDetrModel, TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation)


class NativeDetr(DetectionTests, unittest.TestCase):
    config_class = DetrConfig
    all_model_classes = (DetrModel, DetrForObjectDetection, DetrForSegmentation)

    @unittest.skip("with a timm backbone, it leaves the buffers of its norms as they are")
    def test_init_weights_can_init_buffers(self):
        pass


class DeformableTester(DetectionTester):
    encoder_seq_length = 64 + 16 + 4 + 1  # cells of levels with strides 8, 16, 32 and 64


class DeformableTests(DetectionTests):
    """Tests and exceptions that apply to both models."""

    model_tester_class = DeformableTester

    def attention_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weights are those of four points on each of four levels."""
        shapes, tester = super().attention_shapes(), self.model_tester
        points = (tester.num_attention_heads, 4, 4)
        return {
            **shapes,
            "encoder_attentions": (tester.encoder_seq_length, *points),
            "cross_attentions": (tester.num_queries, *points),
        }

    def test_attention_outputs(self):
        """The common test expects attention between all cells."""
        self.check_attentions(self.all_model_classes)


class OursDeformableDetr(DeformableTests, unittest.TestCase):
    config_class = TfmDeformableDetrConfig
    all_model_classes = (TfmDeformableDetrModel, TfmDeformableDetrForObjectDetection)


class NativeDeformableDetr(DeformableTests, unittest.TestCase):
    config_class = DeformableDetrConfig
    all_model_classes = (DeformableDetrModel, DeformableDetrForObjectDetection)
