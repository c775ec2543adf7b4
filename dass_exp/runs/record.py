"""The result of a run, and the record composed of it: every number, and how it was obtained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dass_exp.config.settings import RunConfig
from dass_exp.data.tokens import Tokens
from dass_exp.engine.verify import Layer
from dass_exp.evaluate.generation import Generation
from dass_exp.evaluate.perplexity import Perplexity
from dass_exp.evaluate.zeroshot import ZeroShotResult, lm_eval_version
from dass_exp.models.families import Role
from dass_exp.models.load import ModelSpec
from dass_exp.runs.resolved_run import Components, ResolvedRun
from dass_exp.storage.durable import now
from dass_exp.storage.environment import environment
from dass_exp.storage.mask_file import PackedMask
from dass_exp.storage.record_schema import SCHEMA
from dass_exp.storage.records import Record

# share of zeros from which a model that was loaded as dense, or a matrix of it, was pruned before
_PRUNED_BEFORE = 0.01


@dataclass(frozen=True)
class RunResult:
    """What a run produced.

    Args:
        layers: verified, one per pruned linear.
        starved: experts with too few calibration tokens.
        masks: by name of the linear; None if they are not kept.
        perplexity: of the model, pruned unless the method is dense, by name of the set of windows.
        tasks: zero-shot scores.
        generation: what it generates, compared with the dense model.
        retrained: the course of its retraining (:func:`dass_exp.runs.retraining.retrain`).
        loaded_zeros: zeros and size of each matrix in the blocks, as the model was loaded; empty if not counted.
        model_size: parameters of the model.
        decoder_size: weights of all matrices in its blocks.
        calibration, windows: the tokens that were used; windows by name of their set.
        cost: seconds and bytes.
        dense: of the dense model, if it was scored while the blocks were streamed.
    """

    layers: list[Layer]
    starved: list[str]
    masks: dict[str, PackedMask] | None
    perplexity: dict[str, Perplexity]
    tasks: ZeroShotResult | None
    model_size: int
    decoder_size: int
    calibration: Tokens | None = field(repr=False, default=None)
    windows: dict[str, Tokens] = field(repr=False, default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    generation: Generation | None = None
    retrained: dict[str, Any] | None = None
    loaded_zeros: Sequence[tuple[int, int]] = ()
    dense: RunResult | None = None


def compose_record(run: ResolvedRun, result: RunResult) -> Record:
    """Compose the content of result.json, which results/README.md describes."""
    return {
        "schema": SCHEMA,
        "key": run.key,
        "created": now(),
        **labels(run.config),
        "config": describe_config(run.config, run, run.spec),
        "identity": run.identity,
        "protocol": _protocol(run, result),
        "calibration": _calibration(run, result),
        "sparsity": _sparsity(result, run.spec.dtype.itemsize),
        "metrics": _metrics(result),
        "cost": {name: round(value, 3) if isinstance(value, float) else value for name, value in result.cost.items()},
        "solver": {
            "damping_retries": sum(layer.damping_retries for layer in result.layers),
            "underfull_tiles": sum(layer.underfull for layer in result.layers),
            **({"starved_experts": result.starved} if result.starved else {}),
        },
        "environment": environment(run.spec.device),
    }


def labels(config: RunConfig) -> dict[str, Any]:
    """Return what the user calls the run; nothing that was not given."""
    given = {"name": config.name, "tags": list(config.tags), "notes": config.notes}
    return {name: value for name, value in given.items() if value}


def compose_manifest(run: ResolvedRun, layers: Sequence[Layer]) -> dict[str, Any]:
    """Compose the manifest of a saved model: the key of its run, how it was pruned, and its sparsity."""
    method = run.method
    parts = [method.name, *(f"{name}={value}" for name, value in method.settings().items())]
    for stage in run.optional.values():
        parts += [f"+ {stage.name}", *(f"{name}={value}" for name, value in stage.settings().items())]
    parts += [run.pattern.name, f"scope {run.config.scope}"] if method.prunes else []
    zeros, size = sum(layer.zeros for layer in layers), sum(layer.size for layer in layers)
    return {
        "key": run.key,
        "told": " ".join([*parts, f"of {run.spec.identity}"]),
        "created": now(),
        "identity": run.identity,
        "config": describe_config(run.config, run, run.spec),
        "sparsity": {
            "scope": zeros / size if size else 0.0,
            "linears": {layer.name: layer.zeros / layer.size for layer in layers},
        },
        "environment": environment(run.spec.device),
    }


def describe_config(config: RunConfig, components: Components, spec: ModelSpec | None = None) -> dict[str, Any]:
    """Return the settings of a run as its record holds them; those that it ignores are null.

    Stages that do nothing are left out.

    Args:
        config: the typed settings.
        components: built from them.
        spec: the model, which resolves revision, dtype and device; None if it was not found.
    """
    model, method, uses = dataclasses.asdict(config.model), components.method, components.uses
    if spec is not None:
        model |= {"revision": spec.revision, "dtype": spec.dtype_name, "device": spec.device.type}
    has_experts = spec is not None and spec.family is not None and spec.family.experts is not None
    used = {
        "pattern": components.pattern.settings() if "pattern" in uses else None,
        "scope": config.scope if "scope" in uses else None,
        "calibration": dataclasses.asdict(config.calibration) if "calibration" in uses else None,
        "experts": dataclasses.asdict(config.experts) if has_experts and components.calibrated else None,
        "seed": config.seed if "seed" in uses else None,
    }
    evaluation = dataclasses.asdict(config.eval)
    for name in ("extra_perplexity", "generation"):
        if evaluation[name] is None:
            del evaluation[name]
    return {
        "model": model,
        "method": {"name": method.name, **method.settings()},
        **{group: {"name": stage.name, **stage.settings()} for group, stage in components.optional.items()},
        **used,
        "eval": evaluation,
        "protocol": config.protocol.get("name") if isinstance(config.protocol, dict) else None,
    }


def _protocol(run: ResolvedRun, result: RunResult) -> dict[str, Any]:
    evaluation, spec = run.config.eval, run.spec
    protocol: dict[str, Any] = {
        "bos": run.bos,
        "dtype": spec.dtype_name,
        "device": spec.device.type,
        "model_note": spec.note,
    }
    if remark := run.method.remark({Role(layer.role) for layer in result.layers}):
        protocol["method_note"] = remark
    sets = {name: _windows(run, name, windows) for name, windows in result.windows.items()}
    if evaluation.perplexity is not None and sets:
        protocol |= sets.pop(evaluation.perplexity.name)
    if sets:
        protocol["extra_perplexity"] = sets
    if (zeroshot := evaluation.zeroshot) is not None:
        protocol |= {
            "lm_eval": lm_eval_version(),
            "tasks": list(zeroshot.tasks),
            "limit": zeroshot.limit,
            "task_data": zeroshot.data,
            "num_fewshot": zeroshot.num_fewshot,
        }
    return protocol


def _windows(run: ResolvedRun, name: str, windows: Tokens) -> dict[str, Any]:
    identity = run.evaluation_texts[name].identity
    return {
        "context": windows.ids.shape[1],
        "dataset": name,
        "split": identity.get("split", identity.get("part")),
        "windows": len(windows.ids),
        "windows_sha256": windows.sha256,
    }


def _calibration(run: ResolvedRun, result: RunResult) -> dict[str, Any] | None:
    if (tokens := result.calibration) is None:
        return None
    samples, length = tokens.ids.shape
    name = run.config.calibration.name
    return {"name": name, "num_samples": samples, "seq_len": length, "tokens_sha256": tokens.sha256}


def _sparsity(result: RunResult, width: int) -> dict[str, Any]:
    """Return the zeros, and the bytes of the model: as it is, and packed, with ``width`` bytes a value.

    Packed, a pruned linear is its surviving values and one bit a weight that says where they stand.
    """
    zeros, size = sum(layer.zeros for layer in result.layers), sum(layer.size for layer in result.layers)
    packed = [(layer.zeros, layer.size) for layer in result.layers]
    before: dict[str, float] = {}
    if not result.layers and (loaded := result.loaded_zeros):
        all_zeros = sum(count for count, _ in loaded)
        if all_zeros > _PRUNED_BEFORE * result.decoder_size:
            before["zero_weights"] = all_zeros / result.decoder_size
            packed = [(count, whole) for count, whole in loaded if count > _PRUNED_BEFORE * whole]
    values = result.model_size - sum(count for count, _ in packed)
    return {
        "scope": zeros / size if size else 0.0,
        "decoder": zeros / result.decoder_size,
        "model": zeros / result.model_size,
        "dense_bytes": width * result.model_size,
        "packed_bytes": width * values + sum(-(-whole // 8) for _, whole in packed),
        "excess_zeros": sum(layer.excess for layer in result.layers),
        **before,
        "layers": [dataclasses.asdict(layer) for layer in result.layers],
    }


def _metrics(result: RunResult) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    if scored := result.perplexity:
        metrics["perplexity"] = {name: each.value for name, each in scored.items()}
        metrics["window_nll"] = {name: each.window_nll for name, each in scored.items()}
        metrics["predicted_tokens_per_window"] = {name: each.predicted for name, each in scored.items()}
        metrics["position_nll"] = {name: each.position_nll for name, each in scored.items()}
    if compared := {name: each for name, each in result.perplexity.items() if each.kl is not None}:
        metrics["divergence"] = {
            name: {"kl": each.kl, "agreement": each.agreement, "perplexity_ratio": each.ratio}
            for name, each in compared.items()
        }
        metrics["window_kl"] = {name: each.window_kl for name, each in compared.items()}
        metrics["window_agreement"] = {name: each.window_agreement for name, each in compared.items()}
    if result.generation is not None:
        metrics["generation"] = dataclasses.asdict(result.generation)
    if result.retrained is not None:
        metrics["retrain"] = result.retrained
    if (tasks := result.tasks) is not None:
        metrics |= {"tasks": tasks.tasks, "mean_acc": tasks.mean_acc, "mean_acc_norm": tasks.mean_acc_norm}
    return metrics
