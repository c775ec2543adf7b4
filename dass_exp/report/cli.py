"""The command ``dass-report``: tables, figures and one page from records. It runs no model."""

import argparse
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dass_exp.config.components import build, choice
from dass_exp.config.help import version_line
from dass_exp.config.settings import OPTIONAL_GROUPS
from dass_exp.errors import UserError, one_of, os_error_line
from dass_exp.paths import project_root
from dass_exp.report import published, streams
from dass_exp.report.compare import footnotes
from dass_exp.report.compare_two import compare_records
from dass_exp.report.console import console
from dass_exp.report.figures import draw, draw_layers
from dass_exp.report.fit import tables_that_fit
from dass_exp.report.frame import listed, matching, records_frame
from dass_exp.report.leaderboard import write_leaderboard
from dass_exp.report.load import (
    LoadedRecords,
    Record,
    cells_of,
    evaluation_of,
    is_dense,
    layouts_run,
    load,
    recovered,
    setting,
)
from dass_exp.report.metric_table import build_metric_table
from dass_exp.report.metrics import METRICS, metric_of
from dass_exp.report.page import Section, write_page
from dass_exp.report.table import HEADLINE, STEP, ResultTable, build_table, with_metric
from dass_exp.report.write import caption, long_form, wide_form, write_table
from dass_exp.storage.durable import refuse_links, write_text
from dass_exp.trackers.base import Tracker
from dass_exp.trackers.none import NullTracker
from dass_exp.trackers.tracking import send_missing

log = logging.getLogger("dass_exp.report")

_DESCRIPTION = (
    "Write the tables and figures of sweeps from their records, or of any records with --rows and --columns. "
    "dass-report list: list records; dass-report compare KEY KEY: compare two; "
    "dass-report sync: send records to a tracker that has not got them yet; dass-report leaderboard: rank all records"
)
_SHORT = {"bpb": "bits_per_byte"}
_GRID = "grid"  # the name of a table of any records
_FIRST = ("key", "method", "pattern", "perplexity", "kl", "mean_acc", "created")  # columns of a list that matter most
_SWITCHES = {
    "--mix": "put records of different protocols into one table; each row shows the settings that differ",
    "--layers": "also draw the error and sparsity of every block, one figure per pruned record",
    "--metrics": "show what perplexity does not: each method by all metrics, with ranks",
    "--wandb": "log tables and figures to Weights & Biases, one summary run per sweep",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 2: the arguments are wrong or there is nothing to report; 1: a table was refused."""
    streams.protect()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("fontTools", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    options = _parser().parse_intermixed_args(arguments)
    try:
        if options.sweeps[:1] == ["compare"]:
            _compare(Path(options.results), options.sweeps[1:])
        elif options.sweeps[:1] == ["list"]:
            _list(Path(options.results), options)
        elif options.sweeps[:1] == ["sync"]:
            _sync(Path(options.results), options)
        elif options.sweeps == ["leaderboard"]:
            output = Path(options.output or options.results)
            log.info("wrote %s", write_leaderboard(Path(options.results), output, options.where))
        elif not _report(options):
            sys.exit(1)
    except (UserError, OSError) as error:
        log.error("%s", os_error_line(error) if isinstance(error, OSError) else error)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dass-report", description=_DESCRIPTION)
    sweeps = "names of sweeps (default: all that were run), or: list, or: compare KEY KEY, or: sync, or: leaderboard"
    where = "only records with this: FIELD=VALUE or FIELD=A,B; may be given several times"
    output = "where tables/, figures/ and report.html are written (default: the results folder)"
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=sweeps)
    parser.add_argument("--results", default="results", help="the results folder (default: results)")
    parser.add_argument("--output", metavar="DIR", help=output)
    parser.add_argument(
        "--metric",
        metavar="NAME",
        type=lambda name: _SHORT.get(name, name),
        help=f"show another metric: {', '.join(METRICS)}",
    )
    parser.add_argument("--where", metavar="FIELD=VALUE", action="append", default=[], help=where)
    parser.add_argument("--rows", metavar="SETTING", help="of a table of any records: method, or a setting")
    parser.add_argument("--columns", metavar="SETTING", help="of that table: pattern, task, or a setting")
    parser.add_argument("--title", help="of that table")
    parser.add_argument("--tracker", metavar="NAME", default="wandb", help="where sync sends to (default: wandb)")
    parser.add_argument("--version", action="version", version=version_line().strip())
    for switch, text in _SWITCHES.items():
        parser.add_argument(switch, action="store_true", help=text)
    return parser


def _report(options: argparse.Namespace) -> bool:
    """Write the report; False if a table was refused."""
    results = Path(options.results)
    if options.metric:
        metric_of(options.metric)
    if options.rows or options.columns:
        return _report_grid(results, options)
    layouts = layouts_of(results)
    names = [one_of("sweep", name, tuple(layouts)) for name in dict.fromkeys(options.sweeps)] or list(layouts)
    loaded = load(results)
    for problem in loaded.problems:
        log.warning("%s", problem)
    tables: list[ResultTable] = []
    refused = False
    for name in names:
        try:
            if built := _tables(name, layouts[name], loaded, results, options):
                tables += built
            elif options.sweeps:
                log.warning("%s: %s", name, _why_no_table(name, results))
        except UserError as error:
            log.error("%s", error)
            refused = True
    if not tables and not refused:
        raise UserError(f"nothing to report in {results}: run a sweep first, for example dass-exp sweeps=perplexity")
    _write(tables, results, loaded.problems, options)
    return not refused


def layouts_of(results: Path) -> dict[str, Mapping[str, Any]]:
    """Return the layout of the table of every sweep: those of the project, and those that were run from elsewhere."""
    files = sorted((project_root() / "sweeps").glob("*.yaml"))
    layouts: dict[str, Mapping[str, Any]] = {}
    for path in files:
        layouts[path.stem] = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("sweep") or {}
    return layouts | layouts_run(results, layouts)


def _report_grid(results: Path, options: argparse.Namespace) -> bool:
    """Write the table of any records; False if it was refused."""
    loaded, metric = load(results), options.metric or "perplexity"
    records = matching(loaded.records.values(), options.where)
    if not records:
        raise UserError(f"no record in {results} matches {' '.join(options.where) or 'anything'}")
    rows, columns = (options.rows or "method").split(","), options.columns or "pattern"
    _check_axes(rows, columns, records)
    title = options.title or f"{metric_of(metric).title} by {' and '.join(rows)} and {columns}"
    shown = [row for row in rows if "method" not in rows or row not in OPTIONAL_GROUPS]  # its label names its stages
    layout = {"title": title, "rows": shown, "columns": columns, "metric": metric, "figure": {"kind": "bars"}}
    together = [*records, *(record for record in _dense_of(records, loaded) if record not in records)]
    try:
        table = build_table(_GRID, layout, together, [], results, options.mix)
    except UserError as error:
        log.error("%s", error)
        return False
    filters = [f"--where {text}" for text in options.where]
    arguments = [f"--rows {','.join(rows)} --columns {columns} --metric {metric}", *filters]
    _write([replace(table, arguments=" ".join(arguments))], results, loaded.problems, options)
    return True


def _check_axes(rows: Sequence[str], columns: str, records: Sequence[Record]) -> None:
    """Raise a UserError unless every axis is something that a record has, and is one axis only."""
    known = {"method", "pattern", "model", *OPTIONAL_GROUPS}
    for option, axis in [*(("--rows", row) for row in rows), ("--columns", columns)]:
        special = known | {"task", "cost", HEADLINE, STEP} if option == "--columns" else known
        if axis not in special and all(setting(record["config"], axis) is None for record in records):
            expected = f"{', '.join(sorted(special))}, or a setting such as calibration.num_samples"
            raise UserError(f"{option} {axis}: no record has such a setting; expected {expected}")
    if columns in rows:
        raise UserError(f"--rows {columns} --columns {columns}: it can be one of them only")


def _list(results: Path, options: argparse.Namespace) -> None:
    """Print the records that the filters admit, the newest last."""
    if options.sweeps[1:]:
        raise UserError(f"dass-report list {' '.join(options.sweeps[1:])}: filters are given with --where FIELD=VALUE")
    if not results.is_dir():
        raise UserError(f"--results {results}: there is no such folder")
    frame = records_frame(results, options.where)
    if frame.empty:
        raise UserError(f"no record in {results} matches {' '.join(options.where) or 'anything'}")
    screen, shown = console(), listed(frame)
    texts = [name for name in shown.columns if name not in ("perplexity", "kl", "mean_acc", "seed")]
    for table in tables_that_fit(shown, f"{len(frame)} records in {results}", screen.width, texts, _FIRST):
        screen.print(table)


def _sync(results: Path, options: argparse.Namespace) -> None:
    """Send the records that the filters admit to a tracker, unless they were sent there before."""
    if options.sweeps[1:]:
        raise UserError(f"dass-report sync {' '.join(options.sweeps[1:])}: records are chosen with --where FIELD=VALUE")
    tracker = build(choice("tracker", options.tracker), Tracker, "tracker")
    if isinstance(tracker, NullTracker):
        raise UserError(f"--tracker {options.tracker}: it sends nothing; name another of conf/tracker")
    records = matching(load(results).records.values(), options.where)
    sent, there = send_missing(tracker, sorted(records, key=lambda record: record["created"]), str(results))
    log.info("%s: %d records sent, %d were there", tracker.place, sent, there)


def _tables(
    name: str, layout: Mapping[str, Any], loaded: LoadedRecords, results: Path, options: argparse.Namespace
) -> list[ResultTable]:
    """Build the tables of a sweep that are asked for; none if it has no table of its own or nothing was run."""
    cells, metric = cells_of(results, name), options.metric
    own = [loaded.records[cell.key] for cell in cells if cell.key in loaded.records]
    own = matching(own, options.where)
    records = list({record["key"]: record for record in (*own, *_dense_of(own, loaded))}.values())
    failed = [cell for cell in cells if cell.status == "failed" and not recovered(cell, records)]
    tables: list[ResultTable] = []
    if not own and not failed:
        return tables
    further = layout.get("metrics")  # true for the table of all of them, or a list of those with a table of their own
    listed_metrics = further if isinstance(further, list) and not options.metrics else []
    if not metric and "metric" in layout and not options.metrics:
        tables.append(build_table(name, layout, records, failed, results, options.mix))
    for each in [metric] if metric else listed_metrics:
        changed, file = with_metric(layout, each, name), re.sub(r"\W", "_", f"{name}_{each}")
        table = build_table(file, changed, records, failed, results, options.mix)
        tables.append(replace(table, arguments=f"{name} --metric {each}"))
    if options.metrics or (further is True and not metric):
        tables.append(build_metric_table(name, layout, records, failed, results, options.mix))
    return tables


def _why_no_table(name: str, results: Path) -> str:
    if not cells_of(results, name):
        return f"no cell of this sweep was run into {results}; run dass-exp sweeps={name}"
    why = "this sweep has no table of its own; comparison.md in its folder lists its cells, see"
    return f"{why} {results / 'hydra'}"


def _dense_of(records: list[Record], loaded: LoadedRecords) -> list[Record]:
    """The dense records of the same model and evaluation, which a sweep over one method does not list."""
    evaluations = {evaluation_of(record) for record in records}
    dense = [record for record in loaded.records.values() if is_dense(record) and record["metrics"]]
    return [record for record in dense if evaluation_of(record) in evaluations]


def _write(tables: list[ResultTable], results: Path, problems: list[str], options: argparse.Namespace) -> None:
    reference = project_root() / "results" / "reference" / "published_numbers.csv"
    rows = published.read(reference) if reference.is_file() else []
    sections: list[Section] = []
    output = Path(options.output or results)
    for folder in (output / "tables", output / "figures"):
        refuse_links(folder, output)
    for table in tables:
        counterparts = published.counterparts(table.records, rows)
        written = write_table(table, output / "tables", _notes(table, counterparts), published.as_rows(counterparts))
        pictures = draw(table, output / "figures")
        for record in table.records if options.layers else ():
            pictures += draw_layers(record, output / "figures")
        sections.append(Section(table, caption(table), pictures, counterparts))
        for path in (*written, *pictures):
            log.info("wrote %s", path)
        if options.wandb:
            from dass_exp.trackers.wandb import track_table

            track_table(table.title, {"table": wide_form(table), "values": long_form(table)}, pictures, str(results))
    if tables:
        page = write_page(sections, problems, output / "report.html", results)
        log.info("wrote %s, which shows %s", page, ", ".join(table.name for table in tables))


def _notes(table: ResultTable, counterparts: list[published.Published]) -> str:
    lines = [published.as_markdown(counterparts), ""]
    lines += [f"- failed: `{' '.join(cell.overrides)}`: {cell.error}" for cell in table.failed]
    lines += [f"- {note}" for note in footnotes(table.records)]
    return "\n".join(lines)


def _compare(results: Path, keys: list[str]) -> None:
    if len(keys) != 2:
        raise UserError("dass-report compare takes two keys, or the beginnings of two keys")
    records = load(results).records
    first, second = (_record_of(key, records) for key in keys)
    text = compare_records(first, second, results)
    sys.stdout.write(text)
    refuse_links(results / "tables", results)
    log.info("wrote %s", write_text(results / "tables" / f"compare-{first['key']}-{second['key']}.md", text))


def _record_of(start: str, records: dict[str, Record]) -> Record:
    matching = [record for key, record in records.items() if key.startswith(start)]
    if len(matching) != 1:
        count = len(matching)
        raise UserError(f"record {start}: {count} keys begin with it; give more of the key (results/runs lists them)")
    return matching[0]


if __name__ == "__main__":
    main()
