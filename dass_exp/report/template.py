"""The frame of the report: its HTML, style and script, in one file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
from string import Template

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


def filled(contents: str, sections: str) -> str:
    """The whole page.

    Args:
        contents: list items that lead to the sections, HTML.
        sections: HTML.
    """
    digest = (
        "sha256-" + base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    )  # no other script runs, whatever a record holds
    return _PAGE.substitute(digest=digest, style=_STYLE, contents=contents, sections=sections, script=_SCRIPT)
