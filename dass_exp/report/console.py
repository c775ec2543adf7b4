"""Terminal output: the progress of a run, its summary, the plan of a sweep."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dass_exp.config.settings import OPTIONAL_GROUPS
from dass_exp.report.load import Record, asked_tasks, model_name

_PLAIN_WIDTH = 160  # columns for a pipe or a file, which have no width of their own
_SPARSITIES = {"scope": "the scope", "decoder": "the linears of all blocks", "model": "the whole model"}
_SECONDS = {"load_s": "seconds to load", "prune_s": "to prune", "eval_s": "to evaluate"}


def console(stderr: bool = False) -> Console:
    """Return a Rich console that takes no text as markup; in a pipe it is wide enough for tables."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def show_run(record: Record, dense: Record | None, path: Path, found: bool, model: str | None = None) -> None:
    """Print the summary of a run, pruned next to dense, and the path of its record.

    ``model`` is what this run calls its model; a record that was found may have been written under another name.
    """
    names = labels(record)
    table = Table(title=" · ".join([model or names[0], *names[1:]]), title_justify="left")
    table.add_column("")
    records = [record] if dense is None else [dense, record]
    for column in records:
        table.add_column(column["config"]["method"]["name"], justify="right")
    columns = [_summary(column) for column in records]
    for label in columns[-1]:
        table.add_row(label, *(column.get(label, "") for column in columns))
    screen = console()
    screen.print(table)
    screen.print(sizes_line(record), soft_wrap=True)
    screen.print(caption(record))
    screen.print(ending(record, path, found), soft_wrap=True)


def ending(record: Record, path: Path, found: bool) -> str:
    """Say where the record of a run is, and when one that was found was made."""
    return f"found {path}, made {record['created'][:10]}" if found else f"wrote {path}"


def show_plan(cells: list[dict[str, Any]]) -> None:
    """Print the cells of a sweep: which are done, which would run, and how long that would take."""
    table = Table(title="Plan: nothing was run", title_justify="left")
    for column in ("cell", "record", "", "seconds", "estimated from"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    common = set.intersection(*(set(cell["overrides"]) for cell in cells)) if len(cells) > 1 else set()
    seen: set[str] = set()
    total, unknown = 0.0, 0
    for cell in cells:
        again = bool(cell["key"]) and cell["key"] in seen
        seen.add(cell["key"])
        seconds = 0.0 if again else cell["seconds"]
        total, unknown = total + (seconds or 0.0), unknown + (seconds is None)
        state = "would run" if cell["key"] else "model not available"
        if cell["done"] or again:
            state = "done" if cell["done"] else "same record as above"
        basis = "" if cell["done"] or again else cell["basis"]
        name = " ".join(override for override in cell["overrides"] if override not in common)
        table.add_row(name, cell["key"], state, "?" if seconds is None else f"{seconds:.0f}", basis)
    screen = console()
    screen.print(table)
    for problem in dict.fromkeys(filter(None, (cell.get("problem") for cell in cells))):
        screen.print(f"model not available: {problem}")
    for needed in dict.fromkeys(filter(None, (cell["needs"] for cell in cells))):
        screen.print(f"needs: {needed}")
    if unknown == len(cells):
        screen.print("no similar record yet: the time cannot be estimated")
        return
    more = f", and {unknown} cells of unknown cost" if unknown else ""
    screen.print(
        f"about {total / 60:.0f} min in one process{more}; "
        "without loading the model, and without the dense run where its record is missing"
    )


def _summary(record: Record) -> dict[str, str]:
    """Return the rows of a run's summary by label."""
    metrics, cost = record["metrics"], record["cost"]
    rows = {f"perplexity {name}": f"{value:.2f}" for name, value in metrics.get("perplexity", {}).items()}
    for name, divergence in metrics.get("divergence", {}).items():
        rows[f"KL from dense on {name}, nats a token"] = f"{divergence['kl']:.4f}"
        rows[f"same most likely token on {name} %"] = f"{100 * divergence['agreement']:.1f}"
    for task, scores in asked_tasks(record).items():
        names = ("acc", "acc_norm", "exact_match")
        rows |= {f"{task} {name} %": with_error(scores, name) for name in names if name in scores}
    for name in ("mean_acc", "mean_acc_norm"):
        if name in metrics:
            rows[f"{name.replace('_', ' ', 1)} %"] = f"{100 * metrics[name]:.1f}"
    if (generation := metrics.get("generation")) is not None:
        rows["generated tokens equal to dense %"] = f"{100 * generation['equal']:.1f}"
        rows["distinct 4-grams %"] = f"{100 * generation['distinct_4']:.1f}"
    rows |= {label: f"{cost[name]:.1f}" for name, label in _SECONDS.items()}
    rows["peak memory GB"] = f"{cost['peak_rss_bytes'] / 1e9:.2f}"
    if cost.get("peak_gpu_bytes") is not None:
        rows["peak GPU memory GB"] = f"{cost['peak_gpu_bytes'] / 1e9:.2f}"
    return rows


def sizes_line(record: Record) -> str:
    """Return the zeros of a record, and the size of its model where it is known, in one line."""
    sparsity = record["sparsity"]
    zeros = ", ".join(f"{100 * sparsity[name]:.1f} % of {label}" for name, label in _SPARSITIES.items())
    if (found := sparsity.get("zero_weights")) is not None:
        zeros = f"{100 * found:.1f} % of {_SPARSITIES['decoder']}, as the model was loaded"
    if "packed_bytes" not in sparsity:  # a record of an earlier version
        return f"zeros: {zeros}"
    dense, packed = (f"{sparsity[name] / 1e6:.1f} MB" for name in ("dense_bytes", "packed_bytes"))
    return f"zeros: {zeros}; size: {dense} dense, {packed} packed (surviving values and one mask bit a weight)"


def with_error(scores: dict[str, Any], name: str) -> str:
    """Format a score in percent with its standard error, if it has one."""
    error = scores.get(f"{name}_stderr")
    return f"{100 * scores[name]:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def labels(record: Record) -> list[str]:
    """Return model, method, pattern and scope of a record; dense has no pattern and scope."""
    config = record["config"]
    return list(filter(None, (model_name(record), method_label(config), pattern_label(config), scope_label(config))))


def method_label(config: Mapping[str, Any], varying: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return method and stages with their hyper-parameters: ``dass alpha=0.5 granularity=input + neurons rounds=0``.

    Args:
        config: of a record.
        varying: by name of a method or stage, the hyper-parameters to show; None for all.
    """
    parts = []
    for group in ("method", *OPTIONAL_GROUPS):
        if not (part := config.get(group)):
            continue
        names = [name for name in part if name != "name"] if varying is None else varying.get(part["name"], ())
        if group == "method" and removes_nothing(config):
            parts.append("not pruned")
            continue
        title = f"{part['name']} retraining" if group == "retrain" else part["name"]
        parts.append(" ".join([title, *(f"{name}={part[name]}" for name in names if _is_shown(part.get(name)))]))
    return " + ".join(parts)


def removes_nothing(config: Mapping[str, Any]) -> bool:
    """Whether it is a retrained ``variant=unpruned``: the dense model in a table of models that are trained further."""
    pattern, method = config.get("pattern") or {}, config.get("method") or {}
    return bool(config.get("retrain") and pattern.get("sparsity") == 0 and method.get("name") == "magnitude")


def _is_shown(value: Any) -> bool:
    """Whether a hyper-parameter stands in a label: what is missing, empty, or has parts does not."""
    return value is not None and value != [] and not isinstance(value, Mapping)


def pattern_label(config: dict[str, Any]) -> str:
    """Return ``2:4``, ``50%``, or an empty string for dense."""
    return config["pattern"]["name"] if config["pattern"] else ""


def scope_label(config: dict[str, Any]) -> str:
    """Return ``scope mlp``, or an empty string for dense."""
    return f"scope {config['scope']}" if config["scope"] else ""


def calibration_label(record: Record) -> str:
    """Return ``16 x 512 tokens of c4_mini``, or an empty string without calibration."""
    used = record["calibration"]
    return f"{used['num_samples']} x {used['seq_len']} tokens of {used['name']}" if used else ""


def windows_label(protocol: Mapping[str, Any]) -> str:
    """Return ``16 windows of 512 tokens of wikipedia_mini (even)``; a file of one's own has no split."""
    label = "{windows} windows of {context} tokens of {dataset}".format_map(protocol)
    return f"{label} ({protocol['split']})" if protocol["split"] else label


def documents_label(protocol: dict[str, Any]) -> str:
    """Return ``the first 20 documents of each task`` or ``all documents``."""
    return f"the first {protocol['limit']} documents of each task" if protocol["limit"] else "all documents"


def shots_label(protocol: dict[str, Any]) -> str:
    """Return ``zero-shot``, or ``5-shot`` with five examples before each question."""
    return f"{protocol.get('num_fewshot') or 'zero'}-shot"


def caption(record: Record, others: Sequence[Record] = ()) -> str:
    """Describe how the numbers of a record were obtained; calibration and seed only if all ``others`` share them."""
    protocol = record["protocol"]
    note = f", {protocol['model_note']}" if protocol["model_note"] else ""
    parts = [f"Model {record['identity']['model']}{note}, {protocol['dtype']}"]
    calibrations = {label for one in (record, *others) if (label := calibration_label(one))}
    seeds = {one["config"]["seed"] for one in (record, *others)} - {None}
    if len(calibrations) == 1:
        parts.append(f"calibration {calibrations.pop()}" + (f", seed {seeds.pop()}" if len(seeds) == 1 else ""))
    if "dataset" in protocol:
        sets = protocol, *protocol.get("extra_perplexity", {}).values()
        parts.append(f"perplexity over {' and '.join(map(windows_label, sets))}")
    if "lm_eval" in protocol:
        parts.append(f"{shots_label(protocol)} by lm-eval {protocol['lm_eval']} on {documents_label(protocol)}")
    parts.append(f"beginning-of-sequence token: {protocol['bos']}")
    return "; ".join(parts) + "."
