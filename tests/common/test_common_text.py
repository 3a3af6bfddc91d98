"""transformers' common model tests on our BERT, GPT, encoder-decoder Transformer and recurrent encoder-decoder, and on
its own for comparison.
"""

import unittest
import warnings
from typing import ClassVar

import torch
from adapter import ModelTests, Tester, common, enter
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    MarianConfig,
    MarianModel,
    MarianMTModel,
)
from transformers.testing_utils import torch_device

from hf_tfm import (
    TfmBertConfig,
    TfmBertForMaskedLM,
    TfmBertForMultipleChoice,
    TfmBertForPreTraining,
    TfmBertForQuestionAnswering,
    TfmBertForSequenceClassification,
    TfmBertForTokenClassification,
    TfmBertModel,
    TfmGPTConfig,
    TfmGPTForCausalLM,
    TfmGPTForSequenceClassification,
    TfmGPTModel,
    TfmLongRangeConfig,
    TfmLongRangeForSequenceClassification,
    TfmLongRangeModel,
    TfmRNNSeq2SeqConfig,
    TfmRNNSeq2SeqForConditionalGeneration,
    TfmRNNSeq2SeqModel,
    TfmTransformerConfig,
    TfmTransformerForConditionalGeneration,
    TfmTransformerModel,
)

enter(TfmBertConfig, TfmGPTConfig, TfmTransformerConfig, TfmRNNSeq2SeqConfig, TfmLongRangeConfig)


class TextTester(Tester):
    """Texts of different lengths; the last one has no padding."""

    vocab_size, seq_length, max_position_embeddings, num_choices = 99, 7, 40, 4
    pad_token_id, bos_token_id, eos_token_id, decoder_start_token_id = 0, 1, 2, 1
    label_smoothing = 0.0  # the tests compare with plain cross-entropy
    # Fields of the configuration: those with the same name here, and {their name: our name}.
    own_names: tuple[str, ...] = ("vocab_size", "max_position_embeddings", "pad_token_id")
    other_names: ClassVar[dict[str, str]] = {}

    def get_config(self):
        names = {name: name for name in self.own_names} | self.other_names
        return self.parent.config_class(**{there: getattr(self, here) for there, here in names.items()})

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        ids = torch.randint(3, self.vocab_size, shape, device=torch_device)
        mask = torch.ones_like(ids).tril(self.seq_length - self.batch_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class BertTester(TextTester):
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    own_names = (*TextTester.own_names, *sizes)

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, inputs | {"token_type_ids": torch.randint_like(inputs["input_ids"], 2)}


class LongRangeTester(TextTester):
    """Without a class token, which would be one state more."""

    pooling = "mean"
    own_names = (*BertTester.own_names, "pooling")


class GPTTester(TextTester):
    own_names = (*TextTester.own_names, "bos_token_id", "eos_token_id")
    other_names: ClassVar = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
    }


class TransformerTester(TextTester):
    tokens = ("bos_token_id", "eos_token_id", "decoder_start_token_id")
    sizes = ("hidden_size", "num_attention_heads", "intermediate_size", "label_smoothing")
    own_names = (*TextTester.own_names, *tokens, *sizes)
    other_names: ClassVar = {"num_encoder_layers": "num_hidden_layers", "num_decoder_layers": "num_hidden_layers"}

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, inputs | {f"decoder_{name}": values for name, values in inputs.items()}


class RNNTester(TransformerTester):
    """All states have the width that the tests expect of an encoder-decoder's."""

    encoder_hidden_size = TextTester.hidden_size // 2
    own_names = (
        *("vocab_size", "pad_token_id", "hidden_size", "encoder_hidden_size", "label_smoothing"),
        *TransformerTester.tokens,
    )
    other_names: ClassVar = {
        "embedding_size": "hidden_size",
        "num_encoder_layers": "num_hidden_layers",
        "num_decoder_layers": "num_hidden_layers",
    }


class MarianTester(TransformerTester):
    own_names = (*TextTester.own_names, *TransformerTester.tokens)
    other_names: ClassVar = {
        "d_model": "hidden_size",
        "encoder_layers": "num_hidden_layers",
        "decoder_layers": "num_hidden_layers",
        "encoder_attention_heads": "num_attention_heads",
        "decoder_attention_heads": "num_attention_heads",
        "encoder_ffn_dim": "intermediate_size",
        "decoder_ffn_dim": "intermediate_size",
    }


class BertTests(ModelTests):
    """Shared by both models, with two labels, because native question answering has two outputs."""

    model_tester_class = BertTester
    config_fields: ClassVar = {"hidden_size": 48}

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class.__name__.endswith("ForPreTraining"):
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
            inputs["next_sentence_label"] = torch.zeros_like(inputs["input_ids"][:, 0])
        return inputs


class CacheTests(ModelTests, common.GenerationTesterMixin):
    """For models that generate.

    The source distribution lacks the generation tests; an empty class, which the other tests expect, replaces them.
    """

    config_fields: ClassVar = {"use_cache": False}

    def test_bc_cache_name_forward(self):
        """It checks for a warning, and pytest disables warnings here."""
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            super().test_bc_cache_name_forward()


class GPTTests(CacheTests):
    model_tester_class = GPTTester


class TransformerTests(CacheTests):
    is_encoder_decoder = True


class OursBert(BertTests, unittest.TestCase):
    config_class = TfmBertConfig
    all_model_classes = (
        TfmBertModel,
        TfmBertForPreTraining,
        TfmBertForMaskedLM,
        TfmBertForSequenceClassification,
        TfmBertForTokenClassification,
        TfmBertForMultipleChoice,
        TfmBertForQuestionAnswering,
    )


class NativeBert(BertTests, unittest.TestCase):
    config_class = BertConfig
    all_model_classes = (
        BertModel,
        BertForPreTraining,
        BertForMaskedLM,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertForMultipleChoice,
        BertForQuestionAnswering,
    )


class OursLongRange(ModelTests, unittest.TestCase):
    """transformers has no encoder of the Long Range Arena to compare with."""

    config_class = TfmLongRangeConfig
    model_tester_class = LongRangeTester
    all_model_classes = (TfmLongRangeModel, TfmLongRangeForSequenceClassification)


class OursGPT(GPTTests, unittest.TestCase):
    config_class = TfmGPTConfig
    all_model_classes = (TfmGPTModel, TfmGPTForCausalLM, TfmGPTForSequenceClassification)


class NativeGPT(GPTTests, unittest.TestCase):
    config_class = GPT2Config
    all_model_classes = (GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification)


class OursTransformer(TransformerTests, unittest.TestCase):
    config_class = TfmTransformerConfig
    model_tester_class = TransformerTester
    all_model_classes = (TfmTransformerModel, TfmTransformerForConditionalGeneration)


class OursRNNSeq2Seq(TransformerTests, unittest.TestCase):
    """transformers has no recurrent encoder-decoder to compare with."""

    config_class = TfmRNNSeq2SeqConfig
    model_tester_class = RNNTester
    all_model_classes = (TfmRNNSeq2SeqModel, TfmRNNSeq2SeqForConditionalGeneration)
    config_fields: ClassVar = {
        **CacheTests.config_fields,
        "common_properties": ["hidden_size", "num_hidden_layers"],  # and no attention heads
    }
    has_attentions = False  # encoder and decoder have no self-attention, whose probabilities the tests compare


class NativeTransformer(TransformerTests, unittest.TestCase):
    """Marian has the paper's blocks and positions too."""

    config_class = MarianConfig
    model_tester_class = MarianTester
    all_model_classes = (MarianModel, MarianMTModel)
