"""Compare several records in one table, and their protocol with that of the paper."""

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
from rich.table import Table

from dass_exp.config.components import choice
from dass_exp.report.console import calibration_label, method_label, pattern_label, scope_label, shots_label, with_error
from dass_exp.report.fit import tables_that_fit
from dass_exp.report.load import Record, accuracy_name, asked_tasks, by_model_note, model_name, varying_settings
from dass_exp.report.scores import main_text
from dass_exp.report.write import markdown_table

PAPER_MODELS = ("llama2_7b", "llama2_13b", "llama2_70b", "mistral_7b", "gemma_7b", "llama31_8b")
_FIRST = ("pattern", "perplexity", "KL", "agree %", "mean acc", "prune s")  # in a narrow terminal
_LABELS = ("model", "method", "pattern", "scope", "calibration", "seed")


def comparison(records: list[Record]) -> pd.DataFrame:
    """Return one row of text per record, best perplexity first (best mean accuracy if no perplexity was scored).

    Labels other than the method are left out if they are the same in all records. ``KL`` is the divergence from the
    dense model in nats per token, ``agree`` the share of positions at which both predict the same token.
    """
    varying = varying_settings(records)
    rows = [_row(record, varying) for record in sorted(records, key=_rank)]
    # the columns of the fullest row first, in its order: the dense model has no divergence from itself
    columns = dict.fromkeys(column for row in sorted(rows, key=len, reverse=True) for column in row)
    frame = pd.DataFrame(rows, columns=list(columns))
    same = [name for name in _LABELS if name != "method" and name in frame and len(set(frame[name]) - {""}) < 2]
    return frame.drop(columns=same).fillna("")


def _rank(record: Record) -> tuple[float, float]:
    metrics = record["metrics"]
    perplexity = metrics.get("perplexity", {}).get(main_text(record), float("inf"))
    return perplexity, -metrics.get("mean_acc", 0.0)


def _row(record: Record, varying: Mapping[str, Sequence[str]]) -> dict[str, str]:
    config, metrics, cost = record["config"], record["metrics"], record["cost"]
    row = {
        "model": model_name(record),
        "method": method_label(config, varying),
        "pattern": pattern_label(config),
        "scope": config["scope"] or "",
        "calibration": calibration_label(record),
        "seed": "" if config["seed"] is None else str(config["seed"]),
    }
    if perplexities := metrics.get("perplexity"):
        row["perplexity"] = " ".join(f"{value:.2f}" for value in perplexities.values())
    if divergences := metrics.get("divergence", {}).values():
        row["KL"] = " ".join(f"{divergence['kl']:.3f}" for divergence in divergences)
        row["agree %"] = " ".join(f"{100 * divergence['agreement']:.1f}" for divergence in divergences)
    row |= {task: with_error(scores, accuracy_name(scores)) for task, scores in asked_tasks(record).items()}
    for name, label in (("mean_acc", "mean acc"), ("mean_acc_norm", "mean acc_norm")):
        if name in metrics:
            row[label] = f"{100 * metrics[name]:.1f}"
    row |= {"prune s": f"{cost['prune_s']:.1f}", "peak GB": f"{cost['peak_rss_bytes'] / 1e9:.1f}"}
    return row | {"record": record["key"][:8]}


def settings_line(records: list[Record]) -> str:
    """Describe the settings that all rows share, which :func:`comparison` leaves out, and all hyper-parameters."""
    configs = [record["config"] for record in records]
    labels = [{label(config) for config in configs} - {""} for label in (pattern_label, scope_label)]
    shared = [label.pop() for label in labels if len(label) == 1]
    shared += [label for label in dict.fromkeys(map(method_label, configs)) if "=" in label]
    return f"Settings: {'; '.join(shared)}." if shared else ""


def footnotes(records: list[Record]) -> list[str]:
    """List how the protocol of these records differs from the paper's (arXiv 2405.01943), each difference once."""
    notes: dict[str, None] = {}
    others = [record for record in records if model_name(record) not in PAPER_MODELS]
    for note, noted in by_model_note(others).items():
        names = list(dict.fromkeys(map(model_name, noted)))
        models = f"{'the models are' if len(names) > 1 else 'the model is'} {', '.join(names)}"
        notes[f"{models}{f' ({note})' if note else ''}; the paper prunes {', '.join(PAPER_MODELS)}"] = None
    for record in records:
        notes |= dict.fromkeys(_differences(record))
    return list(notes)


def _differences(record: Record) -> Iterator[str]:
    config, protocol = record["config"], record["protocol"]
    if protocol.get("method_note"):
        yield protocol["method_note"]
    if starved := record.get("solver", {}).get("starved_experts"):
        yield (
            f"{len(starved)} experts saw too few calibration tokens for statistics of their own: "
            "their inputs were treated as equally important"
        )
    yield from _tokens_differ(record)
    if protocol.get("limit"):
        yield (
            f"{shots_label(protocol)}: the first {protocol['limit']} documents of each task; the paper: all. "
            "Beside each accuracy stands its standard error"
        )
    tasks = record["metrics"].get("tasks", {})
    if splits := [task for task in tasks if task.startswith("arc") and tasks[task]["split"] != "test"]:
        yield f"{' and '.join(splits)} are scored on the validation split; lm-eval's default is test"
    if config["scope"] not in (None, "mlp"):
        yield f"scope {config['scope']}; the paper prunes the MLP only"


def _tokens_differ(record: Record) -> Iterator[str]:
    """Calibration and perplexity tokens other than the paper's."""
    protocol, calibration = record["protocol"], record["calibration"]
    paper_calibration = {"name": "c4", **choice("calibration", "c4")}
    paper_eval = choice("eval", "ppl_paper")["perplexity"]
    if calibration:
        name, samples, length = (paper_calibration[field] for field in ("name", "num_samples", "seq_len"))
        if (calibration["name"], calibration["num_samples"], calibration["seq_len"]) != (name, samples, length):
            yield f"calibration: {calibration_label(record)}; the paper: {samples} x {length} of {name}"
    perplexity = record["config"]["eval"].get("perplexity") or {}
    if "dataset" in protocol:
        name, context = paper_eval["name"], paper_eval["context"]
        if (protocol["dataset"], protocol["context"], perplexity.get("max_windows")) != (name, context, None):
            yield (
                f"perplexity: {protocol['windows']} windows of {protocol['context']} tokens of {protocol['dataset']}; "
                f"the paper: all windows of {context} of {name}, test split"
            )


def as_rich(frame: pd.DataFrame, title: str, width: int) -> list[Table]:
    """The table for a terminal of ``width`` columns; several below each other where one does not fit."""
    return tables_that_fit(frame, title, width, ("method", *_LABELS, "record"), _FIRST)


def as_markdown(frame: pd.DataFrame) -> str:
    """The table in Markdown."""
    return markdown_table(list(map(str, frame.columns)), [list(map(str, row)) for row in frame.itertuples(index=False)])
