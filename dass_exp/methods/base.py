"""Base classes of pruning methods: a :class:`Pruner` may update weights, a :class:`ScorePruner` only zeroes them."""

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

from dass_exp.errors import NumericalError
from dass_exp.masks import Pattern
from dass_exp.models.decoder import Matrix
from dass_exp.models.families import Role
from dass_exp.statistics import InputNorm, Statistic

StatisticKind = TypeVar("StatisticKind", bound=Statistic)

ALL_SETTINGS = frozenset({"pattern", "scope", "calibration", "seed"})


@dataclass(eq=False)
class LinearView:
    """One weight matrix as methods see it, with the statistic of its input.

    Args:
        name: full name.
        role: what the linear does in its block.
        matrix: where the weight is stored.
        statistic: of the input; None where no stage needs one.
        kind: the type of statistic that the method has declared as ``stat``.
        unit: name of the block or expert that it is pruned with.
        write_s: seconds spent writing the weight.
    """

    name: str
    role: Role
    matrix: Matrix
    statistic: Statistic | None
    kind: type[Statistic] | None = None
    unit: str = ""
    write_s: float = 0.0

    @property
    def weight(self) -> Tensor:
        """The weight, [out_features, in_features], in the model's dtype; do not modify it in place."""
        return self.matrix.weight

    @property
    def stat(self) -> Any:
        """The statistic of the input, which gives what the type that the method declares as ``stat`` gives."""
        if self.statistic is None:
            raise LookupError(f"{self.name}: no statistic was collected; set `stat` on the method")
        return self.statistic if self.kind is None else self.statistic_of(self.kind)

    @property
    def norm(self) -> Tensor:
        """The L2 norm of each input feature over all calibration tokens, float32 [in_features]."""
        return self.statistic_of(InputNorm).norm

    def statistic_of(self, kind: type[StatisticKind]) -> StatisticKind:
        """Return a statistic that gives what this type gives, such as a Gram matrix for the norms of its diagonal.

        Raises:
            LookupError: no stage has declared one.
        """
        part = None if self.statistic is None else self.statistic.part(kind)
        if part is None:
            raise LookupError(f"{self.name}: no {kind.__name__} was collected; a stage declares it as `stat`")
        return cast(StatisticKind, part)

    @property
    def tokens(self) -> int | None:
        """Number of tokens in the statistic; None without one."""
        return None if self.statistic is None else self.statistic.tokens

    def zero(self, keep: Tensor) -> None:
        """Zero the weights where ``keep`` (bool [out, in]) is False; leave the others unchanged, bit for bit."""
        start = time.perf_counter()
        self.matrix.zero(keep)
        self.write_s += time.perf_counter() - start

    def write(self, weight: Tensor) -> None:
        """Replace the weight by ``weight`` [out, in], rounded to the model's dtype."""
        start = time.perf_counter()
        self.matrix.write(weight)
        self.write_s += time.perf_counter() - start


@dataclass(eq=False)
class Block:
    """The linears of one decoder block that are in the scope; in a mixture of experts each expert is its own block.

    Args:
        name: full name of the block or expert.
        linears: their views, in the order of the roles.
    """

    name: str
    linears: list[LinearView]

    def stat(self, role: Role) -> Any:
        """Return the input statistic of the block's linear with this role; LookupError if it is outside the scope."""
        for linear in self.linears:
            if linear.role == role:
                return linear.stat
        raise LookupError(f"{self.name}: role {role.value} does not lie in the scope")


@dataclass
class MaskResult:
    """The mask of one linear, and how it was chosen.

    Args:
        keep: bool [out, in], True where the weight stays.
        dim: the axis along which weights competed (0 output, 1 input, None the matrix).
        low: the lowest score; a tensor stays on its device until the block is verified.
        high: the highest score.
        slab_width: number of input columns that were ranked together, None for all of them.
        damping_retries: how often the damping was raised.
        seconds: time to score, rank and write.
    """

    keep: Tensor
    dim: int | None
    low: float | Tensor
    high: float | Tensor
    slab_width: int | None = None
    damping_retries: int = 0
    seconds: float = 0.0


class Stage:
    """A stage of pruning; subclasses are dataclasses whose fields are its hyper-parameters.

    Attributes:
        stat: the statistic to collect at the input of each linear in the scope; None for a stage that needs none. A
            Gram matrix serves stages that ask for the norms, which are its diagonal.
        solver_bytes: memory that the work on one matrix takes, for each of its weights and, if the statistic is a Gram
            matrix, for each entry of one: what a run needs is compared with what is free before it begins.
        version: part of the key; raise it when the stage's numbers change.
        active: whether the stage does anything; False for the default of its group, which is not part of the key.
    """

    stat: ClassVar[type[Statistic] | None] = None
    solver_bytes: ClassVar[tuple[int, int]] = (10, 8)
    version: ClassVar[int] = 1
    active: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The name in tables and records."""
        return type(self).__name__.lower()

    def stat_of(self, role: Role) -> type[Statistic] | None:
        """Return the statistic that is needed at the input of the linear with this role, by default ``stat``."""
        del role
        return self.stat

    def settings(self) -> dict[str, Any]:
        """Return the hyper-parameters that can change the outcome, in canonical form."""
        return dict(vars(self))


class Pruner(Stage, ABC):
    """A one-shot pruning method.

    Attributes:
        uses: the run settings that can change the outcome; only these enter the record's key.
        updates_weights: whether surviving weights change; if not, they stay as they are, bit for bit.
    """

    uses: ClassVar[frozenset[str]] = ALL_SETTINGS
    updates_weights: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "group" in vars(cls):  # it would be ignored silently, and the wrong weights would compete
            raise TypeError(f"{cls.__name__}.group is now called comparison_dim")

    @property
    def prunes(self) -> bool:
        """Whether the method removes anything; False for the dense baseline."""
        return bool(self.uses)

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        for field, value in settings.items():
            if isinstance(value, Pruner):  # a method nested in this one
                settings[field] = {"name": value.name, "version": value.version, **value.settings()}
        return settings

    def comparison_dim(self, role: Role, pattern: Pattern) -> int | None:
        """Return the axis along which the weights of a linear compete: 0, 1, or None for the whole matrix."""
        del role, pattern
        return 1

    def importance(self, linear: LinearView, block: Block) -> Tensor:
        """Return how much each weight counts where neurons are put in order, float [out, in]: |W| * norm(x)."""
        del block
        return linear.weight.abs() if linear.statistic is None else linear.weight.abs() * linear.norm

    def remark(self, roles: Collection[Role]) -> str:
        """Return a note for readers of the results of this method on these roles, or an empty string."""
        del roles
        return ""

    def prune_block(self, block: Block, pattern: Pattern) -> dict[str, MaskResult]:
        """Prune every linear of ``block`` in place and return the results by the linear's name.

        Raises:
            NumericalError: a matrix is singular, for example; the message names the linear.
        """
        results = {}
        for number, linear in enumerate(block.linears):
            start = time.perf_counter()
            try:
                results[linear.name] = self.prune_linear(linear, block, pattern)
            except NumericalError as error:
                if str(error).startswith(linear.name):
                    raise
                raise NumericalError(f"{linear.name}: {error}") from error
            results[linear.name].seconds = time.perf_counter() - start
            if self.stat is not None and all(other.stat is not linear.stat for other in block.linears[number + 1 :]):
                linear.stat.release()
        return results

    @abstractmethod
    def prune_linear(self, linear: LinearView, block: Block, pattern: Pattern) -> MaskResult:
        """Prune one linear in place."""


class ScorePruner(Pruner):
    """Score the weights, rank them, zero the lowest; surviving weights are unchanged."""

    updates_weights = False

    @abstractmethod
    def score(self, linear: LinearView, block: Block) -> Tensor:
        """Return the importance of each weight, [out, in]; the highest stay."""

    def importance(self, linear: LinearView, block: Block) -> Tensor:
        return self.score(linear, block)

    def prune_linear(self, linear: LinearView, block: Block, pattern: Pattern) -> MaskResult:
        scores = self.score(linear, block)
        low, high = torch.aminmax(scores)
        dim = self.comparison_dim(linear.role, pattern)
        keep = pattern.keep(scores, dim)
        linear.zero(keep)
        return MaskResult(keep, dim, low, high)


def check_statistics(linears: Iterable[LinearView]) -> None:
    """Raise a NumericalError that names the first linear whose statistic is not finite; the host waits once."""
    views = [(linear, linear.statistic) for linear in linears if linear.statistic is not None]
    flags = {statistic: statistic.is_finite() for statistic in dict.fromkeys(statistic for _, statistic in views)}
    if flags and not bool(torch.stack(list(flags.values())).all()):
        for linear, statistic in views:
            statistic.check(linear.name)


def check_range(name: str, low: float | Tensor, high: float | Tensor) -> None:
    """Raise a NumericalError that names the linear unless the range of its scores is finite."""
    if not (-float("inf") < low and high < float("inf")):
        raise NumericalError(f"{name}: its scores or weights hold numbers that are not finite")
