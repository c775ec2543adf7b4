"""Write a table as Markdown, CSV and LaTeX, with a caption that says how its numbers were obtained."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dass_exp.report.console import calibration_label, documents_label, shots_label, windows_label
from dass_exp.report.load import by_model_note, is_dense, model_identity, windows_of
from dass_exp.report.metrics import metric_of
from dass_exp.report.styles import display
from dass_exp.report.table import ResultTable, TableValue
from dass_exp.storage.durable import write_text

_MARKS = (
    " Bold is best and underlined second, only where it differs from the next: Welch's t over seeds, a paired t over "
    "windows or documents, 5 %, Holm's correction within a column."
)
_COLUMN_CHARACTERS = 42  # that fit into one column of a page with two
_RANKS = (
    " In parentheses the rank among the rows of the same model and the same first label; several (1-3) where these "
    "tests do not separate them."
)
_TEX = {
    "\\": r"\textbackslash{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def format_value(value: TableValue | str, metric: str) -> str:
    """Format a value: the mean, with the deviation over seeds or the standard error, and the rank, where known."""
    if isinstance(value, str):
        return value
    digits = metric_of(metric).digits
    spread = "" if value.spread is None else f" ± {value.spread:.{digits}f}"
    return f"{value.mean:.{digits}f}{spread}" + (f" ({value.rank})" if value.rank else "")


def caption(table: ResultTable) -> str:
    """Describe how the numbers of a table were obtained, and what its marks mean."""
    if not table.records:
        return "No cell of this sweep has a record."
    pruned = [record for record in table.records if not is_dense(record)] or table.records
    protocol, names = pruned[0]["protocol"], list(dict.fromkeys(map(table.metric_in, table.columns or [""])))
    metrics = {name: metric_of(name) for name in names}
    by_task = [name for name, metric in metrics.items() if metric.source == "tasks"]
    # the models with the same note, then that note
    models = ", ".join(
        ", ".join(dict.fromkeys(map(model_identity, records))) + (f" ({note})" if note else "")
        for note, records in by_model_note(pruned).items()
    )
    trainings = {record["identity"]["trained"]["seed"] for record in pruned if record["identity"].get("trained")}
    training = f", training seeds {_joined(sorted(trainings))}" if trainings else ""
    scopes = _joined(record["config"]["scope"] or "none" for record in pruned)
    parts = [f"Model {models}{training}, {protocol['dtype']}", f"scope {scopes}"]
    if calibrations := [label for record in pruned if (label := calibration_label(record))]:
        seeds = {record["config"]["seed"] for record in pruned if record["config"]["seed"] is not None}
        parts.append(f"calibration {_joined(calibrations)}, seeds {_joined(sorted(seeds))}")
    texts = [name.partition(":")[2] for name, metric in metrics.items() if metric.source == "windows"]
    if "dataset" in protocol and texts:
        parts.append(" and ".join(dict.fromkeys(windows_label(windows_of(protocol, text)) for text in texts)))
    if "lm_eval" in protocol and by_task:
        errors = any(isinstance(value, TableValue) and value.stderr is not None for value in table.cells.values())
        documents = documents_label(protocol) + (", ± standard error" if errors else "")
        parts.append(f"{', '.join(by_task)} by lm-eval {protocol['lm_eval']}, {shots_label(protocol)}, {documents}")
    parts.append(f"beginning-of-sequence token: {_joined(record['protocol']['bos'] for record in pruned)}")
    repeated = any(isinstance(value, TableValue) and value.sd is not None for value in table.cells.values())
    spread = " ± is the standard deviation over seeds." if repeated else ""
    uncommitted = sum(record["environment"].get("git_dirty") is True for record in table.records)
    changed = f" {uncommitted} of {len(table.records)} records come from a changed checkout." if uncommitted else ""
    note = f"{changed} {table.note}".rstrip() if table.note else changed
    ranked = any(isinstance(value, TableValue) and value.rank for value in table.cells.values())
    units = "; ".join(metric.unit for metric in metrics.values())
    return f"{units}. {'; '.join(parts)}.{spread}{_RANKS if ranked else ''}{_MARKS}{note}"


def _joined(values: Iterable[Any]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


def _marked(table: ResultTable, row: str, escape: Callable[[str], str], best: str, second: str) -> list[str]:
    """Format the values of a row, the marked ones inside the templates ``best`` and ``second``."""
    texts = []
    for column in table.columns:
        value = table.cells.get((row, column), "")
        text, mark = (
            escape(format_value(value, table.metric_in(column))),
            value.mark if isinstance(value, TableValue) else "",
        )
        texts.append({"best": best, "second": second}.get(mark, "%s") % text)
    return texts


def markdown(table: ResultTable) -> str:
    """Return the table in Markdown: best in bold, second underlined."""
    rows = [[_pipe(display(row)), *_marked(table, row, str, "**%s**", "<u>%s</u>")] for row in table.rows]
    text = markdown_table(["", *map(_pipe, map(display, table.columns))], rows)
    return text.replace("|  |", "| |", 1)  # the empty head of the first column


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows of text as a table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _pipe(text: str) -> str:
    return text.replace("|", "\\|")


def long_form(table: ResultTable) -> list[list[Any]]:
    """Return a header, and one line per value in full precision."""
    ranks = any(isinstance(value, TableValue) and value.rank for value in table.cells.values())
    names = ["mean", "sd", "stderr", "n", "mark", "status", "records", *(["rank"] if ranks else [])]
    lines: list[list[Any]] = [["row", "column", "metric", *names]]
    for (row, column), value in table.cells.items():
        fields: list[Any] = [None, None, None, 0, "", value, ""]
        if isinstance(value, TableValue):
            fields = [value.mean, value.sd, value.stderr, len(value.values), value.mark, "done", " ".join(value.keys)]
            fields += [value.rank] if ranks else []
        lines.append([row, column, table.metric_in(column), *fields])
    return lines


def wide_form(table: ResultTable) -> list[list[str]]:
    """Return the table as it is printed, its header first."""
    rows = [[row, *_marked(table, row, str, "%s", "%s")] for row in table.rows]
    return [["row", *table.columns], *rows]


def to_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as CSV."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def latex(table: ResultTable) -> str:
    """Return a LaTeX table environment, which says what packages it needs."""
    lines: list[str] = []
    for number, row in enumerate(table.rows):
        dense = row.endswith("dense")
        if dense and lines and lines[-1] != r"\midrule":
            lines.append(r"\midrule")
        lines.append(_tex_line([tex(display(row)), *_marked(table, row, tex, r"\textbf{%s}", r"\underline{%s}")]))
        if dense and number + 1 < len(table.rows):
            lines.append(r"\midrule")
    head = _tex_line(["", *map(tex, map(display, table.columns))])
    title = tex(f"{table.title}. {caption(table)}")
    return _tex_table(f"l{'r' * len(table.columns)}", head, lines, title, table.name)


def latex_published(table: ResultTable, rows: list[list[str]]) -> str:
    """Return published numbers and ours as a LaTeX table environment; empty if there are none."""
    header, *lines = (_tex_line(map(tex, row)) for row in rows)
    title = f"{tex(table.title)}, beside published numbers."
    return _tex_table("lrrrll", header, lines, title, f"{table.name}-published") if lines else ""


def _tex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _tex_table(columns: str, header: str, lines: list[str], title: str, label: str) -> str:
    """Return a table that fits: across both columns of a page if it is wide, and scaled to the line if it is wider."""
    wide = max(map(_printed_width, (header, *lines)), default=0) > _COLUMN_CHARACTERS
    environment = "table*" if wide else "table"
    packages = [rf"\usepackage{{{name}}}" for name in ("booktabs", *(["graphicx"] if wide else []))]
    fit = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
    top = [
        f"% needs {' and '.join(packages)}",
        rf"\begin{{{environment}}}",
        r"\centering\sloppy",
        *([fit] if wide else []),
        rf"\begin{{tabular}}{{{columns}}}",
    ]
    end = [r"\end{tabular}" + ("}" if wide else ""), rf"\caption{{{title}}}", rf"\label{{tab:{label}}}"]
    body = [r"\toprule", header, r"\midrule", *lines, r"\bottomrule"]
    return "\n".join([*top, *body, *end, rf"\end{{{environment}}}"]) + "\n"


def _printed_width(line: str) -> int:
    """Count the characters that a line of a table prints, each gap between columns as two."""
    plain = re.sub(r"\\(?:textbf|underline|textbackslash|textasciitilde|textasciicircum|pm)\b|[\\{}$]", "", line)
    return len(plain.replace(" & ", "  "))


def tex(text: str) -> str:
    """Escape LaTeX's special characters."""
    return "".join(_TEX.get(mark, mark) for mark in text)


def write_table(table: ResultTable, folder: Path, notes: str, published: list[list[str]]) -> list[Path]:
    """Write a table as Markdown, with notes after its caption, as CSV, and as LaTeX with the published numbers."""
    command = f"Made by `dass-report {table.arguments or table.name}`."
    page = "\n\n".join([f"# {table.title}", markdown(table), caption(table), command, notes]).rstrip() + "\n"
    contents = {
        f"{table.name}.md": page,
        f"{table.name}.csv": to_csv(long_form(table)),
        f"{table.name}.tex": latex(table) + latex_published(table, published),
    }
    if len(published) > 1:
        contents[f"{table.name}-published.csv"] = to_csv(published)
    else:
        (folder / f"{table.name}-published.csv").unlink(missing_ok=True)
    return [write_text(folder / name, content) for name, content in contents.items()]
