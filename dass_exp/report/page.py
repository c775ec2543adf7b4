"""The report as one self-contained HTML page, from the template page.html."""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dass_exp.errors import DamagedFileError
from dass_exp.report.console import method_label, pattern_label, scope_label
from dass_exp.report.frame import as_row
from dass_exp.report.load import Record, model_name
from dass_exp.report.published import NOTHING_PUBLISHED, Published
from dass_exp.report.styles import display
from dass_exp.report.table import ResultTable
from dass_exp.report.write import format_value
from dass_exp.storage.durable import read_json, write_text


@dataclass(frozen=True)
class Section:
    """What the page shows of one table."""

    table: ResultTable
    caption: str
    pictures: Sequence[Path] = ()  # the SVG ones are embedded
    published: Sequence[Published] = ()

    @property
    def drawings(self) -> list[str]:
        """The SVG elements of the pictures, with ids that are unique in the page."""
        return [_embedded(path) for path in self.pictures if path.suffix == ".svg"]


def write_page(sections: list[Section], problems: list[str], target: Path, results: Path | None = None) -> Path:
    """Write the report of several tables, what ``make gpu-check`` found, and messages about files that are no records.

    Records that are in ``results``, by default the folder of ``target``, are linked by relative paths.
    """
    records = list({record["key"]: record for section in sections for record in section.table.records}.values())
    environments = {_canonical(record): record["environment"] for record in records}
    dates = sorted({str(record["created"])[:10] for record in records if record.get("created")})
    content = _template().render(
        sections=sections,
        nothing_published=NOTHING_PUBLISHED,
        environments=environments,
        environment_rows=_environment_rows(records, environments),
        record_rows=_record_rows(records, list(environments), (results or target.parent) / "runs", target.parent),
        gpu_checks=list(_gpu_checks((results or target.parent) / "bench")),
        version=version("dass_exp"),
        dates=" to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "",
        problems=problems,
    )
    return write_text(target, content)


def _gpu_checks(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what each GPU check has written, the newest first; a file that cannot be read is left out."""
    found = []
    for path in folder.glob("gpu-*.json"):
        with suppress(OSError, DamagedFileError):
            content = read_json(path)
            if isinstance(content, dict) and {"created", "machine", "lines"} <= content.keys():
                found.append(content)
    yield from sorted(found, key=lambda content: str(content["created"]), reverse=True)


def _template() -> Any:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"csp_hash": _csp_hash, "display": display, "format_value": format_value}
    environment.globals["isfinite"] = math.isfinite
    return environment.get_template("page.html")


def _csp_hash(script: str) -> str:
    """Hash a script as a Content-Security-Policy expects it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _embedded(path: Path) -> str:
    svg = path.read_text(encoding="utf-8")
    prefix = re.sub(r"\W", "-", path.stem)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg[svg.index("<svg") :])


def _canonical(record: Record) -> str:
    return json.dumps(record["environment"], sort_keys=True)


def _environment_rows(
    records: list[Record], environments: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, list[Any]]]:
    """One row per field and one column per environment, with the number of its records."""
    yield "records", [sum(_canonical(record) == environment for record in records) for environment in environments]
    for field in dict.fromkeys(field for environment in environments.values() for field in environment):
        yield field, [environment.get(field) for environment in environments.values()]


def _record_rows(
    records: list[Record], environments: list[str], runs: Path, page: Path
) -> Iterator[tuple[str, str | None, list[Any], list[float | None]]]:
    """Key, link (None if its file is not there), description and scores of each record."""
    for record in records:
        config, number, row = record["config"], environments.index(_canonical(record)) + 1, as_row(record)
        labels = [model_name(record), method_label(config), pattern_label(config), scope_label(config)]
        path = runs / record["key"] / "result.json"
        link = quote(Path(os.path.relpath(path, page)).as_posix()) if path.is_file() else None
        accuracy = row.get("mean_acc")
        scores = [row.get("perplexity"), row.get("kl"), None if accuracy is None else 100 * accuracy]
        yield record["key"], link, [*labels, config.get("seed"), number, record.get("created")], scores
