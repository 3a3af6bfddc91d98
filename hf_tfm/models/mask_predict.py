"""Mask-predict, non-autoregressive decoding (Ghazvininejad et al. 2019, arXiv:1904.09324).

    training: mask a random number of target tokens; the bidirectional decoder predicts them
    decoding: length from the encoder -> all tokens masked -> predict all -> mask the least sure again -> ... -> done

Shapes: B sentences; S source, T target positions; D = config.hidden_size; V = config.vocab_size; L length candidates.
"""

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from .cross_entropy import IGNORE_INDEX
from .input_checks import readable


def mask_targets(
    labels: Tensor, config: PreTrainedConfig, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask a uniform random number of each target's tokens, at least one (section 3.1).

    Args:
        labels: (B, T), `IGNORE_INDEX` after the end of a sentence.
        noise: (B, T + 1) uniform scores in [0, 1); the first column determines the number of masked tokens, the others
            which ones. Default: from torch's global generator.

    Returns:
        decoder inputs (B, T), labels of the masked tokens only (B, T), attention mask (B, T) of ones and zeros.
    """
    B, T = labels.shape
    if noise is None:
        noise = torch.rand(B, T + 1, device=labels.device)
    real = labels != IGNORE_INDEX
    lengths = real.sum(dim=1)  # (B,)
    count = 1 + (noise[:, 0] * lengths).long().clamp(max=lengths - 1)  # (B,), uniform on 1..length
    rank = noise[:, 1:].masked_fill(~real, 2.0).argsort(dim=1).argsort(dim=1)  # (B, T)
    masked = (rank < count[:, None]) & real
    inputs = labels.masked_fill(~real, config.pad_token_id).masked_fill(masked, config.mask_token_id)
    return inputs, labels.masked_fill(~masked, IGNORE_INDEX), real.long()


def masked_labels(
    labels: Tensor, inputs: Tensor, attention_mask: Tensor | None, config: PreTrainedConfig
) -> tuple[Tensor, Tensor]:
    """Return the labels at masked inputs, `IGNORE_INDEX` elsewhere (B, T), and an attention mask (B, T).

    Args:
        labels, inputs: (B, T); inputs are ``mask_token_id`` at the tokens to predict.
        attention_mask: (B, T); default: 0 at padding.

    Raises:
        ValueError: on a CPU, there are labels but none at a masked input: the decoder would see the answer.
    """
    known, masked = labels != IGNORE_INDEX, inputs == config.mask_token_id
    if readable(inputs) and readable(labels) and known.any() and not (known & masked).any():
        raise ValueError(
            f"a mask-predict model needs mask_token_id = {config.mask_token_id} in decoder_input_ids at the labels to "
            "predict, got none"
        )
    if attention_mask is None:
        attention_mask = (known | (inputs != config.pad_token_id)).long()
    return labels.masked_fill(~masked, IGNORE_INDEX), attention_mask


class LengthHead(nn.Module):
    """Length head: predicts the target length as an offset from the source length (section 3.2).

    The paper predicts it from a special token before the source; here it is predicted from the mean of the encoder's
    output, which needs no change of the input.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.max_offset = config.max_length_offset
        self.output = nn.Linear(config.hidden_size, 2 * self.max_offset + 1)

    def forward(self, memory: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Predict from memory (B, S, D) and mask (B, S): logits (B, 2 * max_offset + 1) and source lengths (B,)."""
        if attention_mask is None:
            attention_mask = torch.ones(memory.shape[:2], dtype=torch.long, device=memory.device)
        weight = attention_mask[..., None].to(memory.dtype)
        lengths = attention_mask.sum(dim=1).long()  # (B,), counted as integers: bfloat16 is exact only up to 256
        mean = (memory * weight).sum(dim=1) / lengths.clamp_min(1)[:, None].to(memory.dtype)  # (B, D)
        return self.output(mean), lengths

    def loss(
        self, memory: Tensor, attention_mask: Tensor | None, hidden: Tensor, target_mask: Tensor | None
    ) -> Tensor:
        """Compute the cross-entropy of the target lengths (B,); 0 for a sentence without target tokens."""
        if target_mask is None:
            target_mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        logits, source_lengths = self(memory, attention_mask)
        target_lengths = target_mask.sum(dim=1).long()  # (B,)
        offset = (target_lengths - source_lengths).clamp(-self.max_offset, self.max_offset) + self.max_offset
        offset = offset.masked_fill(target_lengths == 0, IGNORE_INDEX)
        return nn.functional.cross_entropy(logits.float(), offset, ignore_index=IGNORE_INDEX, reduction="none")

    def candidates(
        self, memory: Tensor, attention_mask: Tensor | None, count: int, longest: int
    ) -> tuple[Tensor, Tensor]:
        """Return the ``count`` most likely target lengths in [1, longest] and their log-probabilities: (B, L) each."""
        logits, source_lengths = self(memory, attention_mask)
        best = logits.float().log_softmax(dim=1).topk(min(count, logits.shape[1]), dim=1)
        return (source_lengths[:, None] + best.indices - self.max_offset).clamp(1, longest), best.values


def mask_predict(
    model: nn.Module,
    inputs: Tensor | None = None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    iterations: int = 10,
    length_candidates: int = 5,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    generation_config: GenerationConfig | None = None,
    **unknown,
) -> Tensor:
    """Decode all tokens in parallel and refine the least confident ones (sections 3.3 and, for lengths, 3.4).

    Args:
        model: a `TfmTransformerForConditionalGeneration` with ``decoding="mask_predict"``.
        inputs: (B, S) source ids; alternatively ``input_ids``.
        attention_mask: (B, S); default: 0 at padding tokens.
        iterations: number of decoder passes, at least 1; 1 is fully parallel, the paper's best is 10.
        length_candidates: number of target lengths decoded in parallel; the one with the highest log-probability
            (length and tokens) per token is returned.
        max_length: maximum length of the result in tokens; default: that of the generation config.
        max_new_tokens: the same without the start token; overrides ``max_length``.

    Returns:
        (B, 1 + T) ids: start token, sentence, padding, as returned by transformers' `generate`.

    Raises:
        ValueError: there is no source, a number is too small, or an argument applies to autoregressive decoding only.
    """
    # Evaluation code passes these to every model; these values request nothing beyond the behaviour implemented here.
    neutral = {"num_beams": (1,), "do_sample": (False,), "use_cache": (True, False), "synced_gpus": (False,)}
    unknown.pop("labels", None)  # in the batch that Seq2SeqTrainer passes; not used by any `generate`
    refused = [name for name, value in unknown.items() if value is not None and value not in neutral.get(name, ())]
    if refused:
        raise ValueError(
            f'{", ".join(refused)}: not an option of decoding="mask_predict" (it has iterations, '
            "length_candidates, max_length, max_new_tokens)"
        )
    source = inputs if inputs is not None else input_ids
    if source is None:
        raise ValueError("mask_predict needs inputs or input_ids of shape (B, S), got None")
    config = model.config
    defaults = generation_config or model.generation_config
    if max_new_tokens is None and max_length is None:
        max_new_tokens, max_length = defaults.max_new_tokens, defaults.max_length or config.max_position_embeddings
    if max_new_tokens is None:
        max_new_tokens = max_length - 1
    for name, value in [
        ("iterations", iterations),
        ("length_candidates", length_candidates),
        ("max_new_tokens (or max_length - 1)", max_new_tokens),
    ]:
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if attention_mask is None:
        attention_mask = (source != config.pad_token_id).long()
    memory = model.get_encoder()(input_ids=source, attention_mask=attention_mask).last_hidden_state  # (B, S, D)
    lengths, sure_of_length = model.length_head.candidates(memory, attention_mask, length_candidates, max_new_tokens)
    B, L = lengths.shape
    tokens, sure = refine(model, memory, attention_mask, lengths.flatten(), iterations)  # (B * L, T)
    # The paper averages over the tokens only; an improbable length then wins if its tokens are easy to predict.
    score = (sure.sum(dim=1).view(B, L) + sure_of_length) / lengths  # (B, L)
    choice = score.argmax(dim=1) + torch.arange(B, device=source.device) * L
    start = tokens.new_full((B, 1), config.decoder_start_token_id)
    return torch.cat([start, tokens[choice]], dim=1)


def refine(
    model: nn.Module, memory: Tensor, memory_mask: Tensor, lengths: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Predict all tokens of targets of given lengths, then re-predict ever fewer, the least confident (section 3.3).

    Args:
        memory: (B, S, D), with ``memory_mask`` (B, S).
        lengths: (B * L,); L consecutive targets share a row of memory.

    Returns:
        tokens (B * L, T), padded, and their log-probabilities (B * L, T), 0 for padding.
    """
    config = model.config
    real = torch.arange(int(lengths.max()), device=memory.device) < lengths[:, None]  # (B * L, T)
    tokens = torch.where(real, config.mask_token_id, config.pad_token_id)
    sure = torch.zeros(tokens.shape, device=memory.device)
    masked = real
    for step in range(iterations):
        hidden = model.get_decoder()(
            input_ids=tokens,
            attention_mask=real,
            encoder_hidden_states=memory,
            encoder_attention_mask=memory_mask,
        ).last_hidden_state
        logits = model.lm_head(hidden).float()  # (B * L, T, V)
        logits[..., config.pad_token_id] = -torch.inf
        logits[..., config.mask_token_id] = -torch.inf
        best, token = logits.max(dim=-1)  # (B * L, T)
        tokens = torch.where(masked, token, tokens)
        sure = torch.where(masked, best - logits.logsumexp(dim=-1), sure)
        # Linear decay: after pass t of n, (n - t) / n of the tokens are masked again.
        count = lengths * (iterations - 1 - step) // iterations
        rank = sure.masked_fill(~real, torch.inf).argsort(dim=1).argsort(dim=1)
        masked = (rank < count[:, None]) & real
        if step + 1 < iterations:
            tokens = tokens.masked_fill(masked, config.mask_token_id)
    return tokens, sure
