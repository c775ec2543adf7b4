"""Retrain the pruned model of a run: tokens, checkpoints, scores on the way, and what became of its masks."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dass_exp.config.settings import ExpertsConfig
from dass_exp.engine.activation_cache import ActivationCache
from dass_exp.engine.prune import EngineOptions
from dass_exp.engine.verify import AXES, Layer
from dass_exp.evaluate.perplexity import Perplexity, last_hidden_states
from dass_exp.masks import NM
from dass_exp.models.decoder import Decoder, decoder_of
from dass_exp.permute.base import NoOrder
from dass_exp.retrain.relevance import mask_overlap, neuron_norms, rank_correlations
from dass_exp.retrain.student import Student
from dass_exp.retrain.train import TrainingData, TrainingHooks, train, training_order
from dass_exp.runs.context import RunContext
from dass_exp.runs.resolved_run import ResolvedRun
from dass_exp.runs.resume import TRAINING
from dass_exp.storage.checksum import json_digest
from dass_exp.storage.mask_file import PackedMask
from dass_exp.storage.tensor_file import tensors_digest

Score = Callable[[], Mapping[str, Perplexity]]

_GAP = 1e-3  # nats; below, pruning has added no loss that could be won back
_PROBED = 16  # windows that show the intermediate activations


@dataclass(frozen=True)
class DenseState:
    """What is kept of the dense model for its retraining.

    Args:
        weights: of the linears in the scope, [out, in] by name; empty unless the masks are chosen again.
        data: to train on.
    """

    weights: dict[str, Tensor]
    data: TrainingData


def keep_dense(run: ResolvedRun, context: RunContext, model: Any) -> DenseState | None:
    """Keep what retraining needs of a model that is still dense; None if the run retrains nothing."""
    retraining = run.retrain
    if not retraining.active:
        return None
    used, hidden = context.training_windows(run).ids, None
    count = max(retraining.steps * retraining.batch_size, 1)
    if count < len(used):  # less than an epoch: the dense states of the other windows are not needed
        used = used[training_order(len(used), count, run.config.seed)]
    if retraining.loss == "kl":
        steps = math.ceil(len(used) / retraining.batch_size)
        with context.reporter.phase("the dense model on the training windows", steps) as advance:
            hidden = last_hidden_states(model, used, retraining.batch_size, advance)
    sites = run.sites(decoder_of(model, run.spec.roles)) if retraining.relevance else []
    weights = {site.name: site.matrix.weight.clone() for site in sites}
    return DenseState(weights, TrainingData(used, hidden, run.config.seed))


def retrain(
    run: ResolvedRun,
    context: RunContext,
    model: Any,
    masks: Mapping[str, PackedMask],
    before: DenseState,
    score: Score,
    cache: ActivationCache,
) -> dict[str, Any]:
    """Retrain the pruned model in place.

    Args:
        run: says how.
        context: shows progress.
        model: pruned.
        masks: that it keeps, by name of the linear.
        before: what was kept of the dense model.
        score: scores the model on the run's windows.
        cache: where activations wait while masks are chosen again.

    Returns:
        what the record says of it, without the last scores (:func:`with_last_scores`).
    """
    retraining, decoder, seed = run.retrain, decoder_of(model, run.spec.roles), run.config.seed
    probe = before.data.windows[:_PROBED]
    everything = ExpertsConfig(min_tokens=0)  # a few windows need not reach every expert
    options = EngineOptions(
        scope="mlp", batch_size=run.config.calibration.batch_size, roles=run.spec.roles, experts=everything
    )
    curve = [{"step": 0, "loss": None, **_entry(score())}]
    start, earlier = time.perf_counter(), 0.0
    pruned_norms = neuron_norms(model, probe, options) if retraining.relevance else {}
    pruned = {site.name: site.matrix.weight.clone() for site in run.sites(decoder)} if retraining.relevance else {}

    def overlap() -> dict[str, Any]:
        return {"mask_overlap": _overlap(run, context, model, (before.weights, pruned), masks, cache)}

    def scored() -> dict[str, Any]:
        return _entry(score()) | (overlap() if retraining.relevance else {})

    if retraining.steps:
        student = Student(model, decoder, lambda name: masks[name].unpack(), retraining, run.config.scope, seed)
        with context.reporter.phase(f"retraining ({retraining.name})", retraining.steps) as advance:
            hooks = TrainingHooks(scored, advance, _fingerprint(run, before, masks))
            curve += train(student, retraining, before.data, run.work_folder / TRAINING, hooks)
            earlier = hooks.earlier_seconds
        del student
    windows = context.training_windows(run)
    retrained: dict[str, Any] = {"curve": curve, "tokens_sha256": windows.sha256, "windows": len(windows.ids)}
    if retraining.relevance:
        with context.reporter.phase("choosing the masks again"):
            retrained["activation_rank_correlation"] = rank_correlations(
                pruned_norms, neuron_norms(model, probe, options)
            )
            last = overlap()
        retrained |= last
        curve[-1] |= last
    retrained["seconds"] = round(earlier + time.perf_counter() - start, 3)
    return retrained


def with_last_scores(retrained: dict[str, Any], final: Mapping[str, Perplexity]) -> dict[str, Any]:
    """Add the scores of the finished model to its curve, and the share of the gap to the dense model that it closed."""
    *earlier, last = retrained["curve"]
    curve = [*earlier, {**last, **_entry(final)} if final else last]
    return {**retrained, "curve": curve, "gap_closed": _gap_closed(curve, final)}


def _entry(scores: Mapping[str, Perplexity]) -> dict[str, Any]:
    """Return an entry of the curve, by name of the set of windows."""
    entry: dict[str, Any] = {"perplexity": {name: each.value for name, each in scores.items()}}
    compared = {name: each for name, each in scores.items() if each.kl is not None}
    if compared:
        entry["kl"] = {name: each.kl for name, each in compared.items()}
        entry["agreement"] = {name: each.agreement for name, each in compared.items()}
    return entry


def _gap_closed(curve: list[dict[str, Any]], final: Mapping[str, Perplexity]) -> dict[str, float]:
    """Return by set which share of the loss that pruning has added was won back; negative if more was lost."""
    closed = {}
    for name, scores in final.items():
        if scores.ratio is None:
            continue
        start, end = (math.log(entry["perplexity"][name]) for entry in (curve[0], curve[-1]))
        added = start - (end - math.log(scores.ratio))
        if added > _GAP:
            closed[name] = (start - end) / added
    return closed


def _fingerprint(run: ResolvedRun, before: DenseState, masks: Mapping[str, PackedMask]) -> dict[str, Any]:
    """Return what a checkpoint must have been written for: the run, and the very masks, which a GPU may not repeat."""
    bits = {name: mask.bits for name, mask in masks.items()}
    return {
        "identity": json_digest(run.identity),
        "masks": tensors_digest(bits, {"windows": str(len(before.data.windows))}),
    }


def _overlap(
    run: ResolvedRun,
    context: RunContext,
    model: Any,
    weights: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    masks: Mapping[str, PackedMask],
    cache: ActivationCache,
) -> dict[str, float]:
    """Choose the masks again on the dense weights as far as training moved them; the model is left as it was."""
    decoder, (dense, pruned) = decoder_of(model, run.spec.roles), weights
    trained = {site.name: site.matrix.weight.clone() for site in run.sites(decoder)}
    moved = {
        name: _in_order(dense[name], masks[name]) + (trained[name] - pruned[name]) for name in trained
    }  # where a weight was removed both are zero
    stages = dataclasses.replace(run.stages, permute=NoOrder())  # the neurons stand in their order already
    config = run.config.calibration
    options = EngineOptions(run.config.scope, config.batch_size, run.spec.roles, run.config.experts, stages, cache)
    tokens = context.calibration(run)
    how = run.method, run.pattern, options, None if tokens is None else tokens.ids
    try:
        return mask_overlap(model, moved, decoder, how, lambda name: masks[name].unpack(), run.config.seed)
    finally:
        for site in run.sites(decoder):
            site.matrix.write(trained[site.name])


def _in_order(weight: Tensor, mask: PackedMask) -> Tensor:
    """Put the neurons of a dense weight into the order in which those of the pruned one stand."""
    return weight if mask.order is None else weight.index_select(mask.axis, mask.order.long().to(weight.device))


def recount(run: ResolvedRun, decoder: Decoder, layers: list[Layer]) -> list[Layer]:
    """Count again what training may have changed: zeros beyond the mask, and groups with fewer weights than allowed."""
    of_axis = {name: dim for dim, name in AXES.items()}
    weights = {site.name: site.matrix.weight for site in run.sites(decoder)}
    counted = []
    for layer in layers:
        weight, underfull = weights[layer.name], 0
        if isinstance(run.pattern, NM):
            underfull = int(run.pattern.underfull(weight, of_axis[layer.axis]))
        excess = int((weight == 0).sum()) - layer.zeros
        counted.append(dataclasses.replace(layer, excess=excess, underfull=underfull))
    return counted
