"""One self-contained HTML page: tables that sort, pictures, failures, environments and records. It loads nothing from anywhere."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from dass_exp.report.console import method_label, pattern_label, scope_label
from dass_exp.report.load import Record
from dass_exp.report.published import NOTHING_PUBLISHED, Published
from dass_exp.report.table import Entry, ResultTable
from dass_exp.report.template import filled
from dass_exp.report.write import format_entry, write_text


@dataclass(frozen=True)
class Chapter:
    """What the page shows of one sheet.

    Args:
        sheet: the table.
        caption: how its numbers were made.
        pictures: files; the SVG ones are taken into the page.
        published: figures of others that have a counterpart here.
    """

    sheet: ResultTable
    caption: str
    pictures: Sequence[Path] = ()
    published: Sequence[Published] = ()


def page(chapters: list[Chapter], problems: list[str], target: Path, results: Path | None = None) -> Path:
    """Write the report of several sheets.

    Args:
        chapters: in the order in which they are shown.
        problems: files of the results folder that could not be read as records.
        target: the file to write.
        results: the folder that holds the records, which the page links to by relative paths; that of ``target`` if it is not given.

    Raises:
        OSError: a picture cannot be read, or the page cannot be written.
    """
    records = list({record["key"]: record for chapter in chapters for record in chapter.sheet.records}.values())
    environments = _distinct(record["environment"] for record in records)
    sections = [_section(chapter) for chapter in chapters]
    sections += [
        _environments(records, environments),
        _records(records, environments, target, results or target.parent),
        _problems(problems),
    ]
    named = [
        *((chapter.sheet.name, chapter.sheet.title) for chapter in chapters),
        ("environments", "Environments"),
        ("records", "Records"),
    ]
    contents = "".join(f'<li><a href="#{_anchor(name)}">{escape(title)}</a></li>' for name, title in named)
    return write_text(target, filled(contents, "\n".join(filter(None, sections))))


def _section(chapter: Chapter) -> str:
    sheet = chapter.sheet
    drawn = [_picture(path, sheet.title) for path in chapter.pictures if path.suffix == ".svg"]
    caption = f'<p class="caption">{escape(chapter.caption)}</p>'
    parts = [
        _heading(sheet.name, sheet.title),
        _table(sheet),
        caption,
        *drawn,
        _published(chapter.published),
        _failures(sheet),
    ]
    return "<section>\n" + "\n".join(filter(None, parts)) + "\n</section>"


def _published(found: Sequence[Published]) -> str:
    if not found:
        return f'<p class="caption">{escape(NOTHING_PUBLISHED)}</p>'
    lines = [
        [
            f'<th scope="row">{escape(row.label)}</th>',
            *map(_number, (row.ours, row.value, row.ours - row.value)),
            *map(_text, (row.source, row.verdict)),
        ]
        for row in found
    ]
    return f"<h3>Beside published numbers</h3>\n{_sortable(['', 'ours', 'theirs', 'difference', 'source', 'verdict'], lines, numeric=(1, 2, 3))}"


def _number(value: float) -> str:
    return f'<td data-value="{value!r}">{value:.2f}</td>' if math.isfinite(value) else f"<td>{value}</td>"


def _heading(name: str, title: str) -> str:
    return f'<h2 id="{_anchor(name)}">{escape(title)}</h2>'


def _anchor(name: str) -> str:
    return escape(quote(name, safe=""))


def _table(sheet: ResultTable) -> str:
    lines = [
        [
            f'<th scope="row">{escape(row)}</th>',
            *(_cell(sheet.cells.get((row, column), ""), sheet.metric) for column in sheet.columns),
        ]
        for row in sheet.rows
    ]
    return _sortable(["", *sheet.columns], lines, numeric=range(1, len(sheet.columns) + 1))


def _cell(entry: Entry | str, metric: str) -> str:
    shown = escape(format_entry(entry, metric))
    if isinstance(entry, str):
        return f'<td class="bad">{shown}</td>' if entry else "<td></td>"
    mark = f' class="{entry.mark}"' if entry.mark in ("best", "second") else ""
    value = f' data-value="{entry.mean!r}"' if math.isfinite(entry.mean) else ""
    made = f"{len(entry.values)} value{'s' * (len(entry.values) > 1)}; {' '.join(entry.keys)}"
    return f'<td{value} title="{escape(made)}"><span{mark}>{shown}</span></td>'


def _sortable(heads: Sequence[str], lines: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """A table whose cells are HTML already and whose heads are plain text."""
    numbers = set(numeric)
    top = "".join(
        f'<th scope="col"{" data-number" * (place in numbers)}><button type="button"{_label(head)}>{escape(head)}</button></th>'
        for place, head in enumerate(heads)
    )
    body = "\n".join("<tr>" + "".join(line) + "</tr>" for line in lines)
    return f'<div class="scroll"><table class="sortable">\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _label(head: str) -> str:
    return "" if head else ' aria-label="name of the row"'


def _picture(path: Path, title: str) -> str:
    """The SVG without its XML header, with ids of its own: several pictures stand in one page."""
    drawing = path.read_text(encoding="utf-8")
    drawing = drawing[drawing.index("<svg") :]
    prefix = re.sub(r"\W", "-", path.stem)
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", drawing)
    return f'<figure role="img" aria-label="{escape(title)}">{drawing}</figure>'


def _failures(sheet: ResultTable) -> str:
    if not sheet.failed:
        return ""
    listed = "".join(
        f"<li><code>{escape(' '.join(cell.overrides))}</code>: {escape(cell.error or 'no error was noted')}</li>"
        for cell in sheet.failed
    )
    return f'<h3 class="bad">Failed cells</h3>\n<ul>{listed}</ul>'


def _environments(records: list[Record], environments: list[dict[str, object]]) -> str:
    """One column an environment, with the number of its records."""
    fields = dict.fromkeys(field for environment in environments for field in environment)
    counts = [sum(record["environment"] == environment for record in records) for environment in environments]
    heads = "".join(f'<th scope="col">{number}</th>' for number in range(1, len(environments) + 1))
    lines = [
        ("records", counts),
        *((field, [environment.get(field) for environment in environments]) for field in fields),
    ]
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(_text(value) for value in values)}</tr>\n'
        for name, values in lines
    )
    table = f'<div class="scroll"><table>\n<thead><tr><th></th>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>'
    return f"<section>\n{_heading('environments', 'Environments')}\n{table}\n</section>"


def _text(value: object) -> str:
    return f'<td class="text">{escape("" if value is None else str(value))}</td>'


def _records(records: list[Record], environments: list[dict[str, object]], target: Path, results: Path) -> str:
    lines, runs = [], Path(os.path.relpath(results / "runs", target.parent)).as_posix()
    for record in records:
        config, link = record["config"], f"{quote(runs)}/{quote(record['key'], safe='')}/result.json"
        key = f'<th scope="row"><a href="{escape(link)}"><code>{escape(record["key"])}</code></a></th>'
        seed, place = config.get("seed"), environments.index(record["environment"]) + 1
        told = (
            config["model"]["name"],
            method_label(config),
            pattern_label(config),
            scope_label(config),
            seed,
            place,
            record.get("created"),
        )
        lines.append([key, *map(_text, told)])
    heads = ("record", "model", "method", "pattern", "scope", "seed", "environment", "created")
    return f"<section>\n{_heading('records', 'Records')}\n{_sortable(heads, lines)}\n</section>"


def _problems(problems: list[str]) -> str:
    if not problems:
        return ""
    listed = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return f'<section>\n<h2 class="bad">Files that are no records</h2>\n<ul>{listed}</ul>\n</section>'


def _distinct(environments: Iterable[dict[str, object]]) -> list[dict[str, object]]:
    return list({json.dumps(environment, sort_keys=True): environment for environment in environments}.values())
