"""What may be collected at the input of a linear while calibration tokens pass through a block.

Every statistic accumulates in float32, one sequence after the other in a fixed order: the batch size adds no difference of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dass_exp.errors import NumericalError


class Stat(ABC):
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

    def update(self, inputs: Tensor) -> None:
        """Add a batch: ``inputs`` [sequences, tokens, in_features] (or [tokens, in_features], of which there may be none), any float dtype."""
        batch = inputs.detach()[None] if inputs.ndim == 2 else inputs.detach().flatten(0, -3)
        for sequence in batch:
            self._add(sequence.float())
        self.sequences += batch.shape[0]
        self.tokens += batch.shape[0] * batch.shape[1]

    @abstractmethod
    def _add(self, sequence: Tensor) -> None:
        """Add one sequence, float32 [tokens, in_features]."""

    @abstractmethod
    def level(self) -> None:
        """Forget what was seen, and take every input feature for equally important and independent of the others."""

    @abstractmethod
    def check(self, name: str) -> None:
        """Raise a NumericalError that names the linear ``name`` if the sum is not finite."""


class InputNorm(Stat):
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

    def level(self) -> None:
        self.squares.fill_(1)

    def check(self, name: str) -> None:
        _check_finite(self.squares, name)


class Gram(Stat):
    """The Gram matrix X^T X of the inputs: the Hessian of the layer-wise squared error up to a factor (SparseGPT, arXiv 2301.00774)."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self.matrix = torch.zeros(features, features, dtype=torch.float32, device=device)
        self._factors: dict[float, tuple[Tensor, int]] = {}

    def _add(self, sequence: Tensor) -> None:
        self.matrix.addmm_(sequence.T, sequence)
        self._factors.clear()

    @property
    def dead(self) -> Tensor:
        """Bool [in_features]: features that were zero at every token."""
        return self.matrix.diagonal() == 0

    def inverse_factor(self, damping: float, tries: int = 6) -> tuple[Tensor, int]:
        """The upper Cholesky factor U of the inverse of the damped Hessian H: H^-1 = U^T U. Made once for all linears that share the input.

        Args:
            damping: multiple of the mean diagonal that is added to the diagonal.
            tries: how often the damping may be raised tenfold before giving up.

        Returns:
            float32 [in_features, in_features], and how often the damping was raised.

        Raises:
            NumericalError: no damping made the matrix positive definite.
        """
        if damping not in self._factors:
            with _one_thread(self.matrix.device):
                self._factors[damping] = self._factorise(damping, tries)
        return self._factors[damping]

    def _factorise(self, damping: float, tries: int) -> tuple[Tensor, int]:
        hessian = self.matrix * (2.0 / max(self.sequences, 1))  # the scale of the SparseGPT code: it matters beside dead features
        diagonal = hessian.diagonal()
        diagonal[self.dead] = 1.0
        mean = diagonal.mean().item()
        added = 0.0
        for retry in range(tries + 1):
            # an undamped start (damping=0) has nothing to multiply: its first retry begins at one part in a million
            wanted = damping * mean * 10.0**retry if damping else (mean * 10.0 ** (retry - 7) if retry else 0.0)
            diagonal += wanted - added
            added = wanted
            lower, failed = torch.linalg.cholesky_ex(hessian)
            if failed.item():
                continue
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.item() and bool(torch.isfinite(upper).all()):
                return upper, retry
        raise NumericalError(f"the Hessian stayed singular after its damping was raised {tries} times to {added:.3g}")

    def level(self) -> None:
        self.matrix.zero_().fill_diagonal_(1)
        self._factors.clear()

    def check(self, name: str) -> None:
        _check_finite(self.matrix, name)


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
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(f"{name}: its inputs hold numbers that are not finite; nothing was pruned there")
