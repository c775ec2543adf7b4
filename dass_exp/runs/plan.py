"""What a run would do: whether its record is there, and how long it would take, from the costs of earlier records."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from dass_exp.config.settings import Settings
from dass_exp.errors import UserError
from dass_exp.runs.context import Bench, Shelf, SilentReporter
from dass_exp.runs.identity import key_of
from dass_exp.runs.making import finished
from dass_exp.runs.settled import settled
from dass_exp.storage.records import Record, Store


@dataclass(frozen=True)
class Plan:
    """One cell of a sweep, not run.

    Args:
        key: of its record.
        done: whether the record is there.
        seconds: what it would take, from the costs of like records; None where there are none. What is done takes none.
        basis: the records that the estimate comes from, in words; or why nothing more can be told.
        needs: what the model takes, in words; empty where its file does not say.
    """

    key: str
    done: bool
    seconds: float | None
    basis: str
    needs: str = ""


def plan(settings: Settings, shelf: Shelf | None = None) -> Plan:
    """Look a run up and estimate its time. No weight is loaded.

    A model that is not at hand (no network, no access) is planned as far as its file tells.

    Raises:
        UserError: the run could not start; the message says why.
    """
    wanted = _needs(settings)
    try:
        bench = Bench(settings, SilentReporter(), shelf)
    except UserError as error:
        if settings.config.model.parameters is None:
            raise
        return Plan("", done=False, seconds=None, basis=f"the model is not at hand: {error}", needs=wanted)
    settings = bench.settings = settled(settings, bench)
    bench.check(settings)
    store = Store(settings.config.results_dir)
    key = key_of(settings, bench.spec, bench.bos)
    if finished(settings, store, key) is not None:
        return Plan(key, done=True, seconds=0.0, basis="done", needs=wanted)
    how = "it is read block by block" if bench.streams else "it is loaded whole"
    sizes = f"{bench.needs.resident / 1e9:.1f} GB with the model in memory, {bench.needs.streamed / 1e9:.1f} GB block by block ({bench.needs.told()})"
    wanted = f"{wanted}; this run: {sizes}; {how}" if wanted else f"this run: {sizes}; {how}"
    same_model = [record for record in store.records() if record["identity"]["model"] == bench.spec.identity]
    prune_s, basis = _median(same_model, settings, "prune_s") if settings.method.uses else (0.0, "nothing to prune")
    eval_s, _ = _median(same_model, settings, "eval_s")
    known = prune_s is not None and eval_s is not None
    return Plan(
        key, done=False, seconds=(prune_s or 0.0) + (eval_s or 0.0) if known else None, basis=basis, needs=wanted
    )


def _needs(settings: Settings) -> str:
    """Parameters, memory of the weights, licence and context of a model whose file states them."""
    model, cut = settings.config.model, settings.cut
    if model.parameters is None:
        return ""
    half = 2e-9 * model.parameters
    seen = (
        f", and the activations of {cut.num_samples} x {cut.seq_len} calibration tokens three times"
        if settings.method.stat
        else ""
    )
    return (
        f"{model.name} ({model.path}): {model.parameters / 1e9:.3g} billion parameters, {half:.1f} GB of memory in float16 or bfloat16, "
        f"{2 * half:.1f} GB in float32 (what dtype=auto is on a CPU){seen}; license: {model.license}; sequences up to {model.context} tokens; "
        f"dtype {model.dtype}, BOS {model.bos}"
    )


def _median(records: list[Record], settings: Settings, cost: str) -> tuple[float | None, str]:
    for alike, basis in _narrowing(records, settings, cost):
        if alike:
            return statistics.median(record["cost"][cost] for record in alike), f"median of {len(alike)} {basis}"
    return None, "no like record"


def _narrowing(records: list[Record], settings: Settings, cost: str) -> Iterator[tuple[list[Record], str]]:
    """Like records, the most alike first."""
    if cost == "eval_s":
        wanted = settings.config.eval.name
        yield (
            [record for record in records if record["config"]["eval"]["name"] == wanted],
            f"records with eval={wanted}",
        )
        return
    same = [record for record in records if record["config"]["method"]["name"] == settings.method.name]
    size = (settings.cut.num_samples, settings.cut.seq_len)
    yield (
        [record for record in same if record["calibration"] and _size(record) == size],
        "records of this method and calibration size",
    )
    yield same, "records of this method"


def _size(record: Record) -> tuple[int, int]:
    return record["calibration"]["num_samples"], record["calibration"]["seq_len"]
