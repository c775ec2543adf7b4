"""The command ``dass-report``: records to tables, pictures and one page. It runs no model."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from dass_exp.errors import UserError, one_of
from dass_exp.paths import project_root
from dass_exp.report import published
from dass_exp.report.compare import footnotes
from dass_exp.report.compare_two import pair
from dass_exp.report.figures import draw, draw_layers
from dass_exp.report.load import Loaded, Record, cells_of, load, repaired
from dass_exp.report.page import Chapter, page
from dass_exp.report.table import ResultTable, build
from dass_exp.report.write import caption, long_form, wide_form, write, write_text

log = logging.getLogger("dass_exp.report")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 2: the question is wrong or there is nothing to report; 1: a table was refused."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("fontTools", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    asked = _parser().parse_intermixed_args(arguments)
    try:
        if asked.sweeps[:1] == ["compare"]:
            _compare(Path(asked.results), asked.sweeps[1:])
        elif not _report(asked):
            sys.exit(1)
    except UserError as error:
        log.error("%s", error)
        sys.exit(2)
    except OSError as error:
        log.error("a file cannot be read or written: %s; check --results and --output", error)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dass-report",
        description="Write the tables and pictures of sweeps from their records; or compare two records: dass-report compare KEY KEY",
    )
    parser.add_argument(
        "sweeps",
        nargs="*",
        metavar="SWEEP",
        help="names of sweeps (all that were run, if none is given), or: compare KEY KEY",
    )
    parser.add_argument("--results", default="results", help="the results folder (default: results)")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="where tables/, figures/ and report.html are written (default: the results folder)",
    )
    parser.add_argument(
        "--mix",
        action="store_true",
        help="put records of different protocols into one table, with what differs beside each row",
    )
    parser.add_argument(
        "--layers",
        action="store_true",
        help="also draw the error and sparsity of every block, one picture per pruned record",
    )
    parser.add_argument(
        "--wandb", action="store_true", help="log tables and pictures to Weights & Biases, one summary run per sweep"
    )
    return parser


def _report(asked: argparse.Namespace) -> bool:
    """Write what was asked for; False if a table was refused."""
    results = Path(asked.results)
    known = sorted(path.stem for path in (project_root() / "sweeps").glob("*.yaml"))
    names = [one_of("sweep", name, tuple(known)) for name in dict.fromkeys(asked.sweeps)] or known
    loaded = load(results)
    for problem in loaded.problems:
        log.warning("%s", problem)
    sheets: list[ResultTable] = []
    refused = False
    for name in names:
        try:
            sheet = _sheet(name, loaded, results, asked.mix)
        except UserError as error:
            log.error("%s", error)
            refused = True
            continue
        if sheet is not None:
            sheets.append(sheet)
        elif asked.sweeps and cells_of(results, name):
            log.warning(
                "%s: this sweep has no table of its own; its cells stand in the comparison.md of its folder in %s",
                name,
                results / "hydra",
            )
        elif asked.sweeps:
            log.warning("%s: no cell of this sweep was run into %s; run dass-exp sweeps=%s", name, results, name)
    if not sheets and not refused:
        raise UserError(f"nothing to report in {results}: run a sweep first, for example dass-exp sweeps=perplexity")
    _write(sheets, results, loaded.problems, asked)
    return not refused


def _sheet(name: str, loaded: Loaded, results: Path, mix: bool) -> ResultTable | None:
    layout = yaml.safe_load((project_root() / "sweeps" / f"{name}.yaml").read_text(encoding="utf-8")).get("sweep") or {}
    cells = cells_of(results, name)
    if "metric" not in layout or not cells:
        return None
    found = [loaded.records[cell.key] for cell in cells if cell.key in loaded.records]
    records = list({record["key"]: record for record in (*found, *_dense_of(found, loaded))}.values())
    failed = [cell for cell in cells if cell.status == "failed" and not repaired(cell, records)]
    return build(name, layout, records, failed, results, mix) if found or failed else None


def _dense_of(records: list[Record], loaded: Loaded) -> list[Record]:
    """The dense records of the same model and evaluation, which a sweep over one method does not list."""
    wanted = {_scored_as(record) for record in records}
    dense = [record for record in loaded.records.values() if record["config"]["method"]["name"] == "dense"]
    return [record for record in dense if _scored_as(record) in wanted and record["metrics"]]


def _scored_as(record: Record) -> str:
    return json.dumps(
        [record["identity"].get(name) for name in ("model", "dtype", "device", "bos", "eval")], sort_keys=True
    )


def _write(sheets: list[ResultTable], results: Path, problems: list[str], asked: argparse.Namespace) -> None:
    rows = (
        published.read(project_root() / "results" / "reference" / "published_numbers.csv") if _has_reference() else []
    )
    chapters: list[Chapter] = []
    output = Path(asked.output or results)
    for sheet in sheets:
        found = published.beside(sheet.records, rows)
        written = write(sheet, output / "tables", _notes(sheet, found), published.as_rows(found))
        pictures = draw(sheet, output / "figures")
        for record in {record["key"]: record for record in sheet.records}.values() if asked.layers else ():
            pictures += draw_layers(record, output / "figures")
        chapters.append(Chapter(sheet, caption(sheet), pictures, found))
        for path in (*written, *pictures):
            log.info("wrote %s", path)
        if asked.wandb:
            from dass_exp.runs.track import track_table

            track_table(sheet.title, {"table": wide_form(sheet), "values": long_form(sheet)}, pictures, str(results))
    if sheets:
        log.info(
            "wrote %s, which shows %s",
            page(chapters, problems, output / "report.html", results),
            ", ".join(sheet.name for sheet in sheets),
        )


def _has_reference() -> bool:
    return (project_root() / "results" / "reference" / "published_numbers.csv").is_file()


def _notes(sheet: ResultTable, found: list[published.Published]) -> str:
    lines = [published.as_markdown(found), ""]
    lines += [f"- failed: `{' '.join(cell.overrides)}`: {cell.error}" for cell in sheet.failed]
    lines += [f"- {note}" for note in footnotes(sheet.records)]
    return "\n".join(lines)


def _compare(results: Path, keys: list[str]) -> None:
    if len(keys) != 2:
        raise UserError("dass-report compare takes two keys, or the beginnings of two keys")
    records = load(results).records
    first, second = (_only(key, records) for key in keys)
    text = pair(first, second, results)
    sys.stdout.write(text)
    log.info("wrote %s", write_text(results / "tables" / f"compare-{first['key']}-{second['key']}.md", text))


def _only(start: str, records: dict[str, Record]) -> Record:
    found = [record for key, record in records.items() if key.startswith(start)]
    if len(found) != 1:
        raise UserError(
            f"record {start}: {len(found)} records begin so; give more of the key (results/runs lists them)"
        )
    return found[0]


if __name__ == "__main__":
    main()
