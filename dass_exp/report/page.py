"""One self-contained HTML page: tables that sort, pictures, failures, environments and records. It loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

from dass_exp.report.console import method_label, pattern_label, scope_label
from dass_exp.report.load import Record
from dass_exp.report.sheet import Entry, Sheet
from dass_exp.report.write import format_entry, write_text

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src '$digest'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>dass_exp: report</title>
<style>$style</style>
</head>
<body>
<h1>Report</h1>
<nav><ul>$contents</ul></nav>
<p class="legend">In the tables: <span class="best">bold</span> is the best pruned value of its column, <span class="second">underlined</span> the second,
each only where it stands outside the noise. Click a column's name to sort by it.</p>
<main>
$sections
</main>
<script>$script</script>
</body>
</html>
""")

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1b1b; --faint: #5a5a5a; --line: #d0d0d0; --band: #f4f4f4; --link: #0550ae; --bad: #a40e26; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181c; --ink: #e6e6e6; --faint: #a8a8a8; --line: #3d4148; --band: #1f2228; --link: #79b8ff; --bad: #ff8a8a; }
}
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem 1.5rem 4rem; }
h2 { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1.2rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; list-style: none; padding: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.8rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.8rem; text-align: right; vertical-align: top; }
thead th:not([data-number]), th:first-child, td.text { text-align: left; }
tbody th { font-weight: normal; white-space: nowrap; }
tbody tr:hover { background: var(--band); }
thead button { background: none; border: 0; color: inherit; cursor: pointer; font: inherit; font-weight: 600; padding: 0; text-align: inherit; }
thead button::after { color: var(--faint); content: " \\2195"; }
[aria-sort=ascending] button::after { content: " \\2191"; }
[aria-sort=descending] button::after { content: " \\2193"; }
.best { font-weight: 700; }
.second { text-decoration: underline; text-underline-offset: 0.2em; }
.caption, .legend { color: var(--faint); max-width: 60rem; }
.bad { color: var(--bad); }
code { font: 0.9em ui-monospace, monospace; overflow-wrap: anywhere; }
figure { background: #fff; border-radius: 6px; display: inline-block; margin: 1rem 0; max-width: 100%; padding: 0.6rem; }
figure svg { display: block; height: auto; max-width: 100%; }
"""

_SCRIPT = r"""
'use strict';
// alpha=0.25 before alpha=0.5, 64 before 128
function byName(left, right) {
  const [a, b] = [left, right].map(text => text.match(/\d+(?:\.\d+)?|\D+/g) || []);
  for (let place = 0; place < Math.min(a.length, b.length); place++) {
    const order = Number(a[place]) - Number(b[place]) || a[place].localeCompare(b[place], 'en');
    if (order) return order;
  }
  return a.length - b.length;
}
// Numbers as numbers, names as names, what has no number last in both directions; equal rows keep their order.
function sortBy(table, column, descending) {
  const body = table.tBodies[0], sign = descending ? -1 : 1;
  const rows = Array.from(body.rows, row => ({row, cell: row.cells[column]}));
  rows.sort((a, b) => {
    if (!('number' in table.tHead.rows[0].cells[column].dataset)) return sign * byName(a.cell.textContent, b.cell.textContent);
    const left = a.cell.dataset.value, right = b.cell.dataset.value;
    if (left === undefined || right === undefined) return (left === undefined) - (right === undefined);
    return sign * (Number(left) - Number(right));
  });
  body.append(...rows.map(entry => entry.row));
}
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => head.querySelector('button').addEventListener('click', () => {
    const descending = head.getAttribute('aria-sort') === 'ascending';
    heads.forEach(other => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', descending ? 'descending' : 'ascending');
    sortBy(table, column, descending);
  }));
}
"""


def page(sheets: list[Sheet], captions: dict[str, str], pictures: dict[str, list[Path]], problems: list[str], target: Path) -> Path:
    """Write the report of several sheets.

    Args:
        sheets: in the order in which they are shown.
        captions: by name of the sheet.
        pictures: by name of the sheet; the SVG files among them are taken into the page.
        problems: files of the results folder that could not be read as records.
        target: the file to write, in the results folder: its links to ``runs/`` are relative.

    Raises:
        OSError: a picture cannot be read, or the page cannot be written.
    """
    records = list({record["key"]: record for sheet in sheets for record in sheet.records}.values())
    environments = _distinct(record["environment"] for record in records)
    sections = [_section(sheet, captions.get(sheet.name, ""), pictures.get(sheet.name, [])) for sheet in sheets]
    sections += [_environments(records, environments), _records(records, environments), _problems(problems)]
    named = [*((sheet.name, sheet.title) for sheet in sheets), ("environments", "Environments"), ("records", "Records")]
    contents = "".join(f'<li><a href="#{_anchor(name)}">{escape(title)}</a></li>' for name, title in named)
    digest = "sha256-" + base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()  # no other script runs, whatever a record holds
    return write_text(target, _PAGE.substitute(digest=digest, style=_STYLE, contents=contents, sections="\n".join(filter(None, sections)), script=_SCRIPT))


def _section(sheet: Sheet, caption: str, pictures: Iterable[Path]) -> str:
    drawn = [_picture(path, sheet.title) for path in pictures if path.suffix == ".svg"]
    parts = [_heading(sheet.name, sheet.title), _table(sheet), f'<p class="caption">{escape(caption)}</p>', *drawn, _failures(sheet)]
    return "<section>\n" + "\n".join(filter(None, parts)) + "\n</section>"


def _heading(name: str, title: str) -> str:
    return f'<h2 id="{_anchor(name)}">{escape(title)}</h2>'


def _anchor(name: str) -> str:
    return escape(quote(name, safe=""))


def _table(sheet: Sheet) -> str:
    lines = [
        [f'<th scope="row">{escape(row)}</th>', *(_cell(sheet.cells.get((row, column), ""), sheet.metric) for column in sheet.columns)] for row in sheet.rows
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


def _failures(sheet: Sheet) -> str:
    if not sheet.failed:
        return ""
    listed = "".join(f"<li><code>{escape(' '.join(cell.overrides))}</code>: {escape(cell.error or 'no error was noted')}</li>" for cell in sheet.failed)
    return f'<h3 class="bad">Failed cells</h3>\n<ul>{listed}</ul>'


def _environments(records: list[Record], environments: list[dict[str, object]]) -> str:
    """One column an environment, with the number of its records."""
    fields = dict.fromkeys(field for environment in environments for field in environment)
    counts = [sum(record["environment"] == environment for record in records) for environment in environments]
    heads = "".join(f'<th scope="col">{number}</th>' for number in range(1, len(environments) + 1))
    lines = [("records", counts), *((field, [environment.get(field) for environment in environments]) for field in fields)]
    body = "".join(f'<tr><th scope="row">{escape(name)}</th>{"".join(_text(value) for value in values)}</tr>\n' for name, values in lines)
    table = f'<div class="scroll"><table>\n<thead><tr><th></th>{heads}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>'
    return f"<section>\n{_heading('environments', 'Environments')}\n{table}\n</section>"


def _text(value: object) -> str:
    return f'<td class="text">{escape("" if value is None else str(value))}</td>'


def _records(records: list[Record], environments: list[dict[str, object]]) -> str:
    lines = []
    for record in records:
        config, link = record["config"], f"runs/{quote(record['key'], safe='')}/result.json"
        key = f'<th scope="row"><a href="{escape(link)}"><code>{escape(record["key"])}</code></a></th>'
        seed, place = config.get("seed"), environments.index(record["environment"]) + 1
        told = (config["model"]["name"], method_label(config), pattern_label(config), scope_label(config), seed, place, record.get("created"))
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
