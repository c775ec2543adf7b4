"""Hand-made records as a report reads them; identity and protocol follow from the settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dass_exp.report.load import SweepCell

NOTE = "dequantised from 4-bit weights (GGUF Q4_1)"


def pattern_of(name: str) -> dict[str, Any]:
    if name.endswith("%"):
        return {"name": name, "sparsity": float(name[:-1]) / 100}
    kept, group = map(int, name.split(":"))
    return {"name": name, "n": kept, "m": group}


def record_of(
    method: str,
    nll: Sequence[float] = (1.0, 2.0),
    pattern: str = "2:4",
    seed: int = 0,
    scope: str = "mlp",
    **changes: Any,
) -> dict[str, Any]:
    """A record of a run that was scored with these likelihoods by window; their mean is its perplexity.

    Further keywords change the settings named below; those that are not named are hyper-parameters of the method.
    """
    given = json.dumps([method, pattern, seed, scope, changes], sort_keys=True)
    key = changes.pop("key", given)
    defaults = {"model": "smollm2_135m", "bos": "never", "dtype": "float32", "num_samples": 16, "seq_len": 512}
    defaults |= {"calibration": "c4_mini", "context": 512, "dataset": "wikipedia_mini", "max_windows": 4, "limit": 20}
    named = {name: changes.pop(name, default) for name, default in defaults.items()}
    tasks = changes.pop("tasks", {})
    model, bos, dtype, context, limit = (named[name] for name in ("model", "bos", "dtype", "context", "limit"))
    pruned, calibrated = method != "dense", method not in ("dense", "magnitude")
    cut = {"num_samples": named["num_samples"], "seq_len": named["seq_len"]}
    asset = {"asset": named["calibration"], "sha256": "2daf", "part": "all"}
    scored = {"context": context, "max_windows": named["max_windows"]}
    scored_text = {"asset": "wikipedia", "sha256": "d53f", "part": "even"}
    identity = {
        "model": f"offline:{model}@b179",
        "dtype": dtype,
        "device": "cpu",
        "bos": bos,
        "method": {"class": method, "version": 1, **changes},
        "eval": {"perplexity": {"text": scored_text, **scored}, "version": 1},
        **({"pattern": pattern_of(pattern), "scope": scope} if pruned else {}),
        **({"calibration": {"text": asset, "sampling": "joined", **cut}, "seed": seed} if calibrated else {}),
    }
    mean = sum(scores["acc"] for scores in tasks.values()) / max(len(tasks), 1)
    return {
        "schema": 1,
        "key": key,
        "created": "2025-01-01T00:00:00Z",
        "config": {
            "model": {"name": model},
            "method": {"name": method, **changes},
            "pattern": pattern_of(pattern) if pruned else None,
            "scope": scope if pruned else None,
            "seed": seed if calibrated else None,
            "calibration": {"name": named["calibration"], **cut} if calibrated else None,
            "eval": {"name": "made", "perplexity": {"name": named["dataset"], **scored}},
        },
        "identity": identity,
        "protocol": {
            "bos": bos,
            "dtype": dtype,
            "device": "cpu",
            "model_note": "" if model.startswith("llama") else NOTE,
            "context": context,
            "dataset": named["dataset"],
            "split": "even",
            "windows": len(nll),
            "windows_sha256": f"{model} {context}",
            "lm_eval": "0.4.13",
            "limit": limit,
        },
        "calibration": {"name": named["calibration"], **cut, "tokens_sha256": "7e"} if calibrated else None,
        "sparsity": {"scope": 0.5 * pruned, "decoder": 0.37 * pruned, "model": 0.29 * pruned, "layers": []},
        "metrics": {
            "perplexity": {named["dataset"]: sum(nll) / len(nll)},
            "window_nll": {named["dataset"]: list(nll)},
            **({"tasks": tasks, "mean_acc": mean, "mean_acc_norm": mean} if tasks else {}),
        },
        "cost": {
            "load_s": 1.0,
            "prune_s": 2.0,
            "eval_s": 60.0,
            "peak_rss_bytes": 1_500_000_000,
            "peak_gpu_bytes": None,
        },
        "solver": {},
        "environment": {"torch": "2.13.0", "gpu": None},
    }


def task(acc: float, norm: float | None = None, split: str = "validation", limit: int | None = 20) -> dict[str, Any]:
    """The scores of a zero-shot task."""
    scores = {"acc": acc, "acc_stderr": 0.05, "split": split, "limit": limit}
    return scores | ({} if norm is None else {"acc_norm": norm, "acc_norm_stderr": 0.06})


def diverged(record: dict[str, Any], kl: Sequence[float], agreement: Sequence[float], ratio: float) -> dict[str, Any]:
    """Add a divergence from the dense model, by window, to a record."""
    (text,) = record["metrics"]["perplexity"]
    means = {"kl": sum(kl) / len(kl), "agreement": sum(agreement) / len(agreement), "perplexity_ratio": ratio}
    record["metrics"] |= {
        "divergence": {text: means},
        "window_kl": {text: list(kl)},
        "window_agreement": {text: list(agreement)},
    }
    return record


def failed(method: str, pattern: str = "2:4", key: str | None = None, **settings: Any) -> SweepCell:
    """A cell that failed, with the settings of the record that it was meant to give."""
    config = record_of(method, pattern=pattern, **settings)["config"]
    return SweepCell((f"method={method}",), "failed", key, "the method went wrong", config)


def write_record(record: dict[str, Any], results: Path, documents: Any = None) -> Path:
    """Store a record, and outcomes by task, metric and document, in a results folder."""
    path = results / "runs" / record["key"] / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    if documents is not None:
        path.with_name("documents.json").write_text(json.dumps(documents))
    return path
