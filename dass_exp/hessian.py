"""The factor of a damped Hessian in the form in which SparseGPT and Thanos use it."""

from dataclasses import dataclass

import torch
from torch import Tensor

_COLUMNS = 1024  # per iteration: several tiles, to bound the memory


@dataclass(frozen=True)
class HessianFactor:
    """The factor R of the damped Hessian H = R R^T (R upper triangular), in the form in which SparseGPT uses it.

    SparseGPT's U, the Cholesky factor of the inverse Hessian, is the inverse of R. A tile is a range of columns pruned
    together. Before tile T is pruned, its weights are w_T + lost @ feedback[:, T], where lost = w - pruned for all
    columns before T. These are the numbers of algorithm 1 of the paper (arXiv 2301.00774), which spreads each error by
    a row of U, with one factorisation instead of two and an inverse.

    Args:
        feedback: float32 [in_features, in_features]: R[:, T] R[T, T]^-1 above the diagonal tiles, and R_jk / R_kk
            inside them, for the same sum within a tile once its mask is known.
        diagonal: float32 [in_features], R_jj = 1 / U_jj.
        retries: how often the damping was raised.
    """

    feedback: Tensor
    diagonal: Tensor
    retries: int


def to_feedback(upper: Tensor, tile: int) -> Tensor:
    """Turn R into the ``feedback`` of a :class:`HessianFactor`, in place, and return R's diagonal."""
    diagonal = upper.diagonal().clone()
    features = len(upper)
    whole = features // tile * tile
    step = max(1, _COLUMNS // tile) * tile
    spans = [(start, min(start + step, whole), tile) for start in range(0, whole, step)]
    if whole < features:
        spans.append((whole, features, features - whole))
    for first, last, width in spans:
        tiles = upper[:last, first:last].unflatten(1, (-1, width))  # [in, tiles, width]; R is zero below them
        corners = tiles[first:].unflatten(0, (-1, width)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        units = corners / diagonal[first:last].view(-1, 1, width)  # [tiles, width, width], as the corners
        identity = torch.eye(width, device=upper.device).expand_as(corners)
        inverse = torch.linalg.solve_triangular(corners, identity, upper=True)
        tiles.copy_((tiles.transpose(0, 1) @ inverse).transpose(0, 1))
        corners.copy_(units)
    return diagonal
