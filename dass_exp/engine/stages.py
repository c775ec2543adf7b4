"""The stages around a method, and what each of them does to a block."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dass_exp.allocation.base import Allocation
from dass_exp.allocation.uniform import Uniform
from dass_exp.config.components import build
from dass_exp.config.settings import STAGE_GROUPS
from dass_exp.errors import UserError
from dass_exp.masks import Pattern
from dass_exp.methods.base import Block, LinearView, MaskResult, Pruner, Stage
from dass_exp.models.decoder import Decoder
from dass_exp.models.families import ROLES_IN_SCOPE, Role
from dass_exp.permute.base import NeuronOrder, NoOrder
from dass_exp.refine.base import Refinement
from dass_exp.refine.none import NoRefinement
from dass_exp.repair.base import NoRepair, Repair
from dass_exp.statistics import Statistic


@dataclass(frozen=True)
class Stages:
    """What is done to a block before and after its method has chosen masks; by default nothing.

    Args:
        allocation: divides the sparsity among the blocks.
        permute: puts the intermediate neurons in order.
        refine: improves the masks.
        repair: changes the surviving weights.
    """

    allocation: Allocation = field(default_factory=Uniform)
    permute: NeuronOrder = field(default_factory=NoOrder)
    refine: Refinement = field(default_factory=NoRefinement)
    repair: Repair = field(default_factory=NoRepair)

    @property
    def active(self) -> dict[str, Stage]:
        """The stages that do something, by the name of their config group."""
        stages = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {name: stage for name, stage in stages.items() if stage.active}

    @property
    def need_dense_weights(self) -> bool:
        """Whether the weights before pruning have to be kept until the block is done."""
        return self.refine.active or self.repair.active

    def kinds(self, method: Pruner, role: Role) -> list[type[Statistic] | None]:
        """Return the statistics that method and stages need at the input of the linear with this role.

        Those of an allocation are not among them: it looks at the dense model before the first block is pruned.
        """
        stages = [stage for group, stage in self.active.items() if group != "allocation"]
        return [stage.stat_of(role) for stage in (method, *stages)] if method.prunes else []

    def solver_bytes(self, method: Pruner) -> tuple[int, int]:
        """Return the memory of the work on one matrix (:attr:`dass_exp.methods.base.Stage.solver_bytes`)."""
        per_weight, per_entry = zip(*(stage.solver_bytes for stage in (method, *self.active.values())), strict=True)
        return max(per_weight), max(per_entry)

    def calibrated(self, method: Pruner) -> bool:
        """Whether calibration tokens are needed."""
        stages = (method, *self.active.values()) if method.prunes else ()
        return any(stage.stat is not None for stage in stages)

    def check(self, method: Pruner, pattern: Pattern, scope: str) -> None:
        """Raise a UserError, with the reason, for a combination that a stage cannot serve. Needs no model."""
        if not method.prunes:
            return
        self.allocation.check(pattern)
        if self.permute.active:
            self.permute.check(pattern)
        if self.refine.active:
            for role in ROLES_IN_SCOPE[scope]:
                self.refine.check(pattern, method.comparison_dim(role, pattern))
            if method.updates_weights:
                raise UserError(
                    f"refine={self.refine.name} with method={method.name}: a mask is refined for dense surviving "
                    "weights, and this method changes them; choose refine=none"
                )


KINDS: dict[str, type[Stage]] = dict(zip(STAGE_GROUPS, (Allocation, NeuronOrder, Refinement, Repair), strict=True))


def pruning_units(
    decoder: Decoder,
    index: int,
    scope: str,
    statistics: Mapping[str, Statistic],
    kind: Callable[[Role], type[Statistic] | None] = lambda role: None,
) -> list[Block]:
    """Group the linears that are pruned together: those of the block, and those of each of its experts.

    Args:
        decoder: of the model.
        index: of the block.
        scope: which linears.
        statistics: by the source of an input.
        kind: the statistic that the method has declared for a role.
    """
    units: dict[str, list[LinearView]] = {}
    for site in decoder.sites(index, scope):
        view = LinearView(site.name, site.role, site.matrix, statistics.get(site.source), kind(site.role), site.unit)
        units.setdefault(site.unit, []).append(view)
    return [Block(name, linears) for name, linears in units.items()]


def build_stages(nodes: Mapping[str, Any]) -> Stages:
    """Build the stages from their config nodes, by group.

    Raises:
        UserError: names the group and what is wrong.
    """
    stages: dict[str, Any] = {group: build(node, KINDS[group], group) for group, node in nodes.items()}
    return Stages(**stages)


def refine_masks(
    linears: Sequence[LinearView],
    dense: Mapping[str, Tensor],
    results: dict[str, MaskResult],
    refinement: Refinement,
    pattern: Pattern,
) -> None:
    """Replace the masks in ``results`` by better ones; weights that come back are dense."""
    for linear in linears:
        result, before = results[linear.name], dense[linear.name]
        keep = refinement.refine(linear, before, result, pattern)
        results[linear.name] = dataclasses.replace(result, keep=keep)
        linear.write(before.masked_fill(~keep, 0))
