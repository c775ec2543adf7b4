"""Several records side by side, and what separates their protocol from the paper's."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from rich.table import Table

from dass_exp.config.components import choice
from dass_exp.report.console import calibration_label, method_label, pattern_label, scope_label, with_error
from dass_exp.report.load import Record, varying_settings

PAPER_MODELS = ("llama2_7b", "llama2_13b", "llama2_70b", "mistral_7b", "gemma_7b", "llama31_8b")
_LABELS = ("model", "method", "pattern", "scope", "calibration", "seed")


def comparison(records: list[Record]) -> pd.DataFrame:
    """One row a record, best perplexity first (best mean accuracy where no perplexity was scored); every cell is text.

    Labels that are the same in all records are left out, the method excepted.
    """
    rows = sorted(records, key=_rank)
    varying = varying_settings(records)
    frame = pd.DataFrame([_row(record, varying.get(record["config"]["method"]["name"], ())) for record in rows])
    same = [name for name in _LABELS if name != "method" and name in frame and len(set(frame[name]) - {""}) < 2]
    return frame.drop(columns=same).fillna("")


def _rank(record: Record) -> tuple[float, float]:
    metrics = record["metrics"]
    scored = metrics.get("perplexity") or {"": float("inf")}
    return sum(scored.values()), -metrics.get("mean_acc", 0.0)


def _row(record: Record, shown: Sequence[str]) -> dict[str, str]:
    config, metrics = record["config"], record["metrics"]
    method = " ".join([config["method"]["name"], *(f"{key}={config['method'][key]}" for key in shown)])
    seed = "" if config["seed"] is None else str(config["seed"])
    row = {
        "model": config["model"]["name"],
        "method": method,
        "pattern": pattern_label(config),
        "scope": config["scope"] or "",
        "calibration": calibration_label(record),
        "seed": seed,
    }
    if scored := metrics.get("perplexity"):
        row["perplexity"] = " ".join(f"{value:.2f}" for value in scored.values())
    row |= {task: with_error(scores, "acc") for task, scores in metrics.get("tasks", {}).items()}
    row |= {
        label: f"{100 * metrics[name]:.1f}"
        for name, label in (("mean_acc", "mean acc"), ("mean_acc_norm", "mean acc_norm"))
        if name in metrics
    }
    return row | {
        "prune s": f"{record['cost']['prune_s']:.1f}",
        "peak GB": f"{record['cost']['peak_rss_bytes'] / 1e9:.1f}",
        "record": record["key"][:8],
    }


def settings_line(records: list[Record]) -> str:
    """What the rows leave out because it is the same in all: pattern, scope, and the methods' hyper-parameters."""
    labels = [
        {pattern_label(record["config"]) for record in records} - {""},
        {scope_label(record["config"]) for record in records} - {""},
    ]
    shared = [label.pop() for label in labels if len(label) == 1]
    methods = dict.fromkeys(method_label(record["config"]) for record in records)
    told = [*shared, *(label for label in methods if "=" in label)]
    return f"Settings: {'; '.join(told)}." if told else ""


def footnotes(records: list[Record]) -> list[str]:
    """How the protocol of these records differs from that of the paper (arXiv 2405.01943), each difference once."""
    found: dict[str, None] = {}
    noted: dict[str, dict[str, None]] = {}
    for record in records:
        if (name := record["config"]["model"]["name"]) not in PAPER_MODELS:
            noted.setdefault(record["protocol"]["model_note"], {})[name] = None
    for note, names in noted.items():
        told = f"{'the models are' if len(names) > 1 else 'the model is'} {', '.join(names)}" + (
            f" ({note})" if note else ""
        )
        found[f"{told}; the paper prunes {', '.join(PAPER_MODELS)}"] = None
    for record in records:
        found |= dict.fromkeys(_differences(record))
    return list(found)


def _differences(record: Record) -> list[str]:
    config, protocol, calibration = record["config"], record["protocol"], record["calibration"]
    paper_calibration, paper_eval = choice("calibration", "c4"), choice("eval", "ppl_paper")
    found = []
    if protocol.get("method_note"):
        found.append(protocol["method_note"])
    if starved := record.get("solver", {}).get("starved_experts"):
        found.append(
            f"{len(starved)} experts saw too few calibration tokens for statistics of their own: their inputs were taken for equally important"
        )
    ours = calibration and (calibration["name"], calibration["num_samples"], calibration["seq_len"])
    theirs = (paper_calibration["name"], paper_calibration["num_samples"], paper_calibration["seq_len"])
    if ours and ours != theirs:
        found.append(
            f"calibration: {ours[1]} x {ours[2]} tokens of {ours[0]}; the paper: {theirs[1]} x {theirs[2]} of {theirs[0]}"
        )
    scored = paper_eval["perplexity"]
    asked = config["eval"].get("perplexity") or {}
    if "dataset" in protocol and (protocol["dataset"], protocol["context"], asked.get("max_windows")) != (
        scored["name"],
        scored["context"],
        None,
    ):
        found.append(
            f"perplexity: {protocol['windows']} windows of {protocol['context']} tokens of {protocol['dataset']}; "
            f"the paper: all windows of {scored['context']} of {scored['name']}, test split"
        )
    if protocol.get("limit"):
        found.append(
            f"zero-shot: the first {protocol['limit']} documents of each task; the paper: all. Beside each accuracy stands its standard error"
        )
    splits = {
        task: scores["split"]
        for task, scores in record["metrics"].get("tasks", {}).items()
        if task.startswith("arc") and scores["split"] != "test"
    }
    if splits:
        found.append(f"{' and '.join(splits)} are scored on the validation split; lm-eval's default is test")
    if config["scope"] not in (None, "mlp"):
        found.append(f"scope {config['scope']}; the paper prunes the MLP only")
    return found


def as_rich(frame: pd.DataFrame, title: str) -> Table:
    """The table for a terminal."""
    table = Table(title=title, title_justify="left")
    for column in frame.columns:
        table.add_column(str(column), justify="left" if column in (*_LABELS, "record") else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*(str(cell) for cell in row))
    return table


def as_markdown(frame: pd.DataFrame) -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in frame.itertuples(index=False))])
