"""The peer of the translation benchmarks, transformers' Marian of the same size, and their data."""

import numpy as np
import torch
from transformers import MarianConfig, MarianMTModel

from hf_tfm import TfmTransformerConfig
from hf_tfm.data import text
from hf_tfm.data.batching import TokenBudgetSampler, rng


def marian(config: TfmTransformerConfig) -> MarianMTModel:
    """A Marian model with the sizes, dropout and activation of ``config``."""
    return MarianMTModel(
        MarianConfig(
            vocab_size=config.vocab_size,
            d_model=config.hidden_size,
            encoder_layers=config.num_encoder_layers,
            decoder_layers=config.num_decoder_layers,
            encoder_attention_heads=config.num_attention_heads,
            decoder_attention_heads=config.num_attention_heads,
            encoder_ffn_dim=config.intermediate_size,
            decoder_ffn_dim=config.intermediate_size,
            activation_function=config.hidden_act,
            dropout=config.dropout,
            scale_embedding=True,
            pad_token_id=config.pad_token_id,
            eos_token_id=config.eos_token_id,
            bos_token_id=config.bos_token_id,
            forced_eos_token_id=None,
            decoder_start_token_id=config.decoder_start_token_id,
        )
    )


def tokenized(dataset: str, vocab_size: int, source_column: str, target_column: str):
    """Training pairs of a data set as token ids, with a tokenizer trained on them."""
    rows = text.text_pairs(text.load_splits(dataset)["train"], source_column, target_column)
    tokenizer = text.train_tokenizer((t for row in rows for t in (row["source"], row["target"])), vocab_size)
    return text.tokenize_pairs(rows, tokenizer, 128), tokenizer


def random_batches(count: int, size: int, seed: int) -> list[list[int]]:
    """An epoch in batches of ``size`` sentences, as from a shuffling data loader."""
    order = rng(seed).permutation(count)
    return [order[i : i + size].tolist() for i in range(0, count, size)]


def sorted_batches(lengths: np.ndarray, size: int) -> list[list[int]]:
    """An epoch in our batches of ``size`` sentences sorted by both lengths, shortest first."""
    return TokenBudgetSampler(lengths, int(lengths.max()) * size, shuffle=False, max_samples=size).steps(0)


def spread(batches: list[list[int]], count: int, number: int) -> list[list[int]]:
    """``count`` evenly spaced batches, so that all lengths are represented; a different set for each ``number``."""
    stride = len(batches) // count
    return batches[number % stride :: stride][:count]


def training_flops(config: TfmTransformerConfig, source_tokens: int, target_tokens: int) -> float:
    """Linear-layer FLOPs of a training step on real tokens only: forward, and twice that for backward.

    Attention products are excluded (below 2 % at these lengths), so the lower bound is slightly too low.
    """
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    source = config.num_encoder_layers * (4 * D * D + 2 * D * F) + config.num_decoder_layers * 2 * D * D
    target = config.num_decoder_layers * (6 * D * D + 2 * D * F) + D * V
    return 3 * 2 * (source * source_tokens + target * target_tokens)


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of matrix products."""
    return {"no": torch.float32, "bf16": torch.bfloat16}[precision]
