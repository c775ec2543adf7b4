"""Statistics of a linear's inputs, collected while calibration tokens pass through its block.

Every statistic accumulates in float32, one sequence after the other, so the batch size does not change it.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dass_exp.errors import NumericalError
from dass_exp.hessian import HessianFactor, to_feedback

_BAND = 256  # rows of the Gram matrix that are accumulated by one product
_WIDE_BAND = 4096  # of those on an accelerator, which narrow products leave idle
_NO_NORM = 1e-8  # added to norms that divide: an input may be zero at every token


class Statistic(ABC):
    """A sum over the tokens that reach a linear with ``features`` inputs. Linears with the same input share one."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.features = features
        self.sequences = 0
        self.tokens = 0
        self.seconds = 0.0
        self.uniform = False  # whether the sum was discarded, since too few tokens had come

    def update(self, inputs: Tensor) -> None:
        """Add a batch: [sequences, tokens, in_features] or [tokens, in_features], of any float dtype, maybe empty."""
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

    @classmethod
    def of_unit(cls, features: int, device: torch.device, unit: Any) -> "Statistic":
        """Create the statistic at an input of a block or expert (:class:`dass_exp.models.decoder.Unit`)."""
        del unit
        return cls(features, device)

    @classmethod
    def replaces(cls, kind: type["Statistic"]) -> bool:
        """Whether this statistic gives everything that one of type ``kind`` gives."""
        return issubclass(cls, kind)

    def part(self, kind: type["Statistic"]) -> "Statistic | None":
        """Return the statistic that gives what ``kind`` gives, this one or a part of it; None if there is none."""
        return self if self.replaces(kind) else None

    def totals(self) -> list[Tensor]:
        """Return the sums themselves, on their device: those of two sets of sequences add up to those of both."""
        raise NotImplementedError(f"{type(self).__name__} cannot be added up over several processes")

    def count(self, sequences: int, tokens: int) -> None:
        """Set how many sequences and tokens the sums are over."""
        self.sequences, self.tokens = sequences, tokens

    @abstractmethod
    def reset_to_uniform(self) -> None:
        """Discard the sum: all input features become equally important and independent of each other."""

    def reorder(self, order: Tensor) -> None:
        """Put the input features into another order: feature j becomes the former feature ``order[j]``."""
        raise NotImplementedError(f"the features of {type(self).__name__} cannot be reordered")

    def reorder_outputs(self, order: Tensor) -> None:  # noqa: B027
        """Put the output features of the linears that read the input into another order, where the sums know them."""

    def release(self) -> None:  # noqa: B027
        """Free whatever was derived from the sum; it is computed again on demand."""

    @abstractmethod
    def is_finite(self) -> Tensor:
        """Return whether every number of the sum is finite, a 0-dim bool on its device: the host does not wait."""

    def check(self, name: str) -> None:
        """Raise a NumericalError that names the linear ``name`` unless the sum is finite."""
        if not bool(self.is_finite()):
            raise NumericalError(f"{name}: its inputs hold numbers that are not finite; nothing was pruned there")


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

    def totals(self) -> list[Tensor]:
        return [self.squares]

    def reset_to_uniform(self) -> None:
        self.squares.fill_(1)

    def reorder(self, order: Tensor) -> None:
        self.squares = self.squares[order]

    def is_finite(self) -> Tensor:
        return _all_finite(self.squares)


class InputMoments(InputNorm):
    """Norm, sum and variance of each input feature (DSnoT, arXiv 2310.08915)."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self.sums = torch.zeros_like(self.squares)
        self.variances = torch.zeros_like(self.squares)

    def _add(self, sequence: Tensor) -> None:
        super()._add(sequence)
        if len(sequence):  # an expert may see no token of a sequence
            self.sums += sequence.sum(0)
            self.variances += sequence.var(0, correction=0)

    @property
    def sums_per_sequence(self) -> Tensor:
        """The sum over the tokens of a sequence, mean over sequences: float32 [in_features]."""
        return self.sums / max(self.sequences, 1)

    @property
    def variance(self) -> Tensor:
        """The variance over the tokens of a sequence, mean over sequences: float32 [in_features]."""
        return self.variances / max(self.sequences, 1)

    def totals(self) -> list[Tensor]:
        return [self.squares, self.sums, self.variances]

    def reset_to_uniform(self) -> None:
        super().reset_to_uniform()
        self.sums.zero_()
        self.variances.fill_(max(self.sequences, 1))

    def is_finite(self) -> Tensor:
        return super().is_finite() & _all_finite(self.variances)


class NormalisedGram:
    """A Gram matrix scaled to a unit diagonal: in these coordinates every input has norm one.

    Args:
        matrix: float32 [in_features, in_features].
        scale: float32 [in_features]; a weight [out, in] times ``scale`` is the weight in these coordinates.
    """

    def __init__(self, matrix: Tensor, scale: Tensor) -> None:
        self.matrix, self.scale = matrix, scale
        self._inverses: dict[float, Tensor] = {}
        self._eigen: tuple[Tensor, Tensor] | None = None

    def inverse(self, ridge: float) -> Tensor:
        """Return the inverse of ``matrix + ridge * identity``, ``ridge`` > 0, float32; computed once.

        Raises:
            NumericalError: the sum is not positive definite, or not finite.
        """
        if ridge not in self._inverses:
            with one_thread(self.matrix.device):
                damped = self.matrix.clone()
                damped.diagonal().add_(ridge)
                lower, info = torch.linalg.cholesky_ex(damped)
                if not bool((info == 0) & torch.isfinite(lower.diagonal()).all()):
                    raise NumericalError(f"the Gram matrix cannot be inverted with a ridge of {ridge:.3g}")
                self._inverses[ridge] = torch.cholesky_inverse(lower)
        return self._inverses[ridge]

    @property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [in_features] and eigenvectors [in_features, in_features], float32, by way of float64."""
        if self._eigen is None:
            if not bool(torch.isfinite(self.matrix).all()):
                raise NumericalError("the normalised Gram matrix holds numbers that are not finite; lower the damping")
            with one_thread(self.matrix.device):
                values, vectors = torch.linalg.eigh(self.matrix.double())
            self._eigen = values.clamp_min_(0).float(), vectors.float()
        return self._eigen


class Gram(Statistic):
    """The Gram matrix X^T X of the inputs: up to a factor the Hessian of the layer-wise squared error (SparseGPT)."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        # The matrix is symmetric: only bands right of the diagonal are accumulated, which saves two fifths of the time.
        self.upper = torch.zeros(features, features, dtype=torch.float32, device=device)
        self._factors: dict[tuple[float, int], HessianFactor] = {}
        self._normalised: dict[float, NormalisedGram] = {}

    def _add(self, sequence: Tensor) -> None:
        width = _BAND if sequence.device.type == "cpu" else _WIDE_BAND
        for start in range(0, self.features, width):
            band = slice(start, start + width)
            self.upper[band, start:].addmm_(sequence[:, band].T, sequence[:, start:])
        self.release()

    @classmethod
    def replaces(cls, kind: type[Statistic]) -> bool:
        return kind is InputNorm or issubclass(cls, kind)

    @property
    def matrix(self) -> Tensor:
        """float32 [in_features, in_features], a copy."""
        return self.upper.triu() + self.upper.triu(1).T

    @property
    def norm(self) -> Tensor:
        """The L2 norm of each input feature, float32 [in_features]: the root of the diagonal."""
        return self.upper.diagonal().sqrt()

    @property
    def dead(self) -> Tensor:
        """Bool [in_features]: features that were zero at every token."""
        return self.upper.diagonal() == 0

    def factor(self, damping: float, tile: int, tries: int = 6) -> HessianFactor:
        """Factorise the damped Hessian, once for all linears that share the input.

        Args:
            damping: multiple of the mean diagonal that is added to the diagonal.
            tile: columns of a tile; the last tile may have fewer.
            tries: how often the damping may be raised tenfold.

        Raises:
            NumericalError: no damping made the matrix positive definite.
        """
        if (damping, tile) not in self._factors:
            with one_thread(self.upper.device):
                upper, retries = self._factorise(damping, tries)
                self._factors[damping, tile] = HessianFactor(upper, to_feedback(upper, tile), retries)
        return self._factors[damping, tile]

    def normalised(self, damping: float = 0.0) -> NormalisedGram:
        """Scale the Gram matrix to a unit diagonal, once for all linears that share the input.

        Args:
            damping: multiple of the mean diagonal that is added to the diagonal before.
        """
        if damping not in self._normalised:
            matrix = self.matrix
            matrix.diagonal().add_(damping * matrix.diagonal().mean())
            scale = matrix.diagonal().sqrt() + _NO_NORM
            self._normalised[damping] = NormalisedGram(matrix.div_(scale).div_(scale[:, None]), scale)
        return self._normalised[damping]

    def _factorise(self, damping: float, tries: int) -> tuple[Tensor, int]:
        """Return R of the damped Hessian R R^T, and how often the damping was raised."""
        hessian = self.upper.flip(0, 1)  # Cholesky reads the lower triangle: the upper one, flipped
        hessian *= 2.0 / max(self.sequences, 1)  # the scale of the SparseGPT code: it matters next to dead features
        diagonal = hessian.diagonal()
        diagonal[self.dead.flip(0)] = 1.0
        mean = diagonal.mean().double()  # it stays on its device: the host waits once for a factorisation
        added = torch.zeros_like(mean)
        for retry in range(tries + 1):
            # damping=0 leaves nothing to multiply: its first retry starts at one part in a million
            share = 10.0**retry if damping else (10.0 ** (retry - 7) if retry else 0.0)
            target = (damping * mean if damping else mean) * share
            diagonal += target - added
            added = target
            lower, info = torch.linalg.cholesky_ex(hessian)
            # a non-finite number anywhere in a row makes its diagonal entry non-finite
            if bool((info == 0) & torch.isfinite(lower.diagonal()).all()):
                del hessian, diagonal  # at most three such matrices exist at once
                return lower.flip(0, 1), retry
            del lower, info
        raise NumericalError(f"the Hessian stayed singular after its damping was raised {tries} times to {added:.3g}")

    def totals(self) -> list[Tensor]:
        return [self.upper]

    def reset_to_uniform(self) -> None:
        self.upper.zero_().fill_diagonal_(1)
        self.release()

    def reorder(self, order: Tensor) -> None:
        self.upper = self.matrix[order][:, order]
        self.release()

    def release(self) -> None:
        self._factors.clear()
        self._normalised.clear()

    def is_finite(self) -> Tensor:
        return _all_finite(self.upper)


class Several(Statistic):
    """Statistics of several types, collected together."""

    def __init__(self, parts: Sequence[Statistic], features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self.parts = parts

    def _add(self, sequence: Tensor) -> None:
        for part in self.parts:
            part.update(sequence)

    def part(self, kind: type[Statistic]) -> Statistic | None:
        return next((part for part in self.parts if part.replaces(kind)), None)

    def totals(self) -> list[Tensor]:
        return [total for part in self.parts for total in part.totals()]

    def count(self, sequences: int, tokens: int) -> None:
        super().count(sequences, tokens)
        for part in self.parts:
            part.count(sequences, tokens)

    def reset_to_uniform(self) -> None:
        for part in self.parts:
            part.reset_to_uniform()

    def reorder(self, order: Tensor) -> None:
        for part in self.parts:
            part.reorder(order)

    def reorder_outputs(self, order: Tensor) -> None:
        for part in self.parts:
            part.reorder_outputs(order)

    def release(self) -> None:
        for part in self.parts:
            part.release()

    def is_finite(self) -> Tensor:
        return torch.stack([part.is_finite() for part in self.parts]).all()


def needed_kinds(kinds: Iterable[type[Statistic] | None]) -> list[type[Statistic]]:
    """Return the types to collect so that each of ``kinds`` is served, without those that another one replaces."""
    wanted = list(dict.fromkeys(kind for kind in kinds if kind is not None))
    return [kind for kind in wanted if not any(other is not kind and other.replaces(kind) for other in wanted)]


def new_statistic(kinds: Sequence[type[Statistic]], features: int, device: torch.device, unit: Any) -> Statistic:
    """Create a statistic of these types, of which there is at least one, at an input of a block or expert."""
    parts = [kind.of_unit(features, device, unit) for kind in kinds]
    return parts[0] if len(parts) == 1 else Several(parts, features, device)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Use one CPU thread: the last digits of LAPACK's factorisations depend on the number of threads."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _all_finite(values: Tensor) -> Tensor:
    return torch.isfinite(torch.stack(torch.aminmax(values))).all()  # isfinite alone would allocate a copy
