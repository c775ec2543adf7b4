"""Put the neurons of MLPs and the channels of attention heads in order: the model computes the same function."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dass_exp.errors import UserError
from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import Block, LinearView, Pruner
from dass_exp.models.families import READER_OF, Role
from dass_exp.permute.base import NeuronOrder

_MOST_CHANGE = 0.05  # of a block's output: rounding in 16-bit types stays far below, a wrong order far above


class Reordered(NamedTuple):
    """Along axis 0 (rows) or 1 (columns) of a weight, index i is the former index ``order[i]``; int64."""

    axis: int
    order: Tensor


def reorder(
    units: list[Block], order: NeuronOrder, method: Pruner, pattern: Pattern, heads: int
) -> dict[str, Reordered]:
    """Put the neurons of each dense MLP, and the channels of each head, in order, with their statistics.

    Args:
        units: of one block.
        order: chooses it.
        method: its scores are what the order is chosen by.
        pattern: the sparsity pattern.
        heads: number of query heads.

    Returns:
        what was reordered, by the name of the linear.

    Raises:
        UserError: the method compares no weights along neurons or channels.
    """
    reordered: dict[str, Reordered] = {}
    for unit in units:
        views = {linear.role: linear for linear in unit.linears}
        found = _reorder_neurons(views, unit, order, method, pattern)
        if Role.V in views and Role.O in views:
            found |= _reorder_channels(views, unit, order, method, pattern, heads)
        reordered |= found
    if not reordered:
        raise UserError(
            f"{units[0].name}: with method={method.name} no group of {pattern.name} lies along neurons or along the "
            "channels of one head, so their order changes nothing; choose permute=none"
        )
    return reordered


def check_unchanged(name: str, before: Tensor, after: Tensor) -> None:
    """Raise a UserError if the output of a dense block depends on the order: the family is not what it seems."""
    change = float((after - before).float().norm() / before.float().norm())
    if not change <= _MOST_CHANGE:
        raise UserError(
            f"{name}: its output changes by {change:.0%} when neurons or channels of heads are put in another order, "
            "so they are not free in this model; choose permute=none"
        )


def _reorder_neurons(
    views: Mapping[Role, LinearView], unit: Block, order: NeuronOrder, method: Pruner, pattern: Pattern
) -> dict[str, Reordered]:
    """Reorder the rows of the linears that write neurons, and the columns of the one that reads them."""
    writers = [views[role] for role in READER_OF if role in views]
    readers = [views[role] for role in dict.fromkeys(READER_OF.values()) if role in views]
    importance = _importance(writers, readers, unit, method, pattern)
    if not writers or not readers or not importance:
        return {}
    new = order.order(importance, pattern)
    return _apply(writers, new, readers, new)


def _reorder_channels(
    views: Mapping[Role, LinearView], unit: Block, order: NeuronOrder, method: Pruner, pattern: Pattern, heads: int
) -> dict[str, Reordered]:
    """Reorder the channels inside each head: rows of v and columns of o, alike for the query heads that share a v."""
    value, output = views[Role.V], views[Role.O]
    channels, shared = output.matrix.in_features // heads, output.matrix.in_features // value.matrix.out_features
    importance = _importance([value], [output], unit, method, pattern)
    if not importance or not isinstance(pattern, NM) or channels % pattern.m:
        return {}  # groups that cross from one head into the next stay as they are
    by_head = {}  # [heads of v, channels, others]
    if Role.V in importance:
        by_head[Role.V] = importance[Role.V].unflatten(0, (-1, channels))
    if Role.O in importance:
        by_head[Role.O] = importance[Role.O].unflatten(0, (-1, shared, channels)).transpose(1, 2).flatten(2)
    new = torch.stack(
        [
            order.order({role: scores[head] for role, scores in by_head.items()}, pattern)
            for head in range(heads // shared)
        ]
    )
    starts = channels * torch.arange(heads, device=new.device)[:, None]
    of_value, of_output = starts[: len(new)] + new, starts + new.repeat_interleave(shared, 0)
    return _apply([value], of_value.flatten(), [output], of_output.flatten())


def _importance(
    writers: list[LinearView], readers: list[LinearView], unit: Block, method: Pruner, pattern: Pattern
) -> dict[Role, Tensor]:
    """Return the scores of the linears whose groups extend along what is reordered, [neurons, others] by role."""
    importance: dict[Role, Tensor] = {}
    for axis, linears in ((0, writers), (1, readers)):
        for linear in linears:
            if method.comparison_dim(linear.role, pattern) == axis:
                scores = method.importance(linear, unit)
                importance[linear.role] = scores if axis == 0 else scores.T
    return importance


def _apply(writers: list[LinearView], rows: Tensor, readers: list[LinearView], columns: Tensor) -> dict[str, Reordered]:
    for linear in writers:
        linear.matrix.reorder_outputs(rows)
    for statistic in {id(linear.statistic): linear.statistic for linear in writers}.values():
        if statistic is not None:
            statistic.reorder_outputs(rows)
    for linear in readers:
        linear.matrix.reorder_inputs(columns)
        if linear.statistic is not None:
            linear.statistic.reorder(columns)
    of_writers = {linear.name: Reordered(0, rows) for linear in writers}
    return of_writers | {linear.name: Reordered(1, columns) for linear in readers}
