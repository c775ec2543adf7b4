"""Put together what a record says: every number, and how it was made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dass_exp.config.settings import Settings
from dass_exp.data.tokens import Tokens
from dass_exp.engine.verify import Layer
from dass_exp.evaluate.perplexity import Perplexity
from dass_exp.evaluate.zeroshot import ZeroShot, lm_eval_version
from dass_exp.models.families import Role
from dass_exp.models.load import ModelSpec
from dass_exp.runs.identity import identity_of
from dass_exp.storage.record_schema import SCHEMA
from dass_exp.storage.records import Record, environment, now


@dataclass(frozen=True)
class Made:
    """What a run produced."""

    bos: str
    layers: list[Layer]
    starved: list[str]
    calibration: Tokens | None
    windows: Tokens | None
    perplexity: Perplexity | None
    zeroshot: ZeroShot | None
    model_size: int
    decoder_size: int
    cost: dict[str, Any]


def compose(key: str, settings: Settings, spec: ModelSpec, made: Made) -> Record:
    """The content of result.json (results/README.md describes it)."""
    return {
        "schema": SCHEMA,
        "key": key,
        "created": now(),
        "config": described(settings, spec),
        "identity": identity_of(settings, spec, made.bos),
        "protocol": _protocol(settings, spec, made),
        "calibration": _calibration(settings, made),
        "sparsity": _sparsity(settings, made),
        "metrics": _metrics(settings, made),
        "cost": made.cost,
        "solver": {
            "damping_retries": sum(layer.damping_retries for layer in made.layers),
            "underfull_tiles": sum(layer.underfull for layer in made.layers),
            **({"starved_experts": made.starved} if made.starved else {}),
        },
        "environment": environment(),
    }


def manifest(key: str, settings: Settings, spec: ModelSpec, bos: str, layers: Sequence[Layer]) -> dict[str, Any]:
    """What is said beside a saved model: the key of its run, how it was made in a line and in full, and its sparsity."""
    config, method = settings.config, settings.method
    parts = [f"{name}={value}" for name, value in method.settings().items()]
    told = " ".join(
        [
            method.name,
            *parts,
            *([settings.pattern.name, f"scope {config.scope}"] if method.uses else []),
            f"of {spec.identity}",
        ]
    )
    zeros, size = sum(layer.zeros for layer in layers), sum(layer.size for layer in layers)
    sparsity = {
        "scope": zeros / size if size else 0.0,
        "linears": {layer.name: layer.zeros / layer.size for layer in layers},
    }
    return {
        "key": key,
        "told": told,
        "created": now(),
        "identity": identity_of(settings, spec, bos),
        "config": described(settings, spec),
        "sparsity": sparsity,
        "environment": environment(),
    }


def described(settings: Settings, spec: ModelSpec) -> dict[str, Any]:
    """The resolved settings; those that the method ignores are null, so that no reader takes them for meant."""
    config, method = settings.config, settings.method
    uses = {
        "pattern": settings.pattern.settings(),
        "scope": config.scope,
        "calibration": dataclasses.asdict(config.calibration),
        "experts": dataclasses.asdict(config.experts)
        if spec.family is not None and spec.family.experts is not None
        else None,
        "seed": config.seed,
    }
    return {
        "model": {
            **dataclasses.asdict(config.model),
            "revision": spec.revision,
            "dtype": spec.dtype_name,
            "device": spec.device.type,
        },
        "method": {"name": method.name, **method.settings()},
        **{
            name: value if name in method.uses or (name == "experts" and method.stat) else None
            for name, value in uses.items()
        },
        "eval": dataclasses.asdict(config.eval),
        "protocol": config.protocol.get("name") if isinstance(config.protocol, dict) else None,
    }


def _protocol(settings: Settings, spec: ModelSpec, made: Made) -> dict[str, Any]:
    evaluation, text = settings.config.eval, settings.evaluation_text
    found: dict[str, Any] = {
        "bos": made.bos,
        "dtype": spec.dtype_name,
        "device": spec.device.type,
        "model_note": spec.note,
    }
    if remark := settings.method.remark({Role(layer.role) for layer in made.layers}):
        found["method_note"] = remark
    if evaluation.perplexity is not None and made.windows is not None and text is not None:
        source = text.identity
        found |= {
            "context": evaluation.perplexity.context,
            "dataset": evaluation.perplexity.name,
            "split": source.get("split", source.get("part")),
            "windows": len(made.windows.ids),
            "windows_sha256": made.windows.sha256,
        }
    if (asked := evaluation.zeroshot) is not None:
        found |= {
            "lm_eval": lm_eval_version(),
            "tasks": list(asked.tasks),
            "limit": asked.limit,
            "task_data": asked.data,
            "num_fewshot": 0,
        }
    return found


def _calibration(settings: Settings, made: Made) -> dict[str, Any] | None:
    if made.calibration is None:
        return None
    samples, length = made.calibration.ids.shape
    return {
        "name": settings.config.calibration.name,
        "num_samples": samples,
        "seq_len": length,
        "tokens_sha256": made.calibration.sha256,
    }


def _sparsity(settings: Settings, made: Made) -> dict[str, Any]:
    zeros, size = sum(layer.zeros for layer in made.layers), sum(layer.size for layer in made.layers)
    return {
        "scope": zeros / size if size else 0.0,
        "decoder": zeros / made.decoder_size,
        "model": zeros / made.model_size,
        "excess_zeros": sum(layer.excess for layer in made.layers),
        "layers": [dataclasses.asdict(layer) for layer in made.layers],
    }


def _metrics(settings: Settings, made: Made) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if made.perplexity is not None and settings.config.eval.perplexity is not None:
        name = settings.config.eval.perplexity.name
        found |= {
            "perplexity": {name: made.perplexity.value},
            "window_nll": {name: made.perplexity.window_nll},
            "predicted_tokens_per_window": {name: made.perplexity.predicted},
        }
    if made.zeroshot is not None:
        found |= {
            "tasks": made.zeroshot.tasks,
            "mean_acc": made.zeroshot.mean_acc,
            "mean_acc_norm": made.zeroshot.mean_acc_norm,
        }
    return found
