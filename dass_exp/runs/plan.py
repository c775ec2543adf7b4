"""Plan a run without running it: whether its record exists, what it needs, and how long it would take."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dass_exp.config.settings import RunConfig
from dass_exp.errors import UserError
from dass_exp.models.load import is_present
from dass_exp.runs.context import RunContext
from dass_exp.runs.resolve import resolve
from dass_exp.runs.resolved_run import Components, ResolvedRun
from dass_exp.storage.records import Record


@dataclass(frozen=True)
class Plan:
    """One cell of a sweep, not run.

    Args:
        key: of its record; empty where the model could not be found.
        done: whether the record exists.
        seconds: estimate from the costs of similar records; None without any, zero if it is done.
        basis: the records behind the estimate, in words; or why there is none.
        needs: memory and licence of the model, in words; empty if its config file does not state them.
        problem: why the model could not be found; empty if it was.
    """

    key: str
    done: bool
    seconds: float | None
    basis: str
    needs: str = ""
    problem: str = ""


def plan(config: RunConfig, context: RunContext | None = None) -> Plan:
    """Look a run up and estimate its time. No weight is loaded.

    A model that cannot be reached (no network, no access) is planned from what its config file states.

    Raises:
        UserError: the run could not start; the message says why.
    """
    stated = _stated_size(config)
    context = context or RunContext(planning=True)
    try:
        context.find_for_plan(config.model)
    except UserError as error:
        if config.model.parameters is None:
            raise
        work = _work(config, config.model.parameters, Components.of(config))
        return Plan("", done=False, seconds=None, basis=work, needs=stated, problem=str(error))
    run = resolve(config, context)
    if run.finished_record() is not None:
        return Plan(run.key, done=True, seconds=0.0, basis="done", needs=stated)
    needs = "; ".join(filter(None, (stated, _needs(run))))
    like = {"model": run.spec.identity, "device": run.spec.device.type}
    records = [record for record in run.store.records() if like.items() <= record["identity"].items()]
    prune_s, basis = _median(records, run, "prune_s") if run.method.prunes else (0.0, "nothing to prune")
    eval_s, _ = _median(records, run, "eval_s")
    retrain_s = _retraining_seconds(records, run)
    seconds = None if prune_s is None or eval_s is None or retrain_s is None else prune_s + eval_s + retrain_s
    if seconds is None:
        size = sum(parameter.numel() for parameter in context.skeleton(run).parameters())
        basis = f"no like record; {_work(config, size, run)}"
    return Plan(run.key, done=False, seconds=seconds, basis=basis, needs=needs)


def _work(config: RunConfig, parameters: float, components: Components) -> str:
    """Return the arithmetic of a run in words: two operations a parameter and token (Kaplan et al., arXiv 2001.08361).

    Calibration passes each block twice, dense and pruned; scored windows once. Solving is not counted.
    """
    calibration, passes = config.calibration, {"calibration": 0, "windows": 0}
    if components.calibrated:
        passes["calibration"] = 2 * calibration.num_samples * calibration.seq_len
    for _, scored in config.eval.perplexity_sets.values():
        passes["windows"] += scored.context * (scored.max_windows or 0)
    if components.retrain.active:  # a backward pass is two forward ones
        passes["training"] = 3 * components.retrain.steps * components.retrain.batch_size * components.retrain.seq_len
    total = 2 * parameters * sum(passes.values())
    parts = ", ".join(f"{count:,} tokens of {name}" for name, count in passes.items() if count)
    unknown = any(scored.max_windows is None for _, scored in config.eval.perplexity_sets.values())
    more = ", and all windows of the text" if unknown else ""
    return f"about {total / 1e12:,.1f} TFLOP ({parts or 'no tokens'}{more})"


def _needs(run: ResolvedRun) -> str:
    if run.needs is None:
        return ""
    placement = "it is read block by block" if run.streams else "it is loaded whole"
    if not is_present(run.spec.device):
        placement = f"this machine has no {run.spec.device.type}, whose free memory decides how it is loaded"
    return f"this run: {run.needs.summary()} ({run.needs.parts()}); {placement}"


def _stated_size(config: RunConfig) -> str:
    """Describe parameters, memory, licence and context of a model, if its config file states them."""
    model, calibration = config.model, config.calibration
    if model.parameters is None:
        return ""
    half = 2e-9 * model.parameters
    activations = (
        f", and the activations of {calibration.num_samples} x {calibration.seq_len} calibration tokens three times"
    )
    return (
        f"{model.name} ({model.path}): {model.parameters / 1e9:.3g} billion parameters, {half:.1f} GB of memory in "
        f"float16 or bfloat16, {2 * half:.1f} GB in float32 (what dtype=auto is on a CPU)"
        f"{activations if Components.of(config).calibrated else ''}; license: {model.license}; sequences up to "
        f"{model.context} tokens; dtype {model.dtype}, BOS {model.bos}"
    )


def _median(records: list[Record], run: ResolvedRun, cost: str) -> tuple[float | None, str]:
    for similar, basis in _most_similar(records, run, cost):
        if similar:
            return statistics.median(record["cost"][cost] for record in similar), f"median of {len(similar)} {basis}"
    return None, "no like record"


def _retraining_seconds(records: list[Record], run: ResolvedRun) -> float | None:
    """Return the median over records of the same kind of training, scaled to this run's tokens; None without any."""
    retraining = run.retrain
    if not retraining.active or not retraining.steps:
        return 0.0

    def tokens(settings: Mapping[str, Any]) -> int:
        return int(settings["steps"] * settings["batch_size"] * settings["seq_len"])

    own = {"name": retraining.name, **retraining.settings()}
    like = [
        seconds * tokens(own) / tokens(settings)
        for record in records
        if (settings := record["config"].get("retrain") or {}).get("name") == retraining.name
        and tokens(settings)
        and (seconds := record["cost"].get("retrain_s")) is not None
    ]
    return statistics.median(like) if like else None


def _most_similar(records: list[Record], run: ResolvedRun, cost: str) -> Iterator[tuple[list[Record], str]]:
    """Yield similar records and how they are similar, the most similar first."""
    if cost == "eval_s":
        name = run.config.eval.name
        yield [record for record in records if record["config"]["eval"]["name"] == name], f"records with eval={name}"
        return
    same = [record for record in records if record["config"]["method"]["name"] == run.method.name]
    size = run.config.calibration.num_samples, run.config.calibration.seq_len
    sized = [record for record in same if record["calibration"] and _size(record) == size]
    yield sized, "records of this method and calibration size"
    yield same, "records of this method"


def _size(record: Record) -> tuple[int, int]:
    return record["calibration"]["num_samples"], record["calibration"]["seq_len"]
