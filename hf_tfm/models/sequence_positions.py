"""Kinds of positions of a sequence, chosen by the field ``position_embedding_type`` of a configuration.

    kind            changes                                                 longest sequence
    "sinusoidal"    the embeddings: a fixed vector is added                 any
    "learned"       the embeddings: a learned vector is added               max_position_embeddings
    "rotary"        queries and keys of self-attention: rotated             any
    "alibi"         scores of self-attention: less by the distance          any
    "floater"       as "sinusoidal", and queries, keys and values of every  any
                    attention: the solution of an ODE is added

A kind is one class, see `PositionKind`. Sources: Vaswani et al. 2017 (arXiv:1706.03762, section 3.5); Su et al. 2021
(arXiv:2104.09864); Press et al. 2022 (arXiv:2108.12409); Liu et al. 2020 (arXiv:2003.09229).

Shapes: B sequences; T tokens; S tokens of a memory; D = config.hidden_size; H heads; Dh = D / H; L blocks.
"""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .checks import require_at_least, require_choice
from .ode import Dynamics
from .positions import SinusoidTable

SCOPES = ("all", "input")  # of FLOATER
GROWTH = 64  # positions by which the cached table of FLOATER grows
MASKED = torch.finfo(torch.float16).min  # in every dtype: far below any score, and finite after a cast


class Rotation(NamedTuple):
    """Rotary positions of queries and keys (Su et al. 2021, equation 34).

    Features i and i + Dh / 2 of a head are rotated together, as in transformers' models; in the paper neighbours are,
    which differs by a fixed permutation of features.

    Args:
        cos, sin: (T, 1, Dh) or (B, T, 1, Dh), of the angles.
    """

    cos: Tensor
    sin: Tensor

    def query(self, states: Tensor) -> Tensor:
        """Rotate projected states, (B, T, D) -> (B, T, D)."""
        heads = states.unflatten(-1, (-1, self.cos.shape[-1]))  # (B, T, H, Dh)
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return (heads * self.cos.to(states.dtype) + turned * self.sin.to(states.dtype)).flatten(-2)

    def key(self, states: Tensor) -> Tensor:
        """Rotate projected states, (B, T, D) -> (B, T, D)."""
        return self.query(states)

    def value(self, states: Tensor) -> Tensor:
        """Return the states, (B, T, D)."""
        return states


class Biases(NamedTuple):
    """Position-dependent biases of queries, keys and values (Liu et al. 2020, section 3.3).

    Args:
        of_query, of_key, of_value: (T, D) or (B, T, D).
    """

    of_query: Tensor
    of_key: Tensor
    of_value: Tensor

    def query(self, states: Tensor) -> Tensor:
        """Add the bias to projected states, (B, T, D) -> (B, T, D)."""
        return states + self.of_query.to(states.dtype)

    def key(self, states: Tensor) -> Tensor:
        """Add the bias to projected states, (B, T, D) -> (B, T, D)."""
        return states + self.of_key.to(states.dtype)

    def value(self, states: Tensor) -> Tensor:
        """Add the bias to projected states, (B, T, D) -> (B, T, D)."""
        return states + self.of_value.to(states.dtype)


class BlockPlacement(NamedTuple):
    """Changes of the projections in a block's self-attention and cross-attention; None leaves them unchanged."""

    own: Rotation | Biases | None = None
    memory: Rotation | Biases | None = None


NOWHERE = BlockPlacement()


class PositionKind(nn.Module):
    """A kind of positions: what a stack adds to embeddings, projections and scores. A subclass overrides its part.

    It is created as ``kind(config, num_layers, cross_attention)`` with the configuration of the model, the number L of
    blocks, and whether these attend to a memory, too. Its methods take ``positions``, (T,) or (B, T), and ``end``: all
    positions are below it, and those of shape (T,) are the last T below it; None if that is not known.

    Attributes:
        adds_to_scores: `mask` adds to the scores of attention.
        only_embeds: it changes nothing but the embeddings, so that a table of vectors can replace it.
    """

    adds_to_scores: ClassVar[bool] = False
    only_embeds: bool = False

    @classmethod
    def check(cls, config: Any) -> None:
        """Validate the fields of a configuration that the kind reads.

        Raises:
            ValueError: a field is out of range.
        """

    def forward(self, positions: Tensor, end: int | None = None) -> Tensor | None:
        """Return what is added to the embeddings, (T, D) or (B, T, D); None for nothing."""
        return None

    def placements(
        self, positions: Tensor, end: int | None = None, memory_length: int | None = None
    ) -> list[BlockPlacement] | None:
        """Return what each block applies to its projections; None for nothing.

        Args:
            memory_length: S; keys and values of cross-attention are at positions 0 to S - 1.
        """
        return None

    def mask(self, mask: Tensor | None, positions: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the mask of self-attention with what depends on positions.

        Args:
            mask: bool or additive, broadcastable to (B, H, T, Tk), or None.
            positions: of the queries, (T,) or (B, T); keys: of the keys, (Tk,) or (B, Tk).
            dtype: of a new additive mask.
        """
        return mask

    def prepare(self, length: int) -> None:
        """Compute tables for ``length`` positions in advance, see `prepare_positions`."""

    def similarity(self, positions: Tensor) -> dict[str, Tensor]:
        """Return {label: (T, T)}: how close the model sees each pair of positions (T,), 1 for the same position.

        By default the cosine similarity of what is added to the embeddings.
        """
        return {"embedding": cosines(self(positions))}


def cosines(vectors: Tensor) -> Tensor:
    """Return the cosine similarities of vectors (T, D), (T, T); 0 for a zero vector."""
    vectors = nn.functional.normalize(vectors.float(), dim=-1)
    return vectors @ vectors.T


class SinusoidalPositions(PositionKind):
    """Fixed sines and cosines, added to the embeddings."""

    only_embeds = True

    def __init__(self, config: PreTrainedConfig, num_layers: int, cross_attention: bool = False):
        super().__init__()
        self.sinusoids = SinusoidTable(config.max_position_embeddings, config.hidden_size, config.position_scale)

    def forward(self, positions: Tensor, end: int | None = None) -> Tensor:
        """See `PositionKind`."""
        return self.sinusoids(positions, end)


class LearnedPositions(nn.Embedding, PositionKind):
    """Learned vectors, added to the embeddings (section 3.5, the alternative of table 3 row E; BERT, GPT)."""

    only_embeds = True

    def __init__(self, config: PreTrainedConfig, num_layers: int, cross_attention: bool = False):
        super().__init__(config.max_position_embeddings, config.hidden_size)

    def forward(self, positions: Tensor, end: int | None = None) -> Tensor:
        """See `PositionKind`.

        Raises:
            ValueError: ``end`` exceeds the table.
        """
        if end is not None and end > self.num_embeddings:
            raise ValueError(
                f"the input reaches position {end - 1}, but learned positions end at max_position_embeddings - 1 = "
                f"{self.num_embeddings - 1}: shorten the input or train with a larger max_position_embeddings"
            )
        return super().forward(positions)


class RotaryPositions(PositionKind):
    """Rotations of queries and keys, so that scores depend on distances only (Su et al. 2021)."""

    def __init__(self, config: PreTrainedConfig, num_layers: int, cross_attention: bool = False):
        super().__init__()
        self.num_layers = num_layers
        head_dim = config.hidden_size // config.num_attention_heads
        self.sinusoids = SinusoidTable(config.max_position_embeddings, head_dim)  # of the angles

    @classmethod
    def check(cls, config: Any) -> None:
        """See `PositionKind`."""
        head_dim = config.hidden_size // config.num_attention_heads
        if head_dim % 2:
            raise ValueError(
                f'position_embedding_type="rotary" needs an even hidden_size / num_attention_heads, got {head_dim}'
            )
        if config.attention_score != "dot_product":
            raise ValueError(
                f'position_embedding_type="rotary" needs attention_score="dot_product", got "{config.attention_score}"'
            )

    def placements(
        self, positions: Tensor, end: int | None = None, memory_length: int | None = None
    ) -> list[BlockPlacement]:
        """See `PositionKind`."""
        sin, cos = self.sinusoids(positions, end)[..., None, :].chunk(2, dim=-1)  # (..., T, 1, Dh / 2)
        rotation = Rotation(torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1))
        return [BlockPlacement(own=rotation)] * self.num_layers

    def similarity(self, positions: Tensor) -> dict[str, Tensor]:
        """The score of a query and a key that are equal before rotation, all features alike."""
        cos = self.sinusoids(positions[:, None] - positions).chunk(2, dim=-1)[1]  # (T, T, Dh / 2)
        return {"score of equal query and key": cos.mean(dim=-1)}


class AlibiPositions(PositionKind):
    """Scores of self-attention less the distance times a slope, one per head (Press et al. 2022, section 3).

    In an encoder, which also attends to later tokens, the distance is |i - j|: a sequence read backwards looks alike.
    """

    adds_to_scores = True

    def __init__(self, config: PreTrainedConfig, num_layers: int, cross_attention: bool = False):
        super().__init__()
        self.config = config
        self.register_buffer("slopes", alibi_slopes(config.num_attention_heads), persistent=False)

    def reset_parameters(self) -> None:
        """Fill the table."""
        init.copy_(self.slopes, alibi_slopes(self.config.num_attention_heads))

    def mask(self, mask: Tensor | None, positions: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """See `PositionKind`: (1, H, T, Tk) or (B, H, T, Tk).

        Raises:
            ValueError: the attention implementation takes no additive mask.
        """
        chosen = self.config._attn_implementation
        if chosen not in ("eager", "sdpa"):
            raise ValueError(
                f'position_embedding_type="alibi" runs with attn_implementation="sdpa" or "eager", got "{chosen}"'
            )
        distances = (positions[..., :, None] - keys[..., None, :]).abs()  # (T, Tk) or (B, T, Tk)
        scores = (distances.unsqueeze(-3) * -self.slopes[:, None, None]).to(dtype)  # (..., H, T, Tk)
        scores = scores if scores.ndim == 4 else scores[None]
        if mask is None:
            return scores
        if mask.dtype == torch.bool:
            return torch.where(mask, scores, MASKED)
        return (scores + mask).clamp(min=MASKED)

    def similarity(self, positions: Tensor) -> dict[str, Tensor]:
        """The factor of an attention weight before normalisation, of the heads with the largest and smallest slope."""
        distances = (positions[:, None] - positions).abs()
        names = {"first head": 0, "last head": -1}
        return {f"factor, {name}": (-self.slopes[head] * distances).exp() for name, head in names.items()}


def alibi_slopes(heads: int) -> Tensor:
    """Return the slope of each head, 2^(-8 h / H) for h = 1 .. H, as in the authors' code for any H: (H,)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    # The other heads take every second slope of twice as many.
    slopes += [2.0 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)]
    return torch.tensor(slopes)


class Flow(nn.Module):
    """States that follow one ODE from learned values at position 0, and their table for inference.

    Args:
        shape: (L, n, D), of the states at a position.
        config: has ``floater_step``, ``floater_hidden_size`` and ``floater_adjoint``.
    """

    def __init__(self, shape: tuple[int, ...], config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.start = nn.Parameter(torch.zeros(shape))
        self.dynamics = Dynamics(shape[-1], config.floater_hidden_size or shape[-1])
        self.table: Tensor | None = None  # (N, L, n, D)
        self.table_of: tuple = ()

    def reset_parameters(self) -> None:
        """Start at zero: a new model computes the same as one without these states."""
        init.zeros_(self.start)

    def train(self, mode: bool = True) -> "Flow":
        """Set the mode; training invalidates the table."""
        if mode:
            self.table = None
        return super().train(mode)

    def forward(self, end: int) -> Tensor:
        """Return the states at positions 0 to at least ``end`` - 1, (N, L, n, D), N >= ``end``."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return self.integrate(self.start, end)
        if torch.compiler.is_compiling():  # a graph cannot read the versions of weights
            if self.table is not None and self.table.shape[0] >= end:
                return self.table
            if torch.compiler.is_exporting():
                raise ValueError(f"call prepare_positions(model, {end}) before the export: it holds the table")
        return self.tabulated(end)

    @torch.compiler.disable
    def integrate(self, start: Tensor, count: int, first: int = 0) -> Tensor:
        """Integrate ``start`` (L, n, D) from position ``first`` on: (count, L, n, D)."""
        step, adjoint = self.config.floater_step, self.config.floater_adjoint
        found = self.dynamics.integrate(start.flatten(0, -2), count, step, first, adjoint)
        return found.unflatten(1, start.shape[:-1])

    @torch.compiler.disable
    def tabulated(self, end: int) -> Tensor:
        """Return the table, recomputed if a weight has changed, and extended if it is too short."""
        weights = [*self.parameters()]
        current = tuple((w.data_ptr(), w.dtype, w.device, 0 if w.is_inference() else w._version) for w in weights)
        # Outside of inference mode, because its tensors cannot be used in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            if self.table is None or self.table_of != current:
                self.table, self.table_of = self.integrate(self.start.clone(), -(-end // GROWTH) * GROWTH), current
            elif (known := self.table.shape[0]) < end:
                more = self.integrate(self.table[-1], -(-(end - known) // GROWTH) * GROWTH + 1, known - 1)
                self.table = torch.cat([self.table, more[1:]])
        return self.table


class FloaterPositions(SinusoidalPositions):
    """Sinusoidal positions and the solution of an ODE (Liu et al. 2020).

    With ``floater_scope`` "all", position-dependent biases are added to queries, keys and values of every attention:
    each follows the same ODE from its own learned start, except that keys and values of cross-attention, which are
    positions of the other sequence, have an ODE of their own. With "input", one vector is added to the embeddings.
    All of them are 0 in a new model, which therefore computes the same as one with sinusoidal positions.
    """

    def __init__(self, config: PreTrainedConfig, num_layers: int, cross_attention: bool = False):
        super().__init__(config, num_layers, cross_attention)
        self.only_embeds = config.floater_scope == "input"
        D = config.hidden_size
        # Queries, keys and values of self-attention, and queries of cross-attention.
        shape = (1, 1, D) if self.only_embeds else (num_layers, 4 if cross_attention else 3, D)
        self.flow = Flow(shape, config)
        crosses = cross_attention and not self.only_embeds
        self.memory_flow = Flow((num_layers, 2, D), config) if crosses else None

    @classmethod
    def check(cls, config: Any) -> None:
        """See `PositionKind`."""
        require_choice(config, "floater_scope", SCOPES)
        if config.floater_hidden_size is not None:
            require_at_least(config, ("floater_hidden_size",))

    def forward(self, positions: Tensor, end: int | None = None) -> Tensor:
        """See `PositionKind`."""
        sinusoids = super().forward(positions, end)
        return sinusoids + self.states(positions, end)[..., 0, 0, :] if self.only_embeds else sinusoids

    def states(self, positions: Tensor, end: int | None) -> Tensor:
        """Return the states of the flow at positions, (T, L, n, D) or (B, T, L, n, D)."""
        if end is None:  # reads the device, except in a graph, where the table has to be long enough
            compiling = torch.compiler.is_compiling()
            table = self.flow(self.flow.config.max_position_embeddings if compiling else int(positions.max()) + 1)
            return table[positions]
        table = self.flow(end)
        return table[positions] if positions.ndim == 2 else table[end - positions.shape[0] : end]

    def placements(
        self, positions: Tensor, end: int | None = None, memory_length: int | None = None
    ) -> list[BlockPlacement] | None:
        """See `PositionKind`."""
        if self.only_embeds:
            return None
        own = by_row(self.states(positions, end))
        if self.memory_flow is None or memory_length is None:
            return [BlockPlacement(Biases(*biases[:3])) for biases in own]
        memory = by_row(self.memory_flow(memory_length)[:memory_length])
        return [
            BlockPlacement(Biases(*biases[:3]), Biases(biases[3], *others))
            for biases, others in zip(own, memory, strict=True)
        ]

    def prepare(self, length: int) -> None:
        """See `PositionKind`."""
        with torch.no_grad():
            for flow in (self.flow, self.memory_flow):
                if flow is not None:
                    flow(length)

    @torch.no_grad()
    def similarity(self, positions: Tensor) -> dict[str, Tensor]:
        """Also the cosine similarity of the biases of all blocks."""
        found = super().similarity(positions)
        if self.only_embeds:
            return found
        states = self.states(positions, None)  # (T, L, n, D)
        names = ("queries", "keys", "values")
        return found | {f"biases of {name}": cosines(states[:, :, i].flatten(1)) for i, name in enumerate(names)}


def by_row(states: Tensor) -> list[list[Tensor]]:
    """Split states (..., T, L, n, D) into n tensors (..., T, D) for each of L blocks."""
    rows = states.movedim((-3, -2), (0, 1))  # (L, n, ..., T, D)
    flat, n = rows.flatten(0, 1).unbind(), rows.shape[1]
    return [list(flat[first : first + n]) for first in range(0, len(flat), n)]


POSITIONS: dict[str, type[PositionKind]] = {
    "sinusoidal": SinusoidalPositions,
    "learned": LearnedPositions,
    "rotary": RotaryPositions,
    "alibi": AlibiPositions,
    "floater": FloaterPositions,
}


# Modules of these kinds that a model's ``_init_weights`` initialises by their ``reset_parameters``.
WITH_TABLES = (SinusoidTable, AlibiPositions, Flow, Dynamics)


def check_positions(config: Any) -> None:
    """Validate the fields of a configuration that describe positions.

    Raises:
        ValueError: the kind is unknown, or a field is out of range.
    """
    require_choice(config, "position_embedding_type", POSITIONS)
    POSITIONS[config.position_embedding_type].check(config)


def make_positions(config: Any, num_layers: int, cross_attention: bool = False) -> PositionKind:
    """Create the positions of a stack, see `PositionKind`."""
    return POSITIONS[config.position_embedding_type](config, num_layers, cross_attention)


def prepare_positions(model: nn.Module, length: int) -> None:
    """Compute the tables of a model in evaluation mode for sequences of up to ``length`` tokens.

    Needed before an export, or a compilation in one graph, of a model with FLOATER: the graph holds the table.
    """
    for module in model.modules():
        if isinstance(module, PositionKind):
            module.prepare(length)
