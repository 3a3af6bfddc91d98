"""Low-rank factors of weights by a truncated singular value decomposition.

W (M, N) = U S V -> (U S^1/2) (S^1/2 V) with the R largest singular values; with all of them W is unchanged
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.compressed import factorize
from .structured import require_field


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return matrices (M, R) and (R, N) whose product is the best approximation of a matrix (M, N) of rank R."""
    matrix = weight.detach().double()
    if matrix.shape[0] > 4 * matrix.shape[1]:  # an embedding: the eigenvectors of the smaller product take far less
        values, right = torch.linalg.eigh(matrix.T @ matrix)
        right = right.flip(1)[:, :rank]  # (N, R), of the largest values first
        scale = values.flip(0)[:rank].clamp_min(0).sqrt().sqrt().clamp_min(1e-30)
        return (matrix @ right / scale).to(weight.dtype), (right * scale).T.to(weight.dtype).contiguous()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    scale = values[:rank].sqrt()
    return (left[:, :rank] * scale).to(weight.dtype), (scale[:, None] * right[:rank]).to(weight.dtype)


def modules_of(model: PreTrainedModel, which: str) -> dict[str, nn.Module]:
    """Return the modules to factorise by their names in the base model: "embedding", "linear" or "all"."""
    base, embedding = model.base_model, model.get_input_embeddings()
    found: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        is_table = type(module) is nn.Embedding and module is embedding
        is_linear = type(module) is nn.Linear and name.startswith("layers.")
        if (is_table and which != "linear") or (is_linear and which != "embedding"):
            found[name] = module
    return found


@torch.no_grad()
def factorize_model(model: PreTrainedModel, which: str, rank: int | None, ratio: float | None) -> dict[str, int]:
    """Factorise layers of a model in place, and return their ranks.

    Args:
        which: see `modules_of`.
        rank, ratio: rank, or its fraction of the smaller side of each matrix.

    Raises:
        ValueError: the model has no such layer, or its output layer shares the embedding's weights, or the rank
            exceeds that of a matrix.
    """
    require_field(model, "low_rank", "low_rank")
    if which != "linear" and model.get_output_embeddings() is not None and model.config.tie_word_embeddings:
        raise ValueError(f"low_rank: the output layer of {type(model).__name__} shares the weights of its embeddings")
    found = modules_of(model, which)
    if not found:
        raise ValueError(f'low_rank: {type(model).__name__} has no module for modules "{which}"')
    ranks = {}
    for name, module in found.items():
        most = min(module.weight.shape)
        ranks[name] = max(1, round(ratio * most)) if rank is None else rank
        if ranks[name] > most:
            raise ValueError(f"rank must be at most {most}, the rank of {name}, got {rank}")
    weights = {name: (module.weight, getattr(module, "bias", None)) for name, module in found.items()}
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    factorize(model.base_model, ranks)
    for name, (weight, bias) in weights.items():
        new = model.base_model.get_submodule(name).to(device, dtype)
        tall, wide = factors(weight, ranks[name])
        if hasattr(new, "table"):
            new.table.weight.copy_(tall)
            new.up.weight.copy_(wide.T)
        else:
            new.up.weight.copy_(tall)
            new.down.weight.copy_(wide)
            if bias is not None:
                new.up.bias.copy_(bias)
    model.config.low_rank = {**(model.config.low_rank or {}), **ranks}
    return ranks
