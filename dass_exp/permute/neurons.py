"""Deal neurons into the groups of an N:M pattern, so that important ones do not compete with each other."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dass_exp.errors import UserError, whole_number
from dass_exp.masks import NM, Pattern, in_descending_order
from dass_exp.models.families import Role
from dass_exp.permute.base import NeuronOrder


@dataclass
class Neurons(NeuronOrder):
    """Deal neurons into groups by their total importance, then improve one slot of all groups at a time.

    Dealing: neurons are sorted by total importance (each linear's divided by its mean, so that all count alike), and
    dealt in turn to the groups, there and back, so that all groups hold about as much. This is the heuristic by which
    RIA deals input channels (ICLR 2024, OpenReview Tr0lPx9woF, section 4.2), here for neurons, whose order is free at
    run time too.

    A round of assignment goes through the slots of a group; for each it takes one neuron out of every group and puts
    them back by the assignment that keeps the most importance (linear sum assignment, as in RIA).

    With attention in the scope, the channels inside each head are dealt too: rows of v, columns of o.

    Args:
        rounds: of assignment after dealing.
    """

    rounds: int = 0
    version = 2  # 2: channels of heads

    def __post_init__(self) -> None:
        whole_number("permute.rounds", self.rounds, least=0)

    def check(self, pattern: Pattern) -> None:
        if not isinstance(pattern, NM):
            raise UserError(
                f"permute=neurons with pattern {pattern.name}: the order of neurons decides only which weights share "
                "an N:M group; choose an N:M pattern, or permute=none"
            )

    def order(self, importance: Mapping[Role, Tensor], pattern: Pattern) -> Tensor:
        if not isinstance(pattern, NM):
            raise TypeError(f"{pattern.name} has no groups")
        scores = torch.cat([_of_mean_one(entry.float()) for entry in importance.values()], dim=1)
        order = deal(scores.sum(1), pattern.m)
        for _ in range(self.rounds):
            for slot in range(pattern.m):
                order = _assign(scores, order, slot, pattern)
        return order


def _of_mean_one(scores: Tensor) -> Tensor:
    """Divide scores by their mean, which is summed row by row: a sum over all would depend on the number of threads."""
    mean = scores.sum(1).double().sum() / scores.numel()
    return scores / mean.clamp_min(torch.finfo(scores.dtype).tiny).to(scores.dtype)


def deal(total: Tensor, size: int) -> Tensor:
    """Deal neurons into groups of ``size`` consecutive ones, the most important first, every second time backwards.

    Args:
        total: importance of each neuron, float [neurons].
        size: neurons in a group; it divides their number.
    """
    parts = in_descending_order(total).view(size, -1).clone()  # part k goes to slot k of the groups
    parts[1::2] = parts[1::2].flip(1)
    return parts.T.reshape(-1)


def _assign(scores: Tensor, order: Tensor, slot: int, pattern: NM) -> Tensor:
    """Return the order after the neurons in one slot of all groups were assigned anew to the groups."""
    from scipy.optimize import linear_sum_assignment

    groups = order.view(-1, pattern.m)
    others = [column for column in range(pattern.m) if column != slot]
    rest = scores[groups[:, others]].sort(1, descending=True).values  # [groups, m - 1, features]
    if pattern.n > rest.shape[1]:
        return order  # everything is kept
    # A neuron that enters a group gains, at each feature, by how much it beats the weakest that would be kept there.
    weakest, entering = rest[:, pattern.n - 1], scores[groups[:, slot]]
    # relu(a - b), summed over features, is half of |a - b| + a - b
    gain = (torch.cdist(entering, weakest, p=1) + entering.sum(1)[:, None] - weakest.sum(1)) / 2
    rows, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    improved = groups.clone()
    improved[torch.as_tensor(columns, device=order.device), slot] = groups[
        torch.as_tensor(rows, device=order.device), slot
    ]
    return improved.reshape(-1)
