"""The key of a record: a hash of the settings that can change a number, in canonical form, without those that the method ignores."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from dass_exp.config.settings import Settings
from dass_exp.data import assets
from dass_exp.engine.prune import ENGINE_VERSION
from dass_exp.evaluate import EVALUATION_VERSION
from dass_exp.evaluate.zeroshot import lm_eval_version
from dass_exp.models.load import ModelSpec


def key_of(settings: Settings, spec: ModelSpec, bos: str) -> str:
    """16 hex digits: equal for runs that must give equal numbers, whatever machine or folder they ran in.

    Batch sizes, threads, tracker, launcher and folders do not enter.
    """
    canonical = json.dumps(identity_of(settings, spec, bos), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def identity_of(settings: Settings, spec: ModelSpec, bos: str) -> dict[str, Any]:
    """What the key hashes, for a reader who asks why two keys differ."""
    config, method = settings.config, settings.method
    identity: dict[str, Any] = {
        "model": spec.identity,
        "roles": dict(spec.roles) if spec.roles else None,
        "dtype": spec.dtype_name,
        "device": spec.device.type,
        "bos": bos,
        "method": {
            "class": f"{type(method).__module__}.{type(method).__qualname__}",
            "version": method.version,
            **method.settings(),
        },
        "eval": _evaluation(settings),
    }
    if method.uses:
        identity["engine"] = ENGINE_VERSION
    if "pattern" in method.uses:
        identity["pattern"] = settings.pattern.settings()
    if "scope" in method.uses:
        identity["scope"] = config.scope
    if "calibration" in method.uses:
        identity["calibration"] = {"text": settings.calibration_text.identity, **dataclasses.asdict(settings.cut)}
        if settings.cut.sampling != "joined":
            del identity["calibration"]["separator"]
        if spec.family is not None and spec.family.experts is not None:
            identity["experts"] = dataclasses.asdict(config.experts)
    if spec.trained:
        identity["trained"] = dict(spec.trained)
    if config.repeat:
        identity["repeat"] = config.repeat
    if "seed" in method.uses:
        identity["seed"] = config.seed
    return identity


def _evaluation(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {}
    evaluation, text = settings.config.eval, settings.evaluation_text
    if evaluation.perplexity is not None and text is not None:
        scored = evaluation.perplexity
        found["perplexity"] = {"text": text.identity, "context": scored.context, "max_windows": scored.max_windows}
    if (asked := evaluation.zeroshot) is not None:
        data = (
            {task: assets.TASKS[task].sha256 for task in asked.tasks}
            if asked.data == "offline"
            else sorted(asked.tasks)
        )
        found["zeroshot"] = {"tasks": data, "limit": asked.limit, "lm_eval": lm_eval_version()}
    if found:
        found["version"] = EVALUATION_VERSION
    return found
