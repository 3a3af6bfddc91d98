"""Faster generation with identical results.

    ids (B, T) -> decoder step on unfinished rows, with the encoder's memory if there is one -> ids (B, T')

transformers' `generate` processes all sentences until the longest one ends, and repeats the memory of an
encoder-decoder for every hypothesis of a sentence. Here greedy decoding drops finished sentences, and hypotheses share
one memory.

Shapes: B sentences; R unfinished ones; S source, T target positions; D = config.hidden_size; V vocabulary size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationConfig, GenerationMixin
from transformers.generation import (
    EosTokenCriteria,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import BaseModelOutput

from .cache_names import CACHE_NAME
from .input_checks import require_elements
from .linear import generating

# Checking which rows have ended synchronises the GPU, and dropping rows copies the cache: too costly at every token.
STEPS_BETWEEN_CHECKS = 4
# Steps of transformers' loop that `greedy` skips or reimplements: it is used only if none of them is overridden.
STEPS = (
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_prefill",
    "_has_unfinished_sequences",
    "get_compiled_call",
    "_valid_auto_compile_criteria",
    "_optimize_model_for_decode",
)
LEAST = {  # minimum value of integer options
    "num_beams": 1,
    "num_return_sequences": 1,
    "max_length": 1,
    "max_new_tokens": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
}
# Processors that treat rows independently and do not count them, so that they may be given a subset of the rows.
ROW_BY_ROW = {
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
}


def greedy_suits(config: GenerationConfig, processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> bool:
    """Return whether `greedy` can serve a request: only ids returned, stopping by EOS or length, rows independent."""
    kinds = {type(criterion) for criterion in criteria}
    return (
        not (config.do_sample or config.return_dict_in_generate or config.is_assistant)
        and {type(processor) for processor in processors} <= ROW_BY_ROW
        and all(getattr(processor, "prompt_ignore_length", None) is None for processor in processors)  # one per row
        and MaxLengthCriteria in kinds <= {EosTokenCriteria, MaxLengthCriteria}
        and config.prefill_chunk_size is None
    )


def keeps_steps(model: GenerationMixin) -> bool:
    """Return whether `STEPS` are not overridden, neither in the class nor on the instance, where peft sets them."""
    for step in STEPS:
        owner = next((each for each in type(model).__mro__ if step in vars(each)), None)
        if owner is None:  # the installed version of transformers has no such step
            continue
        own = vars(model).get(step)
        if not owner.__module__.startswith("transformers.") or (
            own is not None and getattr(own, "__func__", own) is not vars(owner)[step]
        ):
            return False
    return True


def require_options(config: GenerationConfig) -> None:
    """Raise if an option is below its `LEAST` value or not an integer.

    Raises:
        ValueError: with the option's name.
    """
    for name, least in LEAST.items():
        value = getattr(config, name, None)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def fresh(cache: Any) -> bool:
    """Return whether a cache is an empty `DynamicCache` without offloading."""
    return type(cache) is DynamicCache and cache.get_seq_length() == 0 and not cache.offloading


class Rows(Protocol):
    """Unfinished sentences that are decoded together.

    ``scores(ids)`` maps (R, T) ids to (R, V) scores of the next tokens; ``keep(rows)`` keeps only the rows with the
    given indices (R',).
    """

    def scores(self, ids: Tensor) -> Tensor: ...

    def keep(self, rows: Tensor) -> None: ...


@dataclass
class MemoryRows:
    """Rows that are decoded with an encoder-decoder model.

    Args:
        model: a `TfmTransformerForConditionalGeneration`.
        memory: (R, S, D), output of the encoder; attention_mask: (R, S) of the source, or None.
        cache: an empty cache.
    """

    model: nn.Module
    memory: Tensor
    attention_mask: Tensor | None
    cache: EncoderDecoderCache
    use_cache: bool = True

    def scores(self, ids: Tensor) -> Tensor:
        """See `Rows`."""
        memory = BaseModelOutput(last_hidden_state=self.memory)
        mask, cache = self.attention_mask, self.cache
        output = self.model(
            encoder_outputs=memory,
            attention_mask=mask,
            decoder_input_ids=ids,
            **{CACHE_NAME: cache},
            use_cache=self.use_cache,
            return_dict=True,
        )
        return output.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """See `Rows`."""
        self.memory = self.memory[rows]
        self.attention_mask = None if self.attention_mask is None else self.attention_mask[rows]
        self.cache.reorder_cache(rows)


@dataclass
class DecoderRows:
    """Rows that are decoded with a decoder-only model; prompts may be left-padded.

    Args:
        model: a `TfmGPTForCausalLM`.
        attention_mask: (R, T) of the prompts, or None without padding; extended by the new tokens.
        position_ids: (R, T) of the prompts.
        cache: an empty cache.
    """

    model: nn.Module
    attention_mask: Tensor | None
    position_ids: Tensor
    cache: DynamicCache

    def scores(self, ids: Tensor) -> Tensor:
        """See `Rows`."""
        mask = self.attention_mask
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=self.position_ids,
            **{CACHE_NAME: self.cache},
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        self.position_ids = self.position_ids[:, -1:] + 1
        self.attention_mask = None if mask is None else nn.functional.pad(mask, (0, 1), value=1)
        return output.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """See `Rows`."""
        self.position_ids = self.position_ids[rows]
        self.attention_mask = None if self.attention_mask is None else self.attention_mask[rows]
        self.cache.reorder_cache(rows)


Choose = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # see `decode`


def greedy(
    rows: Rows,
    ids: Tensor,
    processors: LogitsProcessorList,
    eos_token_id: Tensor | None,
    pad_token_id: int,
    max_length: int,
) -> Tensor:
    """Extend each row of ``ids`` by the most likely token; other arguments as in `decode`.

    Args:
        processors: modify the scores of the next token, row by row.

    Returns:
        (B, T') ids, equal to transformers' greedy search.
    """

    def choose(scores: Tensor, output: Tensor, active: Tensor, step: int) -> Tensor:
        if processors:
            scores = processors(output[active, :step], scores.float())
        return scores.argmax(dim=-1)

    return decode(rows, ids, choose, eos_token_id, pad_token_id, max_length)


def decode(
    rows: Rows, ids: Tensor, choose: Choose, eos_token_id: Tensor | None, pad_token_id: int, max_length: int
) -> Tensor:
    """Extend each row of ``ids``, token by token, until one of ``eos_token_id`` or ``max_length``.

    Rows are independent, so dropping finished ones does not change the tokens of the others.

    Args:
        rows: computes the scores.
        ids: (B, T) start token, or a longer prefix.
        choose: (scores (R, V), tokens so far (B, max_length), the R rows of these that are unfinished, their length)
            -> next tokens (R,).
        eos_token_id: (n,) tokens that end a sentence, or None.
        pad_token_id: fills a row after its end.
        max_length: maximum length of the result.

    Returns:
        (B, T') ids.
    """
    B, start = ids.shape
    ends = ids.new_empty(0) if eos_token_id is None else eos_token_id
    output = ids.new_full((B, max_length), pad_token_id)
    output[:, :start] = ids
    active = torch.arange(B, device=ids.device)  # (R,) row indices in the output
    running = torch.ones(B, dtype=torch.bool, device=ids.device)  # (R,)
    for step in range(start, max_length):
        token = choose(rows.scores(ids), output, active, step).masked_fill(~running, pad_token_id)  # (R,)
        output[active, step] = token
        ids = token[:, None]
        if eos_token_id is None:
            continue
        running = running & ~torch.isin(token, ends)
        if (step - start) % STEPS_BETWEEN_CHECKS == 0 and not running.all():
            keep = running.nonzero()[:, 0]  # (R',)
            if len(keep) == 0:
                break
            active, ids, running = active[keep], ids[keep], running[keep]
            rows.keep(keep)
    ended = torch.isin(output[:, start:], ends)  # (B, T' - start)
    lengths = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, max_length - start)  # (B,)
    return output[:, : start + int(lengths.max())]


class GreedyGenerationMixin(GenerationMixin):
    """`GenerationMixin` that decodes greedily with `greedy`, for decoder-only models.

    Methods with a leading underscore are steps of transformers' `generate`. If a subclass or an adapter overrides one
    of the `STEPS` skipped by `greedy`, transformers' loop runs.
    """

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """Generate as in transformers: same arguments, same results.

        Raises:
            ValueError: the batch is empty, an option is out of range, or the text would exceed the model's learned
                positions.
        """
        names = ("input_ids",) if kwargs.get("inputs_embeds") is None else ("inputs_embeds",)
        for name, given in (("inputs", inputs), *((name, kwargs.get(name)) for name in names)):
            if isinstance(given, Tensor):
                require_elements(name, given)
        with generating():
            return super().generate(inputs, *args, **kwargs)

    def generate_batch(self, inputs: list[list[int]], generation_config: GenerationConfig | None = None, **kwargs):
        """Generate with continuous batching as in transformers: same arguments, same results.

        Raises:
            ValueError: a prompt is empty, ``max_new_tokens`` is less than 1, or a text would exceed the model's
                learned positions.
        """
        config = self.generation_config if generation_config is None else generation_config
        asked = kwargs.get("max_new_tokens")
        for ids in inputs:
            self.new_tokens_of(ids, config.max_new_tokens if asked is None else asked)
        return super().generate_batch(inputs, generation_config=generation_config, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Return transformers' manager, extended by a check of the length of every request."""
        manager = super().init_continuous_batching(*args, **kwargs)
        if "add_request" not in vars(manager):  # a manager may be cached and returned again
            manager.add_request = partial(self.add_request, manager, manager.add_request)
        return manager

    def add_request(
        self, manager: Any, add: Callable, input_ids: list[int], request_id: str | None = None, *args, **kwargs
    ) -> str | None:
        """Call ``manager.add_request``, given as ``add``, after checking that the request fits the positions."""
        asked = args[0] if args else kwargs.pop("max_new_tokens", None)
        asked = manager.generation_config.max_new_tokens if asked is None else asked
        return add(input_ids, request_id, self.new_tokens_of(input_ids, asked), *args[1:], **kwargs)

    def new_tokens_of(self, ids: list[int], max_new_tokens: int | None) -> int | None:
        """Return the maximum number of new tokens of a prompt; default: as many as there are positions left.

        Raises:
            ValueError: the prompt is empty, ``max_new_tokens`` is less than 1, or there are too few positions.
        """
        if not len(ids):
            raise ValueError("a prompt has no tokens")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if (most := self.most_positions()) is None:
            return max_new_tokens
        if len(ids) > most:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, which leaves no room for new ones: "
                f"max_position_embeddings is {most}"
            )
        room = most + 1 - len(ids)  # the last token is not fed to the model
        if max_new_tokens is not None and max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens = {max_new_tokens} makes {len(ids) + max_new_tokens} tokens with the prompt, but "
                f"max_position_embeddings is {most}: the model can continue {most} tokens at most"
            )
        return room if max_new_tokens is None else max_new_tokens

    def most_positions(self) -> int | None:
        """Return the maximum number of positions, None if unlimited."""
        return self.config.max_position_embeddings

    def _prepare_generation_config(self, *args, **kwargs):
        """Prepare the generation config and check its options."""
        config, inputs = super()._prepare_generation_config(*args, **kwargs)
        require_options(config)
        return config, inputs

    def _validate_generated_length(self, generation_config, input_ids_length, *args, **kwargs):
        """Raise an error that names the limit if a prompt leaves no room for a new token."""
        most, longest = self.most_positions(), generation_config.max_length
        if most is not None and input_ids_length >= longest and input_ids_length >= most:
            raise ValueError(
                f"the prompt has {input_ids_length} tokens, which leaves no room for new ones: "
                f"max_position_embeddings is {most}"
            )
        return super()._validate_generated_length(generation_config, input_ids_length, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Check that there are positions for all tokens that the cache may hold."""
        most, positions = self.most_positions(), model_kwargs.get("position_ids")
        padding = 0  # left padding of the longest prompt
        if positions is not None and most is not None and max_cache_length > most:
            padding = positions.shape[-1] - 1 - int(positions.max())
        if most is not None and max_cache_length - padding > most:
            name = "max_length" if generation_config.max_new_tokens is None else "max_new_tokens"
            raise ValueError(
                f"{name} = {getattr(generation_config, name)} makes {max_cache_length - padding + 1} tokens with the "
                f"prompt, but max_position_embeddings is {most}: the model can continue {most} tokens at most"
            )
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def rows_of(self, inputs: dict[str, Any]) -> Rows | None:
        """Return the rows for the ``inputs`` of a generation step; None if `greedy` does not support them."""
        known = inputs.keys() <= {CACHE_NAME, "attention_mask", "position_ids", "logits_to_keep", "use_cache"}
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if not (known and fresh(inputs.get(CACHE_NAME)) and inputs.get("use_cache") and positions is not None):
            return None
        if mask is not None and (mask.ndim != 2 or mask.shape != positions.shape):
            return None
        return DecoderRows(self, None if mask is None or mask.all() else mask, positions, inputs[CACHE_NAME])

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **inputs):
        """Decode greedily or sample: with `greedy` if the result is the same, otherwise with transformers' loop."""
        streamer = inputs.pop("streamer", None)
        plain = not (synced_gpus or streamer) and keeps_steps(self)
        plain = plain and greedy_suits(generation_config, logits_processor, stopping_criteria)
        if not plain or (rows := self.rows_of(inputs)) is None:
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **inputs,
            )
        pad = generation_config._pad_token_tensor
        return greedy(
            rows,
            input_ids,
            logits_processor,
            generation_config._eos_token_tensor,
            0 if pad is None else int(pad),  # without EOS tokens no row is padded
            generation_config.max_length,
        )


class SharedMemoryGenerationMixin(GreedyGenerationMixin):
    """`GreedyGenerationMixin` for an encoder-decoder that accepts n rows of decoder input per row of memory."""

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """Generate as in transformers: same arguments, same results."""
        output = super().generate(inputs, *args, **kwargs)
        cache = getattr(output, CACHE_NAME, None)
        if isinstance(cache, EncoderDecoderCache):  # return one row of memory per hypothesis, as usual
            for own, cross in zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True):
                hypotheses = len(own.keys) // len(cross.keys)
                cross.keys = cross.keys.repeat_interleave(hypotheses, dim=0)
                cross.values = cross.values.repeat_interleave(hypotheses, dim=0)
        return output

    def _expand_inputs_for_generation(self, expand_size: int = 1, is_encoder_decoder: bool = True, **inputs):
        """Repeat the decoder's inputs for each hypothesis (beam, sample) of a sentence; all share one memory."""
        if not keeps_steps(self):  # an overridden step expects one row of memory per hypothesis
            return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, **inputs)
        memory = {name: inputs.pop(name) for name in ("encoder_outputs", "attention_mask") if name in inputs}
        input_ids, inputs = super()._expand_inputs_for_generation(expand_size=expand_size, **inputs)
        return input_ids, {**inputs, **memory}

    def _reorder_cache(self, cache: Cache, beam_idx: Tensor) -> Cache:
        """Reorder the cache by kept beams, (B * beams,) row indices; memory stays, as beams keep their sentence."""
        (cache.self_attention_cache if keeps_steps(self) else cache).reorder_cache(beam_idx)
        return cache

    def rows_of(self, inputs: dict[str, Any]) -> Rows | None:
        """See `GreedyGenerationMixin.rows_of`."""
        cache, known = inputs.get(CACHE_NAME), {CACHE_NAME, "encoder_outputs", "attention_mask", "use_cache"}
        if not (inputs.keys() <= known and isinstance(cache, EncoderDecoderCache)):
            return None
        if not fresh(cache.self_attention_cache):
            return None
        memory = inputs["encoder_outputs"].last_hidden_state
        return MemoryRows(self, memory, inputs.get("attention_mask"), cache, inputs.get("use_cache", True))
