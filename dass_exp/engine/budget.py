"""Divide a budget of sparsity among the blocks of a dense model, before the first of them is pruned."""

from collections.abc import Sequence

from dass_exp.allocation.base import Allocation, BlockProfile
from dass_exp.engine.capture import Batch
from dass_exp.engine.data_parallel import add_up_statistics
from dass_exp.engine.observers import observe_inputs
from dass_exp.engine.stages import pruning_units
from dass_exp.masks import Pattern
from dass_exp.methods.base import check_statistics
from dass_exp.models.decoder import Decoder
from dass_exp.models.streamed import BlockLoader


def block_patterns(
    decoder: Decoder,
    batches: Sequence[Batch],
    allocation: Allocation,
    pattern: Pattern,
    scope: str,
    blocks: BlockLoader,
) -> list[Pattern]:
    """Return the pattern of each block. An allocation that differs between blocks looks at all of them first.

    Args:
        decoder: of the dense model.
        batches: calibration batches in front of the first block; they are left as they are.
        allocation: divides the budget.
        pattern: the budget.
        scope: what is pruned.
        blocks: loads the weights of each block.
    """
    if not allocation.active:
        return [pattern] * len(decoder.blocks)
    passing = [batch.copy() for batch in batches] if allocation.stat is not None else []
    profile = []
    for index, block in enumerate(decoder.blocks):
        blocks.load(index)
        tokens = passing[0].tokens if passing else 0
        with observe_inputs(decoder, index, scope, lambda role: [allocation.stat_of(role)], tokens) as statistics:
            for batch in passing:
                batch.hidden = batch.run_block(block, index)
        add_up_statistics(statistics.values())
        units = pruning_units(decoder, index, scope, statistics)
        linears = [linear for unit in units for linear in unit.linears]
        check_statistics(linears)
        profile.append(BlockProfile(allocation.measure(linears), tuple(linear.weight.numel() for linear in linears)))
        blocks.release(index)
    return allocation.budget(profile, pattern)
