"""What a run will really be: where an earlier start of it put the model, and without the tasks that cannot be scored."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from dass_exp.config.settings import Settings
from dass_exp.errors import UserError
from dass_exp.runs.context import Bench
from dass_exp.runs.identity import identity_of, key_of
from dass_exp.runs.making import scratch_folder
from dass_exp.runs.memory import available_memory
from dass_exp.runs.progress import placement_of
from dass_exp.storage.records import Store

log = logging.getLogger(__name__)


def with_config(settings: Settings, **changes: Any) -> Settings:
    """Settings with other values of some fields of the run's config."""
    return dataclasses.replace(settings, config=dataclasses.replace(settings.config, **changes))


def settled(settings: Settings, bench: Bench) -> Settings:
    """The settings that a run goes by. An interrupted run goes on as it began, whatever the memory at hand is now.

    Args:
        settings: as asked for.
        bench: of the run.

    Raises:
        UserError: the run fits in memory in no way, or nothing of it is left.
    """
    without = with_config(settings, eval=dataclasses.replace(settings.config.eval, zeroshot=None))
    asked = settings.config.eval.zeroshot is not None
    for candidate in (settings, without) if asked else (settings,):
        if (before := _placed_before(candidate, bench)) is not None:
            if asked and candidate is without:
                log.warning("zero-shot tasks are left out, as they were when this run was interrupted")
            model = candidate.config.model
            return with_config(
                candidate,
                model=dataclasses.replace(model, placement=before if model.placement == "auto" else model.placement),
            )
    done = (
        None
        if settings.config.rerun
        else Store(settings.config.results_dir).find(key_of(settings, bench.spec, bench.bos))
    )
    if asked and done is None and bench.streams and (why := _too_large(settings, bench)):
        if settings.config.eval.perplexity is None and not settings.method.uses:
            raise UserError(
                f"the model is read block by block, so its zero-shot tasks, which are all that is asked for, cannot be scored: {why}"
            )
        log.warning("the model is read block by block, so zero-shot tasks are left out: %s", why)
        return without
    return settings


def _placed_before(settings: Settings, bench: Bench) -> str | None:
    """Where the model went in an earlier start of this run that did not come to its end; None where there was none."""
    return placement_of(
        scratch_folder(settings, key_of(settings, bench.spec, bench.bos)), identity_of(settings, bench.spec, bench.bos)
    )


def _too_large(settings: Settings, bench: Bench) -> str:
    """Why the saved model cannot be scored on tasks when it is whole; empty where it can."""
    if settings.config.save is None:
        return "save=FOLDER keeps it, to be scored where it fits in memory"
    wanted, free = bench.needs.scored, available_memory(bench.spec.device)
    return (
        ""
        if wanted <= free
        else f"the model alone needs {wanted / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; score {settings.config.save} where it fits"
    )
