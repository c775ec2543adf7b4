"""What training does to the structure that pruning found: whether the same method would still choose it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import scipy.stats
import torch
from torch import Tensor, nn

from dass_exp.engine.callbacks import BlockReport, Callback, SeedEachBlock
from dass_exp.engine.prune import EngineOptions, prune_model
from dass_exp.masks import Pattern, Unstructured
from dass_exp.methods.base import Block, LinearView, Pruner, ScorePruner
from dass_exp.models.decoder import Decoder
from dass_exp.models.families import READER_OF
from dass_exp.statistics import InputNorm


class MaskOverlap(Callback):
    """Compares the masks that are chosen now with those that were kept.

    Args:
        kept: bool [out, in] by name of the linear.
    """

    def __init__(self, kept: Callable[[str], Tensor]) -> None:
        self._kept = kept
        self._counts: dict[str, list[int]] = {}

    def on_block_end(self, report: BlockReport) -> None:
        """Count the weights that both masks keep, and those that one of them does."""
        for linear in report.linears:
            now, before = report.results[linear.name].keep.cpu(), self._kept(linear.name)
            counts = self._counts.setdefault(linear.role.value, [0, 0])
            counts[0] += int((now & before).sum())
            counts[1] += int((now | before).sum())

    def by_role(self) -> dict[str, float]:
        """Return the Jaccard index of the kept weights by role: 1 if the masks are equal."""
        return {role: both / either if either else 1.0 for role, (both, either) in self._counts.items()}


class _Observer(ScorePruner):
    """Collects the norms of all inputs; with a pattern that removes nothing, every weight stays."""

    stat = InputNorm

    def score(self, linear: LinearView, block: Block) -> Tensor:
        del block
        return linear.weight.abs()


class _NeuronNorms(Callback):
    """Collects by block the L2 norm of each intermediate activation, the input of the MLP's last linear."""

    def __init__(self) -> None:
        self.norms: dict[int, list[Tensor]] = {}

    def on_block_end(self, report: BlockReport) -> None:
        for linear in report.linears:
            if linear.role in READER_OF.values():
                self.norms.setdefault(report.index, []).append(linear.norm.float().cpu())


def mask_overlap(
    model: nn.Module,
    moved: Mapping[str, Tensor],
    decoder: Decoder,
    how: tuple[Pruner, Pattern, EngineOptions, Tensor | None],
    kept: Callable[[str], Tensor],
    seed: int,
) -> dict[str, float]:
    """Prune the dense weights as far as training has moved them, and compare the masks with those that were kept.

    Removed weights are at their dense value, surviving ones at their dense value plus what training added to them. So
    a training that changes nothing gives 1 for every method. The model is left pruned anew; restore it afterwards.

    Args:
        model: any state of it.
        moved: these weights, [out, in] by name of the linear.
        decoder: of the model.
        how: method, pattern, options and calibration tokens of the run.
        kept: the masks of the run, bool [out, in] by name of the linear.
        seed: of the run.

    Returns:
        the Jaccard index by role.
    """
    method, pattern, options, tokens = how
    for index in range(len(decoder.blocks)):
        for site in decoder.sites(index, options.scope):
            site.matrix.write(moved[site.name])
    overlap = MaskOverlap(kept)
    prune_model(model, tokens, method, pattern, options, [SeedEachBlock(seed), overlap])
    return overlap.by_role()


def neuron_norms(model: nn.Module, tokens: Tensor, options: EngineOptions) -> dict[int, list[Tensor]]:
    """Return the norms of the intermediate activations, float32 [neurons] for each MLP of a block, by block.

    ``tokens`` is int64 [sequences, tokens]. No weight is changed.
    """
    collected = _NeuronNorms()
    prune_model(model, tokens, _Observer(), Unstructured(0.0), options, [collected])
    return collected.norms


def rank_correlations(before: Mapping[int, list[Tensor]], after: Mapping[int, list[Tensor]]) -> list[float | None]:
    """Return Spearman's rank correlation of the norms of each block; None where all are equal."""
    pairs = [(torch.cat(before[index]), torch.cat(after[index])) for index in sorted(before)]
    found: list[Any] = [scipy.stats.spearmanr(first.numpy(), second.numpy()).statistic for first, second in pairs]
    return [None if math.isnan(value) else float(value) for value in found]
