"""Recurrent layers and attention scores (Bahdanau et al. 2015, arXiv:1409.0473; Luong et al. 2015, arXiv:1508.04025).

    (B, S, I) -> GRU or LSTM in both directions -> (B, S, 2E);  states (B, T, D) and memory (B, S, 2E) -> scores

GRU and LSTM have the equations of `torch.nn.GRU` and `torch.nn.LSTM`. Bahdanau's and Cho's GRU applies the reset gate
before the recurrent matrix, n = tanh(W x + U (r * h)), and keeps (1 - z) h + z n; torch's applies it after the matrix,
n = tanh(W x + b + r * (U h + c)), and keeps z h + (1 - z) n. Weights of one are not valid in the other.

Shapes: B sentences; S source, T target positions; I input, E encoder, D decoder hidden size; G = 3 D gates of a GRU or
4 D of an LSTM; A size of the keys. Decoder rows may be n B: n consecutive rows, such as beams, share a sentence.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .linear import project

GATES = {"gru": 3, "lstm": 4}
State = tuple[Tensor, ...]  # (h,) of a GRU, (h, c) of an LSTM; (B, D) each


class RecurrentMixin:
    """Before a class of torch.nn: a layer reads its parameters at every call, because tools that offload weights
    replace them where torch does not notice.
    """

    def forward(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run one layer from a state, by default zero: (B, T, I) -> (B, T, D) and the last state."""
        self._flat_weights = [self._parameters[name] for name in self._flat_weights_names]
        initial = () if state is None else tuple(part[None].contiguous() for part in state)  # (1, B, D)
        outputs, last = super().forward(inputs, initial if len(initial) == 2 else initial[0] if initial else None)
        return outputs, tuple(part[0] for part in (last if isinstance(last, tuple) else (last,)))


class GRU(RecurrentMixin, nn.GRU):
    """`torch.nn.GRU` of one layer."""


class LSTM(RecurrentMixin, nn.LSTM):
    """`torch.nn.LSTM` of one layer."""


CELLS = {"gru": GRU, "lstm": LSTM}


def recurrent(cell: str, input_size: int, hidden_size: int) -> GRU | LSTM:
    """Return one layer in one direction, batch first."""
    return CELLS[cell](input_size, hidden_size, batch_first=True)


def gru_step(gates: Tensor, recurrent_gates: Tensor, state: State) -> State:
    """Compute the next state of a GRU from its gates' inputs (B, 3 D), that of the input and that of the state."""
    size = state[0].shape[-1]
    # Split, not sliced: the backward pass of a slice fills a tensor of the whole size.
    gates, new = gates.split((2 * size, size), dim=1)
    recurrent_gates, recurrent_new = recurrent_gates.split((2 * size, size), dim=1)
    reset, update = torch.sigmoid(gates + recurrent_gates).chunk(2, dim=1)
    new = torch.tanh(torch.addcmul(new, reset, recurrent_new))
    return (torch.lerp(new, state[0].to(new.dtype), update),)


def lstm_step(gates: Tensor, recurrent_gates: Tensor, state: State) -> State:
    """Compute the next state of an LSTM from its gates' inputs (B, 4 D), that of the input and that of the state."""
    size = state[0].shape[-1]
    both, new, leave = (gates + recurrent_gates).split((2 * size, size, size), dim=1)
    enter, forget = torch.sigmoid(both).chunk(2, dim=1)
    cell = torch.addcmul(forget * state[1], enter, torch.tanh(new))
    return torch.sigmoid(leave) * torch.tanh(cell), cell


STEPS = {"gru": gru_step, "lstm": lstm_step}


def take(states: Tensor, positions: Tensor) -> Tensor:
    """Return states (B, S, X) at positions (B, S) of the same row: (B, S, X)."""
    B, S = positions.shape
    rows = (positions + S * torch.arange(B, device=positions.device)[:, None]).flatten()
    return states.flatten(0, 1).index_select(0, rows).view(B, S, -1)


def reversal(lengths: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return positions (B, S) that reverse the first ``lengths`` (B,) tokens of each row and leave the rest."""
    B, S = shape
    steps = torch.arange(S, device=device).expand(B, S)
    if lengths is None:
        return S - 1 - steps
    return torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)


class BidirectionalLayer(nn.Module):
    """A GRU or LSTM in each direction; padding at the end of a row is read by both after its last token.

    Args:
        cell: "gru" or "lstm".
        input_size: I.
        hidden_size: E.
    """

    def __init__(self, cell: str, input_size: int, hidden_size: int):
        super().__init__()
        self.forward_rnn = recurrent(cell, input_size, hidden_size)
        self.backward_rnn = recurrent(cell, input_size, hidden_size)

    def forward(self, inputs: Tensor, reverse: Tensor) -> Tensor:
        """Compute (B, S, I) -> (B, S, 2E).

        Args:
            reverse: (B, S) positions that reverse the tokens of each row, see `reversal`.
        """
        forward = self.forward_rnn(inputs)[0]  # (B, S, E)
        backward = self.backward_rnn(take(inputs, reverse))[0]
        return torch.cat([forward, take(backward, reverse)], dim=-1)  # (B, S, 2E)


class AttentionScore(nn.Module):
    """Scores of source positions for a decoder state s, with the annotations h of the encoder.

    additive, concat: v . tanh(W s + U h) (Bahdanau et al., appendix A.1.2; Luong et al. write W and U as one matrix);
    general: s . W h; dot: s . h.

    Args:
        kind: a name of these.
        hidden_size: D.
        memory_size: 2E.
    """

    def __init__(self, kind: str, hidden_size: int, memory_size: int):
        super().__init__()
        self.additive = kind in ("additive", "concat")
        self.key_proj = None if kind == "dot" else nn.Linear(memory_size, hidden_size, bias=False)
        self.query_proj = nn.Linear(hidden_size, hidden_size, bias=False) if self.additive else None
        self.score_vector = nn.Parameter(torch.zeros(hidden_size)) if self.additive else None

    def keys(self, memory: Tensor) -> Tensor:
        """Compute the part that does not depend on the decoder: (B, S, 2E) -> (B, S, A)."""
        return memory if self.key_proj is None else project(self.key_proj, memory)

    def forward(self, states: Tensor, keys: Tensor) -> Tensor:
        """Compute raw scores of states (n B, T, D) and keys (B, S, A): (B, n T, S)."""
        states = states.reshape(keys.shape[0], -1, states.shape[-1])  # (B, n T, D)
        if not self.additive:
            return states @ keys.transpose(1, 2)
        query = project(self.query_proj, states)
        return torch.tanh(query[:, :, None] + keys[:, None]) @ self.score_vector


class AttentiveLayer(nn.Module):
    """A GRU or LSTM that reads, besides its input, the context of its previous state (Bahdanau et al., equations 4 to
    6, with torch's cells): c_t = sum_j softmax(score(s_{t-1}, h_j)) h_j.

    The products with the inputs of all steps, and with the annotations of a sentence instead of their weighted sum at
    every step, are computed before the loop; the loop holds only what depends on the previous state.

    Args:
        cell: "gru" or "lstm".
        input_size: I.
        hidden_size: D.
        memory_size: 2E.
    """

    def __init__(self, cell: str, input_size: int, hidden_size: int, memory_size: int):
        super().__init__()
        gates, self.step = GATES[cell], STEPS[cell]
        self.input_proj = gate_linear(input_size, hidden_size, gates)
        self.context_proj = gate_linear(memory_size, hidden_size, gates, bias=False)
        self.state_proj = gate_linear(hidden_size, hidden_size, gates, recurrent=True)

    def values(self, memory: Tensor) -> Tensor:
        """Compute what each annotation adds to the gates: (B, S, 2E) -> (B, S, G)."""
        return project(self.context_proj, memory)

    def forward(
        self, inputs: Tensor, state: State, score: AttentionScore, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, State, Tensor]:
        """Run over all steps.

        Args:
            inputs: (n B, T, I).
            state: before the first step.
            keys: (B, S, A), of ``score``; values: (B, S, G), of `values`.
            mask: (B, 1, S), added to the scores; None for no padding.

        Returns:
            states (n B, T, D), the last state, and attention probabilities (n B, T, S).
        """
        rows = inputs.shape[0]
        outputs, maps = [], []
        for gates in project(self.input_proj, inputs).unbind(1):  # (n B, G)
            probabilities = attend(score(state[0][:, None], keys), mask)  # (B, n, S)
            context = (probabilities @ values).view(rows, -1)  # (n B, G)
            state = self.step(gates + context, project(self.state_proj, state[0]), state)
            outputs.append(state[0])
            maps.append(probabilities.reshape(rows, 1, -1))
        return torch.stack(outputs, dim=1), state, torch.cat(maps, dim=1)


def attend(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Compute probabilities from scores (B, q, S) and an additive mask (B, 1, S)."""
    return (scores if mask is None else scores + mask).softmax(dim=-1)


def gate_linear(
    input_size: int, hidden_size: int, gates: int, bias: bool = True, recurrent: bool = False
) -> nn.Linear:
    """Return a linear layer to the gates of a cell, (..., I) -> (..., G), that `init_gates` initialises."""
    layer = nn.Linear(input_size, gates * hidden_size, bias=bias)
    layer.gates, layer.recurrent = gates, recurrent
    return layer


def init_gates(
    gates: int, weight: Tensor, bias: Tensor | None, factor: float, recurrent: bool, forget: bool = False
) -> None:
    """Initialise a weight (G, X), each gate on its own, and a bias (G,) to zero.

    Args:
        factor: scale of an input matrix, which is Xavier uniform.
        recurrent: the matrix is orthogonal instead.
        forget: the bias of an LSTM's forget gate is 1 (Jozefowicz et al. 2015, section 2.2).
    """
    if not getattr(weight, "_is_hf_initialized", False):  # an attribute of loaded weights that blocks do not have
        blocks = [torch.empty_like(block) for block in weight.chunk(gates)]
        for block in blocks:
            init.orthogonal_(block) if recurrent else init.xavier_uniform_(block, gain=factor)
        init.copy_(weight, torch.cat(blocks))
    if bias is not None:
        offset = torch.zeros_like(bias)
        if forget:
            offset.view(gates, -1)[1] = 1.0
        init.copy_(bias, offset)


def init_linear(layer: nn.Linear, factor: float) -> None:
    """Initialise a linear layer: those of `gate_linear` by `init_gates`, others Xavier uniform with a zero bias."""
    gates, recurrent = getattr(layer, "gates", 1), getattr(layer, "recurrent", False)
    forget = gates == GATES["lstm"] and not recurrent
    init_gates(gates, layer.weight, layer.bias, factor, recurrent, forget)


def init_layer(layer: "GRU | LSTM", factor: float) -> None:
    """Initialise a layer of torch by `init_gates`."""
    gates = GATES["gru" if isinstance(layer, GRU) else "lstm"]
    init_gates(gates, layer.weight_ih_l0, layer.bias_ih_l0, factor, False, forget=isinstance(layer, LSTM))
    init_gates(gates, layer.weight_hh_l0, layer.bias_hh_l0, factor, True)
