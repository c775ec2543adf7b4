"""The identity of a run, which defines when two runs are the same: for the key, resume state, plan and report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dass_exp.data import assets
from dass_exp.engine.prune import ENGINE_VERSION
from dass_exp.evaluate import EVALUATION_VERSION
from dass_exp.evaluate.zeroshot import lm_eval_version

if TYPE_CHECKING:
    from dass_exp.runs.resolve import ResolvedRun

_STARVED = {"uniform": "level", "raise": "refuse"}  # as identities spelt them before they were renamed


def key_of(identity: Mapping[str, Any]) -> str:
    """Hash an identity to 16 hex digits; runs that must give equal numbers have the same, on any machine."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def identity_of(run: ResolvedRun) -> dict[str, Any]:
    """Return everything that can change a number of the run, in canonical form, without what its method ignores.

    It has no setting marked :data:`dass_exp.config.settings.NO_EFFECT`; a test compares the two.
    """
    config, method, spec = run.config, run.method, run.spec
    identity: dict[str, Any] = {
        "model": spec.identity,
        "roles": dict(spec.roles) if spec.roles else None,
        "dtype": spec.dtype_name,
        "device": spec.device.type,
        "bos": run.bos,
        "method": {
            "class": f"{type(method).__module__}.{type(method).__qualname__}",
            "version": method.version,
            **method.settings(),
        },
        "eval": _evaluation(run),
    }
    if method.prunes:
        identity["engine"] = ENGINE_VERSION
    if "pattern" in method.uses:
        identity["pattern"] = run.pattern.settings()
    if "scope" in method.uses:
        identity["scope"] = config.scope
    if "calibration" in method.uses:
        calibration = config.calibration
        names = ["sampling", "num_samples", "seq_len", *(["separator"] if calibration.sampling == "joined" else [])]
        cut = {name: getattr(calibration, name) for name in names}
        identity["calibration"] = {"text": run.calibration_text.identity, **cut}
        if spec.family is not None and spec.family.experts is not None:
            experts = dataclasses.asdict(config.experts)
            identity["experts"] = {**experts, "starved": _STARVED[config.experts.starved]}
    if spec.trained:
        identity["trained"] = dict(spec.trained)
    if config.repeat:
        identity["repeat"] = config.repeat
    if "seed" in method.uses:
        identity["seed"] = config.seed
    return identity


def _evaluation(run: ResolvedRun) -> dict[str, Any]:
    identity: dict[str, Any] = {}
    evaluation, text = run.config.eval, run.evaluation_text
    if (scored := evaluation.perplexity) is not None and text is not None:
        cut = {"context": scored.context, "max_windows": scored.max_windows}
        identity["perplexity"] = {"text": text.identity, **cut}
    if (zeroshot := evaluation.zeroshot) is not None:
        offline = zeroshot.data == "offline"
        tasks = {task: assets.TASKS[task].sha256 for task in zeroshot.tasks} if offline else sorted(zeroshot.tasks)
        identity["zeroshot"] = {"tasks": tasks, "limit": zeroshot.limit, "lm_eval": lm_eval_version()}
    if identity:
        identity["version"] = EVALUATION_VERSION
    return identity
