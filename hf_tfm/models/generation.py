"""Generation of an encoder-decoder without the work that changes no token.

    source ids (B, S) -> memory, once a sentence -> decoder step, on what still runs -> ids (B, T)

transformers' `generate` repeats the memory for every hypothesis of a sentence, and carries all sentences to the end of
the longest one. Here the hypotheses share one memory, and greedy decoding leaves finished sentences out.

Shapes: B sentences; R of them still running; S source, T target positions; D = config.hidden_size; V vocabulary.
"""

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

# Looking who has ended makes a GPU wait, and leaving rows out copies their cache: not worth it at every token.
STEPS_BETWEEN_CHECKS = 4
# These look at one row at a time and do not count rows, so they may be shown fewer of them.
ROW_BY_ROW = {
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
}


def greedy_suits(
    config: GenerationConfig, processors: LogitsProcessorList, criteria: StoppingCriteriaList, inputs: dict
) -> bool:
    """Whether `greedy` gives what `generate` was asked for: just the ids, an end by EOS, no look across rows."""
    cache = inputs.get(CACHE_NAME)
    return (
        not (config.do_sample or config.return_dict_in_generate or config.is_assistant)
        and {type(processor) for processor in processors} <= ROW_BY_ROW
        and {type(criterion) for criterion in criteria} == {EosTokenCriteria, MaxLengthCriteria}
        and config.prefill_chunk_size is None
        and inputs.keys() <= {CACHE_NAME, "encoder_outputs", "attention_mask", "use_cache"}
        and isinstance(cache, EncoderDecoderCache)
        and type(cache.self_attention_cache) is DynamicCache
        and cache.get_seq_length() == 0
        and not cache.self_attention_cache.offloading
    )


def greedy(
    model: nn.Module,
    ids: Tensor,
    processors: LogitsProcessorList,
    eos_token_id: Tensor,
    pad_token_id: int,
    max_length: int,
    encoder_outputs: BaseModelOutput,
    cache: EncoderDecoderCache,
    attention_mask: Tensor | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue each row of ``ids`` with the likeliest token, until one of ``eos_token_id`` or ``max_length``.

    Rows do not see each other, so leaving out those that have ended changes no token of the others.

    Args:
        model: a `TfmTransformerForConditionalGeneration`.
        ids: (B, T) the start token, or a longer prefix.
        processors: change the scores of the next token, row by row.
        eos_token_id: (n,) the tokens that end a sentence.
        pad_token_id: fills a row after its end.
        max_length: upper bound of the length of the result.
        encoder_outputs: of the B sentences.
        cache: empty.
        attention_mask: (B, S) of the source.

    Returns:
        (B, T') ids, equal to transformers' greedy search.
    """
    B, start = ids.shape
    output = ids.new_full((B, max_length), pad_token_id)
    output[:, :start] = ids
    memory = encoder_outputs.last_hidden_state  # (R, S, D)
    rows = torch.arange(B, device=ids.device)  # (R,) their places in the output
    running = torch.ones(B, dtype=torch.bool, device=ids.device)  # (R,)
    for step in range(start, max_length):
        outputs = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=memory),
            attention_mask=attention_mask,
            decoder_input_ids=ids,
            cache=cache,
            use_cache=use_cache,
        )
        scores = outputs.logits[:, -1]  # (R, V)
        if processors:
            scores = processors(output[rows, :step], scores.float())
        token = scores.argmax(dim=-1).masked_fill(~running, pad_token_id)  # (R,)
        output[rows, step] = token
        running = running & ~torch.isin(token, eos_token_id)
        ids = token[:, None]
        if (step - start) % STEPS_BETWEEN_CHECKS == 0 and not running.all():
            keep = running.nonzero()[:, 0]  # (R',)
            if len(keep) == 0:
                break
            rows, memory, ids, running = rows[keep], memory[keep], ids[keep], running[keep]
            attention_mask = None if attention_mask is None else attention_mask[keep]
            cache.reorder_cache(keep)
    ended = torch.isin(output[:, start:], eos_token_id)  # (B, T' - start)
    lengths = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, max_length - start)  # (B,)
    return output[:, : start + int(lengths.max())]


class SharedMemoryGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model that takes n rows of decoder input to each row of memory.

    The methods with an underscore are steps of transformers' `generate`.
    """

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs):
        """As transformers' `generate`: same arguments, same results."""
        output = super().generate(inputs, **kwargs)
        cache = getattr(output, CACHE_NAME, None)
        if isinstance(cache, EncoderDecoderCache):  # handed out with a row of memory for each hypothesis, as usual
            for own, cross in zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True):
                hypotheses = len(own.keys) // len(cross.keys)
                cross.keys = cross.keys.repeat_interleave(hypotheses, dim=0)
                cross.values = cross.values.repeat_interleave(hypotheses, dim=0)
        return output

    def _expand_inputs_for_generation(self, expand_size: int = 1, is_encoder_decoder: bool = True, **inputs):
        """Repeat the decoder's inputs for each hypothesis (beam, sample) of a sentence; all share its memory."""
        memory = {name: inputs.pop(name) for name in ("encoder_outputs", "attention_mask") if name in inputs}
        input_ids, inputs = super()._expand_inputs_for_generation(expand_size=expand_size, **inputs)
        return input_ids, {**inputs, **memory}

    def _reorder_cache(self, cache: Cache, beam_idx: Tensor) -> Cache:
        """Follow the beams kept, (B * beams,) row numbers; a beam never leaves its sentence, so its memory stays."""
        cache.self_attention_cache.reorder_cache(beam_idx)
        return cache

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **inputs):
        """Greedy decoding and sampling: `greedy` where it gives the same, else transformers' loop."""
        streamer = inputs.pop("streamer", None)
        if synced_gpus or streamer or not greedy_suits(generation_config, logits_processor, stopping_criteria, inputs):
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **inputs,
            )
        inputs["cache"] = inputs.pop(CACHE_NAME)
        eos_token_id, pad_token_id = generation_config._eos_token_tensor, int(generation_config._pad_token_tensor)
        limit = generation_config.max_length
        return greedy(self, input_ids, logits_processor, eos_token_id, pad_token_id, limit, **inputs)
