"""What may be collected at the input of a linear while calibration tokens pass through a block.

Every statistic accumulates in float32, one sequence after the other in a fixed order: the batch size adds no difference of its own.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dass_exp.errors import NumericalError

_BAND = 256  # columns of a Gram matrix that are added up at once


class Statistic(ABC):
    """A sum over the tokens that a linear sees; linears with one and the same input share one.

    Args:
        features: in_features of the linear.
        device: where the activations, and so the sum, live.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.features = features
        self.device = device
        self.sequences = 0
        self.tokens = 0
        self.seconds = 0.0

    def update(self, inputs: Tensor) -> None:
        """Add a batch: ``inputs`` [sequences, tokens, in_features] (or [tokens, in_features], of which there may be none), any float dtype."""
        start = time.perf_counter()
        batch = inputs.detach()[None] if inputs.ndim == 2 else inputs.detach().flatten(0, -3)
        for sequence in batch:
            self._add(sequence.float())
        self.sequences += batch.shape[0]
        self.tokens += batch.shape[0] * batch.shape[1]
        self.seconds += time.perf_counter() - start

    @abstractmethod
    def _add(self, sequence: Tensor) -> None:
        """Add one sequence, float32 [tokens, in_features]."""

    @abstractmethod
    def reset_to_uniform(self) -> None:
        """Forget what was seen, and take every input feature for equally important and independent of the others."""

    def release(self) -> None:
        """Let go of what was made from the sum; it is made again when it is asked for."""

    @abstractmethod
    def check(self, name: str) -> None:
        """Raise a NumericalError that names the linear ``name`` if the sum is not finite."""


class InputNorm(Statistic):
    """The L2 norm of each input feature over all calibration tokens (Wanda, arXiv 2306.11695, equation 1)."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self.squares = torch.zeros(features, dtype=torch.float32, device=device)

    def _add(self, sequence: Tensor) -> None:
        self.squares += torch.linalg.vector_norm(sequence, dim=0).square_()

    @property
    def norm(self) -> Tensor:
        """float32 [in_features]."""
        return self.squares.sqrt()

    def reset_to_uniform(self) -> None:
        self.squares.fill_(1)

    def check(self, name: str) -> None:
        _check_finite(self.squares, name)


@dataclass(frozen=True)
class Factor:
    """What makes the columns to the right of a tile (columns that are pruned together) make up for what was lost in it.

    With the damped Hessian H = R R^T, R upper triangular, SparseGPT's U, the Cholesky factor of the inverse Hessian, is the inverse of R. Before tile T is
    pruned its weights are w_T + lost @ feedback[:, T], lost = w - pruned of all columns before it: the numbers of algorithm 1 of the paper (arXiv
    2301.00774), which spreads each error by a row of U, with one factorisation instead of two and an inverse.

    Args:
        feedback: float32 [in_features, in_features]. Above the tiles of the diagonal R[:, T] R[T, T]^-1; in them R_jk / R_kk, for the same sum inside a tile
            once its mask is known.
        diagonal: float32 [in_features], R_jj = 1 / U_jj.
        retries: how often the damping was raised.
    """

    feedback: Tensor
    diagonal: Tensor
    retries: int


class Gram(Statistic):
    """The Gram matrix X^T X of the inputs: the Hessian of the layer-wise squared error up to a factor (SparseGPT, arXiv 2301.00774)."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        # The matrix is symmetric: what lies below the diagonal, but for a band, is not added up (two fifths of the time).
        self.upper = torch.zeros(features, features, dtype=torch.float32, device=device)
        self._factors: dict[tuple[float, int], Factor] = {}

    def _add(self, sequence: Tensor) -> None:
        for start in range(0, self.features, _BAND):
            band = slice(start, start + _BAND)
            self.upper[band, start:].addmm_(sequence[:, band].T, sequence[:, start:])
        self._factors.clear()

    @property
    def matrix(self) -> Tensor:
        """float32 [in_features, in_features], a copy."""
        return self.upper.triu() + self.upper.triu(1).T

    @property
    def dead(self) -> Tensor:
        """Bool [in_features]: features that were zero at every token."""
        return self.upper.diagonal() == 0

    def factor(self, damping: float, tile: int, tries: int = 6) -> Factor:
        """The damped Hessian's factor. Made once for all linears that share the input.

        Args:
            damping: multiple of the mean diagonal that is added to the diagonal.
            tile: columns of a tile; the last tile may have fewer.
            tries: how often the damping may be raised tenfold before giving up.

        Raises:
            NumericalError: no damping made the matrix positive definite.
        """
        if (damping, tile) not in self._factors:
            with _one_thread(self.upper.device):
                upper, retries = self._factorise(damping, tries)
                self._factors[damping, tile] = Factor(upper, _feed_back(upper, tile), retries)
        return self._factors[damping, tile]

    def _factorise(self, damping: float, tries: int) -> tuple[Tensor, int]:
        """R of the damped Hessian R R^T, and how often the damping was raised."""
        hessian = self.upper.flip(0, 1)  # Cholesky reads the lower triangle: backwards, the upper one
        hessian *= 2.0 / max(self.sequences, 1)  # the scale of the SparseGPT code: it matters beside dead features
        diagonal = hessian.diagonal()
        diagonal[self.dead.flip(0)] = 1.0
        mean = diagonal.mean().item()
        added = 0.0
        for retry in range(tries + 1):
            # an undamped start (damping=0) has nothing to multiply: its first retry begins at one part in a million
            wanted = damping * mean * 10.0**retry if damping else (mean * 10.0 ** (retry - 7) if retry else 0.0)
            diagonal += wanted - added
            added = wanted
            lower, failed = torch.linalg.cholesky_ex(hessian)
            if not failed.item() and bool(
                torch.isfinite(lower.diagonal()).all()
            ):  # each number of a row enters its diagonal
                del hessian, diagonal  # no more than three such matrices at once
                return lower.flip(0, 1), retry
        raise NumericalError(f"the Hessian stayed singular after its damping was raised {tries} times to {added:.3g}")

    def reset_to_uniform(self) -> None:
        self.upper.zero_().fill_diagonal_(1)
        self.release()

    def release(self) -> None:
        self._factors.clear()

    def check(self, name: str) -> None:
        _check_finite(self.upper, name)


def _feed_back(upper: Tensor, tile: int) -> Tensor:
    """Turn R into the ``feedback`` of a :class:`Factor`, in place and some tiles at a time; returns R's diagonal."""
    diagonal = upper.diagonal().clone()
    features, some = len(upper), max(1, 4 * _BAND // tile) * tile
    whole = features // tile * tile
    for first, last, width in (
        *((start, min(start + some, whole), tile) for start in range(0, whole, some)),
        (whole, features, features - whole),
    ):
        if first < last:
            tiles = upper[:last, first:last].unflatten(1, (-1, width))  # [in, tiles, width]; below them R is zero
            corners = (
                tiles[first:].unflatten(0, (-1, width)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            )  # [tiles, width, width]
            units = corners / diagonal[first:last].view(-1, 1, width)
            inverse = torch.linalg.solve_triangular(
                corners, torch.eye(width, device=upper.device).expand_as(corners), upper=True
            )
            tiles.copy_((tiles.transpose(0, 1) @ inverse).transpose(0, 1))
            corners.copy_(units)
    return diagonal


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """LAPACK's factorisations differ in their last digits between numbers of threads, and what is made from them with them; products do not."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_finite(values: Tensor, name: str) -> None:
    if not bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):  # isfinite itself would copy them
        raise NumericalError(f"{name}: its inputs hold numbers that are not finite; nothing was pruned there")
