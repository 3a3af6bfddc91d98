"""Verify that exported graphs compute what the model computes: run both on batches of several sizes and lengths.

model, runners of the graphs -> largest difference of every output, and whether greedily generated tokens are equal
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..conversion.parity import LOGIT_SCALE
from ..models.mask_predict import mask_predict
from .graphs import PAST, PRESENT, Decoder, Forward, Graph, LengthEncoder, example, text

Runner = Callable[..., dict[str, Tensor]]
TOLERANCE = 1e-4  # for outputs up to LOGIT_SCALE; runtimes add in another order than torch and fuse layers
NEW_TOKENS = 8
# Tokens of the rows of each batch; another number of images for each.
BATCHES = ((9, 4, 7), (5,), (3, 11), (2, 6, 6, 1, 5))
LABELLED = ("logits", "prediction_logits", "start_logits", "end_logits")


def check(
    model: PreTrainedModel, graphs: Sequence[Graph], runners: dict[str, Runner], exact: bool = True
) -> dict[str, Any]:
    """Compare a model with its exported graphs.

    Args:
        model: in float32 and evaluation mode, on the CPU.
        runners: by name of the graph; keyword arguments are its inputs.
        exact: False for quantised graphs, whose differences are recorded whatever they are.

    Returns:
        ``max_abs_difference``, ``max_abs_output``, ``tolerance`` (None if not ``exact``), ``differences`` by output,
        ``same_predictions``, the share of highest scores at the same place, ``greedy_tokens_equal`` for models that
        generate text, and the sizes of the ``batches``.

    Raises:
        ValueError: an output has another shape, is not finite, or differs by more than the tolerance; or other tokens
            are generated.
    """
    comparison = Comparison()
    batches = [fitting(graphs[0], lengths) for lengths in BATCHES]
    equal = []
    with torch.inference_mode():
        for seed, lengths in enumerate(batches):
            if isinstance(graphs[0].module, Forward):
                inputs = example(model, lengths, seed)
                inputs = {name: inputs[name] for name in graphs[0].inputs}
                expected = graphs[0].module(**inputs)
                comparison.add(runners["model"](**inputs), expected)
            else:
                equal.append(same_tokens(model, graphs, runners, lengths, seed, comparison))
    found = comparison.result(exact)
    if equal:
        found["greedy_tokens_equal"] = all(equal)
        if exact and not all(equal):
            raise ValueError("the exported graphs generate other tokens than the model")
    return {**found, "batches": [list(lengths) for lengths in batches]}


def fitting(graph: Graph, lengths: Sequence[int]) -> tuple[int, ...]:
    """Return lengths that leave room for `NEW_TOKENS`."""
    limit = min(graph.limits.values(), default=2**31) - (0 if isinstance(graph.module, Forward) else NEW_TOKENS)
    return tuple(max(1, min(length, limit)) for length in lengths)


class Comparison:
    """Largest differences of outputs over several batches."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}
        self.same, self.count = 0, 0

    def add(self, outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """Compare the outputs of a batch.

        Raises:
            ValueError: one is missing, has another shape or is not finite.
        """
        for name, wanted in expected.items():
            got = outputs[name]
            if got.shape != wanted.shape:
                raise ValueError(
                    f"the exported graph returns {name} of shape {tuple(got.shape)}, the model {tuple(wanted.shape)}"
                )
            difference = (got.float() - wanted.float()).abs().nan_to_num(torch.inf)
            difference = difference.where(got != wanted, 0.0).max().item()  # also of equal infinities
            largest = wanted.float().nan_to_num(posinf=0.0, neginf=0.0).abs().max().item()
            before = self.found.get(name, (0.0, 0.0))
            self.found[name] = (max(before[0], difference), max(before[1], largest))
            if name in LABELLED:
                same = got.argmax(dim=-1) == wanted.argmax(dim=-1)
                self.same, self.count = self.same + int(same.sum()), self.count + same.numel()

    def result(self, exact: bool) -> dict[str, Any]:
        """Return the part of the certificate on outputs; see `check`."""
        for name, (difference, largest) in self.found.items():
            limit = tolerance_for(largest) if exact else torch.finfo(torch.float32).max
            if not difference <= limit:
                raise ValueError(
                    f"the exported graph gives different outputs: {name} differ by {difference:.3g}, the tolerance is "
                    f"{limit:.3g} for {name} up to {largest:.3g}"
                )
        difference, largest = next(iter(self.found.values()))
        return {
            "max_abs_difference": difference,
            "max_abs_output": largest,
            "tolerance": tolerance_for(largest) if exact else None,
            "differences": {name: pair[0] for name, pair in self.found.items()},
            **({"same_predictions": self.same / self.count} if self.count else {}),
        }


def tolerance_for(largest: float) -> float:
    """Return the tolerance for values up to ``largest``."""
    return TOLERANCE * max(1.0, largest / LOGIT_SCALE)


def same_tokens(
    model: PreTrainedModel,
    graphs: Sequence[Graph],
    runners: dict[str, Runner],
    lengths: Sequence[int],
    seed: int,
    comparison: Comparison,
) -> bool:
    """Generate greedily with a model and with its graphs, and compare the scores of every step.

    Returns:
        whether the tokens are equal.
    """
    inputs = text(model.config, lengths, seed, left=isinstance(graphs[0].module, Decoder))
    if isinstance(graphs[0].module, LengthEncoder):
        return same_masked(model, runners, inputs, comparison)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**inputs, **options)
    tokens = expected.sequences[:, -NEW_TOKENS:]
    # The graphs read the model's own tokens, so that one difference does not lead to others.
    scores = list(steps(graphs, runners, inputs, tokens, model.config))
    for wanted, got in zip(expected.logits, scores, strict=True):
        comparison.add({"logits": got}, {"logits": wanted})
    ends = [model.generation_config.eos_token_id]
    ends = [end for part in ends if part is not None for end in (part if isinstance(part, list) else [part])]
    chosen = [score.index_fill(1, torch.tensor(ends, dtype=torch.long), -torch.inf).argmax(dim=-1) for score in scores]
    return torch.equal(torch.stack(chosen, dim=1), tokens)


def steps(graphs: Sequence[Graph], runners: dict[str, Runner], inputs: dict[str, Tensor], tokens: Tensor, config: Any):
    """Yield the scores (B, V) of each of the given new ``tokens`` (B, N), from the graphs with their cache."""
    graph, mask = graphs[-1], inputs["attention_mask"]
    rows = mask.shape[0]
    if len(graphs) == 1:
        fixed, ids, name = {}, inputs["input_ids"], "input_ids"
        state = {}
    else:
        encoded = runners["encoder"](**inputs)
        fixed = {key: value for key, value in encoded.items() if key in graph.inputs}
        ids, name = torch.full((rows, 1), config.decoder_start_token_id), "decoder_input_ids"
        state = {key.replace(PRESENT, PAST): value for key, value in encoded.items() if key.startswith(PRESENT)}
    if not state:
        state = {key: empty(value, rows) for key, value in graph.inputs.items() if key.startswith(PAST)}
    for step in range(tokens.shape[1]):
        output = runners[graph.name](**{name: ids}, attention_mask=mask, **fixed, **state)
        state = {key.replace(PRESENT, PAST): value for key, value in output.items() if key.startswith(PRESENT)}
        yield output["logits"][:, -1]
        ids = tokens[:, step : step + 1]
        if len(graphs) == 1:
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)


def empty(value: Tensor, rows: int) -> Tensor:
    """Return keys or values of no token for ``rows`` rows."""
    return value.new_empty(rows, value.shape[1], 0, value.shape[3])


def same_masked(
    model: PreTrainedModel, runners: dict[str, Runner], inputs: dict[str, Tensor], comparison: Comparison
) -> bool:
    """Compare a mask-predict model and its graphs; the result is whether they predict the same tokens in one pass."""
    encoded = runners["encoder"](**inputs)
    memory = model.get_encoder()(**inputs).last_hidden_state
    wanted = {"memory": memory, "length_logits": model.length_head(memory, inputs["attention_mask"])[0]}
    ids = mask_predict(model, **inputs, iterations=2, length_candidates=1, max_new_tokens=NEW_TOKENS)[:, 1:]
    ids = ids.index_fill(1, torch.tensor([0]), model.config.mask_token_id)
    mask = (ids != model.config.pad_token_id).long()
    target = {"decoder_input_ids": ids, "decoder_attention_mask": mask, "attention_mask": inputs["attention_mask"]}
    got = runners["decoder"](**target, memory=encoded["memory"])
    expected = {"logits": model(**inputs, decoder_input_ids=ids, decoder_attention_mask=mask).logits}
    comparison.add(got, expected)
    comparison.add(encoded, wanted)
    return torch.equal(got["logits"].argmax(dim=-1), expected["logits"].argmax(dim=-1))
