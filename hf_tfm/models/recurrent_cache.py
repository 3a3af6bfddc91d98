"""State of a recurrent decoder as a cache that transformers' `generate` accepts.

    EncoderDecoderCache(self_attention_cache=RecurrentCache, cross_attention_cache=DynamicCache)

The self-attention part holds the states after the last token instead of keys and values of all tokens: beam search
reorders them like keys. The cross-attention part holds what is computed once a sentence from the encoder's output.

Shapes: B sentences; L decoder layers; D hidden size.
"""

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin


class RecurrentLayer(CacheLayerMixin):
    """Hidden states of all decoder layers, ``keys`` (B, L, D), and LSTM cells, ``values`` (B, L, D) or (B, 0, D)."""

    is_compileable = False
    is_sliding = False

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.seen_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Record dtype and device, as layers of transformers do."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, new_tokens: int = 1, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Replace the states by those after ``new_tokens`` further tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        self.seen_tokens += new_tokens
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the number of tokens that the states have read."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of a mask over all tokens."""
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1; the name of `get_max_length` in earlier versions of transformers."""
        return -1

    def reset(self) -> None:
        """Forget the states."""
        self.__init__()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.keys = self.keys.repeat_interleave(repeats, dim=0)
        self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows."""
        self.keys, self.values = self.keys[indices], self.values[indices]


class RecurrentCache(Cache):
    """Cache of one `RecurrentLayer`."""

    def __init__(self):
        super().__init__(layers=[RecurrentLayer()])


def recurrent_cache(given: Cache | None) -> EncoderDecoderCache:
    """Return the cache to use for a given one; an empty cache of attention layers is turned into one of states.

    Raises:
        ValueError: the given cache holds keys and values, or is no `EncoderDecoderCache`.
    """
    if given is None:
        return EncoderDecoderCache(RecurrentCache(), DynamicCache())
    if not isinstance(given, EncoderDecoderCache):
        raise ValueError(f"cache must be an EncoderDecoderCache, got {type(given).__name__}")
    if isinstance(given.self_attention_cache, RecurrentCache):
        return given
    if given.get_seq_length() > 0:
        raise ValueError("cache must be empty or made by a recurrent model, got one with keys and values")
    given.self_attention_cache, given.cross_attention_cache = RecurrentCache(), DynamicCache()
    return given
