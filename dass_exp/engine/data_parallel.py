"""Calibration over several processes (torchrun): each passes its share of the sequences on, and sums are added up.

Every process holds the whole model, gets the same statistics, and so chooses the same masks.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed

from dass_exp.errors import UserError
from dass_exp.statistics import Statistic


def processes() -> int:
    """Return how many processes calibrate together: 1 unless torch.distributed was initialised."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def share_of(tokens: Tensor) -> Tensor:
    """Return this process's part of the calibration sequences, int64 [sequences, tokens]; the parts are contiguous.

    Raises:
        UserError: there are fewer sequences than processes.
    """
    if (count := processes()) == 1:
        return tokens
    if len(tokens) < count:
        raise UserError(f"{len(tokens)} calibration sequences for {count} processes: start fewer, or calibrate on more")
    return tokens.tensor_split(count)[distributed.get_rank()]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, in place, by its sum over all processes."""
    if processes() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def add_up_numbers(numbers: list[float], device: torch.device) -> list[float]:
    """Return the sums of these numbers over all processes; ``device`` is where the processes meet."""
    if processes() == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.tolist()


def add_up_statistics(statistics: Iterable[Statistic]) -> None:
    """Replace each statistic by that of the sequences of all processes."""
    if processes() == 1:
        return
    for statistic in statistics:
        totals = statistic.totals()
        add_up(totals)
        counts = torch.tensor([statistic.sequences, statistic.tokens], device=totals[0].device)
        distributed.all_reduce(counts)
        statistic.count(*counts.tolist())
