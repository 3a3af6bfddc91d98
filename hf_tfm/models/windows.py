"""Shifted windows of a feature map (Liu et al. 2021, arXiv:2103.14030, section 3.2).

    tokens (B, h w, C) -> padded and shifted -> windows (B nW, T, C) -> attention in each -> tokens (B, h w, C)

Shapes: B images; h, w rows and columns of tokens; M side of a window, Mh x Mw where it is smaller; nW windows of an
image in row-major order; T = Mh Mw tokens of a window in row-major order; C hidden size.

Masks and indices depend on sizes only. They are computed once and kept in a bounded cache, not in the modules, so that
no image changes what a later image of another size gives.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FITS = ("transformers", "timm", "torchvision")
MASKED = -100.0  # added to the scores of tokens that only the shift brought together; the authors' value


class Windows(NamedTuple):
    """Layout of windows on a feature map.

    Args:
        grid: (h, w) of the feature map.
        size: (Mh, Mw).
        shift: rows and columns by which the windows are shifted.
        pad_first: pad the feature map before shifting it, not after.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    shift: tuple[int, int]
    pad_first: bool

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of the padded feature map, multiples of the window."""
        (h, w), (Mh, Mw) = self.grid, self.size
        return -(-h // Mh) * Mh, -(-w // Mw) * Mw

    @property
    def count(self) -> int:
        """Number of windows, nW."""
        (h, w), (Mh, Mw) = self.padded, self.size
        return (h // Mh) * (w // Mw)

    @property
    def tokens(self) -> int:
        """Number of tokens of a window, T."""
        return self.size[0] * self.size[1]

    @property
    def is_shifted(self) -> bool:
        """Whether tokens have to be masked."""
        return any(self.shift)


def fit_windows(
    grid: tuple[int, int], window_size: int, shifted: bool, fit: str = "transformers", always_partition: bool = False
) -> Windows:
    """Fit windows to a feature map.

    A feature map that the windows do not divide is padded with zeros at the bottom and on the right; padded tokens are
    attended to, as in every reference. The references differ in

    ==============  ==============  =======================================================================
    fit             order           where a side of the feature map is not larger than M
    ==============  ==============  =======================================================================
    "transformers"  pad, then roll  no shift; windows as large as the smaller side (also the authors' code)
    "timm"          roll, then pad  along this axis no shift; windows as long as this side
    "torchvision"   pad, then roll  along this axis no shift; windows of M, padded
    ==============  ==============  =======================================================================

    transformers 5.24 itself fails where a side is smaller than M.

    Args:
        grid: (h, w).
        window_size: M.
        shifted: shift by M // 2, as in every second block.
        always_partition: windows of M with their shift everywhere, as in transformers' `SwinBackbone` and in the
            authors' detection code.
    """
    M, shift = window_size, window_size // 2 if shifted else 0
    size, shifts = (M, M), (shift, shift)
    if always_partition:
        pass
    elif fit == "timm":
        size = tuple(min(side, M) for side in grid)
        shifts = tuple(shift if side > M else 0 for side in grid)
    elif fit == "torchvision":
        shifts = tuple(shift if side > M else 0 for side in grid)
    elif min(grid) <= M:
        size, shifts = (min(grid), min(grid)), (0, 0)
    return Windows(grid, size, shifts, pad_first=fit != "timm")


def is_traced() -> bool:
    """Return whether torch traces or counts operations, whose tensors must not be kept."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def cached(build: Callable[..., Any]) -> Callable[..., Any]:
    """Cache the tensors that a function of hashable arguments returns."""
    keep = lru_cache(maxsize=64)(build)

    @wraps(build)
    def lookup(*args: Any) -> Any:
        if is_traced():
            return build(*args)
        # A tensor made in inference mode could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            return keep(*args)

    lookup.cache_clear = keep.cache_clear
    return lookup


def pad_map(features: Tensor, windows: Windows) -> Tensor:
    """Pad a feature map (B, h, w, C) to whole windows."""
    (h, w), (padded_h, padded_w) = windows.grid, windows.padded
    if (h, w) == (padded_h, padded_w):
        return features
    return nn.functional.pad(features, (0, 0, 0, padded_w - w, 0, padded_h - h))


def roll_map(features: Tensor, windows: Windows, back: bool = False) -> Tensor:
    """Shift a feature map (B, h, w, C) cyclically to the top left, or ``back``."""
    if not windows.is_shifted:
        return features
    sign = 1 if back else -1
    return features.roll((sign * windows.shift[0], sign * windows.shift[1]), dims=(1, 2))


def split_windows(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Split a feature map into windows: (B, h, w, C) -> (B nW, T, C)."""
    B, h, w, C = features.shape
    Mh, Mw = size
    parts = features.view(B, h // Mh, Mh, w // Mw, Mw, C)
    return parts.transpose(2, 3).reshape(-1, Mh * Mw, C)


def arrange(hidden_states: Tensor, windows: Windows) -> Tensor:
    """Pad, shift and split tokens: (B, h w, C) -> (B nW, T, C)."""
    features = hidden_states.unflatten(1, windows.grid)  # (B, h, w, C)
    if windows.pad_first:
        features = roll_map(pad_map(features, windows), windows)
    else:
        features = pad_map(roll_map(features, windows), windows)
    return split_windows(features, windows.size)


def arrange_back(states: Tensor, windows: Windows) -> Tensor:
    """Invert `arrange`: (B nW, T, C) -> (B, h w, C)."""
    (h, w), (padded_h, padded_w), (Mh, Mw) = windows.grid, windows.padded, windows.size
    parts = states.view(-1, padded_h // Mh, padded_w // Mw, Mh, Mw, states.shape[-1])
    features = parts.transpose(2, 3).reshape(-1, padded_h, padded_w, states.shape[-1])
    if windows.pad_first:
        features = roll_map(features, windows, back=True)[:, :h, :w]
    else:
        features = roll_map(features[:, :h, :w], windows, back=True)
    return features.flatten(1, 2)


class TokenOrder(NamedTuple):
    """Source of each token of a rearrangement.

    Args:
        index: (S,) int64, for each position of the result.
        padding: positions of the result that are padding, int64; None if there are none.
    """

    index: Tensor
    padding: Tensor | None


@cached
def token_orders(windows: Windows, device: torch.device) -> tuple[TokenOrder, TokenOrder]:
    """Return the rearrangements from tokens to windows and back."""
    tokens = windows.grid[0] * windows.grid[1]
    numbers = torch.arange(1, tokens + 1, device=device)
    arranged = arrange(numbers[None, :, None], windows).flatten()  # (nW T,), 0 is padding
    padding = (arranged == 0).nonzero()[:, 0]
    back = arrange_back(torch.arange(len(arranged), device=device).view(windows.count, -1, 1), windows).flatten()
    return TokenOrder((arranged - 1).clamp_min(0), padding if len(padding) else None), TokenOrder(back, None)


class Rearrange(torch.autograd.Function):
    """Rearrange tokens (B, N, C) -> (B, S, C); its gradient is the inverse rearrangement.

    One pass over memory, where a shift along two axes and a split take three: on a CPU it is 3 to 6 times as fast
    (torch 2.14, Zen 4). The gradient of ``index_select`` itself would be a sum.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        states: Tensor, index: Tensor, padding: Tensor | None, back: Tensor, back_padding: Tensor | None
    ) -> Tensor:
        found = states.index_select(1, index)
        return found if padding is None else found.index_fill_(1, padding, 0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        index, padding, back, back_padding = ctx.saved_tensors
        return Rearrange.apply(gradient, back, back_padding, index, padding), None, None, None, None


def to_windows(hidden_states: Tensor, windows: Windows) -> Tensor:
    """Pad, shift and split tokens: (B, h w, C) -> (B nW, T, C)."""
    if is_traced() or hidden_states.is_meta:
        return arrange(hidden_states, windows)
    there, back = token_orders(windows, hidden_states.device)
    return Rearrange.apply(hidden_states, *there, *back).view(-1, windows.tokens, hidden_states.shape[-1])


def from_windows(states: Tensor, windows: Windows) -> Tensor:
    """Invert `to_windows`: (B nW, T, C) -> (B, h w, C)."""
    if is_traced() or states.is_meta:
        return arrange_back(states, windows)
    there, back = token_orders(windows, states.device)
    return Rearrange.apply(states.view(-1, windows.count * windows.tokens, states.shape[-1]), *back, *there)


@cached
def shift_mask(windows: Windows, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the additive mask of shifted windows, (nW, T, T): 0, or `MASKED` for tokens of different regions.

    Along a shifted axis of n tokens the regions are [0, n - M), [n - M, n - shift) and [n - shift, n): the last one
    came from the other end.
    """

    def regions(n: int, M: int, shift: int) -> Tensor:
        position = torch.arange(n, device=device)
        return (position >= n - M).int() + (position >= n - shift).int() if shift else torch.zeros_like(position)

    rows, columns = map(regions, windows.padded, windows.size, windows.shift)
    areas = split_windows((3 * rows[:, None] + columns)[None, :, :, None], windows.size)  # (nW, T, 1)
    differ = areas != areas.transpose(1, 2)  # (nW, T, T)
    return torch.zeros(differ.shape, device=device, dtype=dtype).masked_fill(differ, MASKED)


@cached
def relative_index(size: tuple[int, int], window_size: int, device: torch.device) -> Tensor:
    """Return the row of the position bias table for each pair of tokens of a window, (T, T) int64.

    The table has a row for each offset (dy, dx) in -(M - 1)..M - 1, row-major. A window smaller than M uses the rows
    in the middle, which the authors' code would have made its whole table.
    """
    M = window_size
    position = torch.arange(size[0] * size[1], device=device)
    y, x = position // size[1], position % size[1]  # (T,)
    dy, dx = (axis[:, None] - axis[None, :] + M - 1 for axis in (y, x))  # (T, T)
    return dy * (2 * M - 1) + dx
