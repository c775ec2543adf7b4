"""Write a sheet as Markdown, CSV and LaTeX, with the caption that says how its numbers were made."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from dass_exp.report.console import calibration_label
from dass_exp.report.load import model_of
from dass_exp.report.table import Entry, ResultTable

_UNITS = {
    "perplexity": "perplexity, lower is better",
    "acc": "accuracy in %",
    "acc_norm": "length-normalised accuracy in %",
    "cost": "cost",
}
_TEX = {
    "\\": r"\textbackslash{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def format_entry(entry: Entry | str, metric: str) -> str:
    """A value as tables print it: the mean, with the standard deviation over seeds or the standard error where there is one."""
    if isinstance(entry, str):
        return entry
    digits = 1 if metric in ("acc", "acc_norm", "cost") else 2
    spread = entry.sd if entry.sd is not None else entry.stderr
    return f"{entry.mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def caption(sheet: ResultTable) -> str:
    """Model, weights, scope, calibration, context, BOS, dtype, lm-eval and metric of a sheet, and what its marks mean."""
    if not sheet.records:
        return "No cell of this sweep has a record."
    pruned = [record for record in sheet.records if record["config"]["method"]["name"] != "dense"] or sheet.records
    shown, parts = pruned[0]["protocol"], []
    noted: dict[str, dict[str, None]] = {}
    for record in pruned:
        noted.setdefault(record["protocol"]["model_note"], {})[model_of(record)] = None
    models = [f"{', '.join(named)}{_note(note)}" for note, named in noted.items()]
    trainings = sorted(
        {record["identity"]["trained"]["seed"] for record in pruned if record["identity"].get("trained")}
    )
    told = f", training seeds {', '.join(map(str, trainings))}" if trainings else ""
    parts.append(f"Model {', '.join(models)}{told}, {shown['dtype']}")
    parts.append("scope " + ", ".join(dict.fromkeys(record["config"]["scope"] or "none" for record in pruned)))
    calibrations = dict.fromkeys(label for record in pruned if (label := calibration_label(record)))
    if calibrations:
        seeds = sorted({record["config"]["seed"] for record in pruned if record["config"]["seed"] is not None})
        parts.append(f"calibration {', '.join(calibrations)}, seeds {', '.join(map(str, seeds))}")
    if "dataset" in shown and sheet.metric == "perplexity":
        parts.append(
            f"{shown['windows']} windows of {shown['context']} tokens of {shown['dataset']} ({shown['split']})"
        )
    if "lm_eval" in shown and sheet.metric.startswith("acc"):
        limit = f"the first {shown['limit']} documents of each task" if shown["limit"] else "all documents"
        parts.append(f"{sheet.metric} by lm-eval {shown['lm_eval']}, zero-shot, {limit}, ± standard error")
    parts.append(
        "beginning-of-sequence token: " + ", ".join(dict.fromkeys(record["protocol"]["bos"] for record in pruned))
    )
    marks = " Bold is best and underlined second, only where a paired bootstrap (95 %) or the seeds set it apart from the next."
    spread = (
        " ± is the standard deviation over seeds."
        if any(isinstance(entry, Entry) and entry.sd is not None for entry in sheet.cells.values())
        else ""
    )
    return (
        f"{_UNITS[sheet.metric]}. " + "; ".join(parts) + "." + spread + marks + (f" {sheet.note}" if sheet.note else "")
    )


def _note(note: str) -> str:
    return f" ({note})" if note else ""


def markdown(sheet: ResultTable) -> str:
    """The table in Markdown: best in bold, second underlined."""

    def shown(entry: Entry | str) -> str:
        text, mark = format_entry(entry, sheet.metric), entry.mark if isinstance(entry, Entry) else ""
        return f"**{text}**" if mark == "best" else f"<u>{text}</u>" if mark == "second" else text

    lines = ["| | " + " | ".join(map(_pipe, sheet.columns)) + " |", "|---|" + "---|" * len(sheet.columns)]
    for row in sheet.rows:
        lines.append(
            f"| {_pipe(row)} | "
            + " | ".join(shown(sheet.cells.get((row, column), "")) for column in sheet.columns)
            + " |"
        )
    return "\n".join(lines)


def _pipe(text: str) -> str:
    return text.replace("|", "\\|")


def long_form(sheet: ResultTable) -> list[list[Any]]:
    """A header, and one line per value in full precision: row, column, mean, sd, stderr, n, mark, status, keys of the records."""
    lines: list[list[Any]] = [["row", "column", "metric", "mean", "sd", "stderr", "n", "mark", "status", "records"]]
    for (row, column), entry in sheet.cells.items():
        if isinstance(entry, Entry):
            lines.append(
                [
                    row,
                    column,
                    sheet.metric,
                    entry.mean,
                    entry.sd,
                    entry.stderr,
                    len(entry.values),
                    entry.mark,
                    "done",
                    " ".join(entry.keys),
                ]
            )
        else:
            lines.append([row, column, sheet.metric, None, None, None, 0, "", entry, ""])
    return lines


def wide_form(sheet: ResultTable) -> list[list[str]]:
    """The table as it is printed, its header first."""
    return [
        ["row", *sheet.columns],
        *(
            [row, *(format_entry(sheet.cells.get((row, column), ""), sheet.metric) for column in sheet.columns)]
            for row in sheet.rows
        ),
    ]


def comma_separated(sheet: ResultTable) -> str:
    """:func:`long_form` as CSV."""
    return _csv(long_form(sheet))


def _csv(rows: list[list[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def latex(sheet: ResultTable) -> str:
    """A table environment; it needs the package booktabs."""

    def shown(entry: Entry | str) -> str:
        text, mark = tex(format_entry(entry, sheet.metric)), entry.mark if isinstance(entry, Entry) else ""
        return rf"\textbf{{{text}}}" if mark == "best" else rf"\underline{{{text}}}" if mark == "second" else text

    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{l{'r' * len(sheet.columns)}}}", r"\toprule"]
    lines.append(" & ".join(["", *map(tex, sheet.columns)]) + r" \\")
    lines.append(r"\midrule")
    for number, row in enumerate(sheet.rows):
        if row.endswith("dense") and number and lines[-1] != r"\midrule":
            lines.append(r"\midrule")
        lines.append(
            " & ".join([tex(row), *(shown(sheet.cells.get((row, column), "")) for column in sheet.columns)]) + r" \\"
        )
        if row.endswith("dense") and number + 1 < len(sheet.rows):
            lines.append(r"\midrule")
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{tex(sheet.title)}. {tex(caption(sheet))}}}",
        rf"\label{{tab:{sheet.name}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def tex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_TEX.get(mark, mark) for mark in text)


def latex_beside(sheet: ResultTable, rows: list[list[str]]) -> str:
    """Published figures beside ours as a table environment of its own; nothing if there are none."""
    head, *lines = rows
    if not lines:
        return ""
    parts = [
        r"\begin{table}",
        r"\centering",
        r"\begin{tabular}{lrrrll}",
        r"\toprule",
        " & ".join(map(tex, head)) + r" \\",
        r"\midrule",
    ]
    parts += [" & ".join(map(tex, line)) + r" \\" for line in lines]
    parts += [
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{tex(sheet.title)}, beside published numbers.}}",
        rf"\label{{tab:{sheet.name}-published}}",
    ]
    return "\n".join([*parts, r"\end{table}"]) + "\n"


def write(sheet: ResultTable, folder: Path, notes: str, beside: list[list[str]]) -> list[Path]:
    """Write the three forms of a sheet, each atomically.

    Args:
        sheet: what to write.
        folder: where to.
        notes: Markdown that follows the caption: published numbers, failures, footnotes.
        beside: published figures beside ours, a header first, for the other two forms.
    """
    lines = [
        f"# {sheet.title}",
        "",
        markdown(sheet),
        "",
        caption(sheet),
        "",
        f"Made by `dass-report {sheet.name}`.",
        "",
        notes,
    ]
    contents = {
        "md": "\n".join(lines).rstrip() + "\n",
        "csv": comma_separated(sheet),
        "tex": latex(sheet) + latex_beside(sheet, beside),
    }
    written = [write_text(folder / f"{sheet.name}.{ending}", content) for ending, content in contents.items()]
    other = folder / f"{sheet.name}-published.csv"
    if len(beside) > 1:
        return [*written, write_text(other, _csv(beside))]
    other.unlink(missing_ok=True)
    return written


def write_text(path: Path, content: str) -> Path:
    """Write a text file under a temporary name, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.partial")
    scratch.write_text(content, encoding="utf-8")
    os.replace(scratch, path)
    return path
