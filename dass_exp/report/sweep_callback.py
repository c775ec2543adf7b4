"""Print a comparison of a sweep's cells after it has ended, and the cells that failed."""

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dass_exp.config.redact import redact
from dass_exp.errors import UserError, os_error_line
from dass_exp.report.compare import as_markdown, as_rich, comparison, footnotes, settings_line
from dass_exp.report.console import caption, console, show_plan
from dass_exp.report.progress import clock
from dass_exp.storage.durable import read_json, write_json, write_text
from dass_exp.storage.records import Record, read_record

log = logging.getLogger(__name__)

CELL = "cell.json"


class Sweep:
    """The sweep that this process launches: its config once it has started, and how many cells failed."""

    started: ClassVar[DictConfig | None] = None
    failed: ClassVar[int] = 0
    cells: ClassVar[int] = 0
    ended: ClassVar[int] = 0  # of the cells, in this process
    since: ClassVar[float] = 0.0

    @classmethod
    def has_cells(cls) -> bool:
        """Whether a cell has started."""
        return cls.started is not None and any(Path(cls.started.hydra.sweep.dir).glob("*/.hydra"))

    @classmethod
    def show_finished(cls, ended: bool = False) -> None:
        """Print the cells that have ended so far, and write their comparison into the sweep's folder.

        Once the sweep has ``ended``, a cell whose end is not noted has failed.
        """
        if cls.started is None:
            return
        folder = Path(cls.started.hydra.sweep.dir)
        numbers = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())
        cells = [_noted(folder / str(number) / CELL) for number in numbers]
        cells = [cell for cell in cells if ended or cell["status"] != "unknown"]
        failed = [cell for cell in cells if cell["status"] in ("failed", "unplanned", "unknown")]
        cls.failed = len(failed)  # first: Hydra turns an error from here on into a warning
        if planned := [cell for cell in cells if cell["status"] == "planned"]:
            show_plan(planned)
        paths_of_records = dict.fromkeys(cell["record"] for cell in cells if cell["status"] == "done")
        if records := [record for path in paths_of_records if (record := _record(Path(path))) is not None]:
            _show(records, folder, OmegaConf.select(cls.started, "sweep.title"))
        for cell in failed:
            log.error("failed: %s: %s", " ".join(cell["overrides"]), cell["error"])


def note_cell(folder: str | Path, content: dict[str, Any]) -> None:
    """Write how a cell ended into its output folder: ``status``, ``overrides``, and ``record`` or ``error``.

    A disk that is full is reported and does not end the sweep, whose other cells may find their records.
    """
    try:
        write_json(Path(folder) / CELL, redact(content))
    except OSError as error:
        log.error("how the cell ended could not be noted: %s", os_error_line(error))


class Comparison(Callback):
    """Prints the comparison of a sweep's cells once all have ended, and keeps it as Markdown in the sweep's folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        del kwargs
        Sweep.started, Sweep.cells, Sweep.ended, Sweep.since = config, _count_cells(config), 0, time.monotonic()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Say how far the sweep is, in the process that runs its cells one after the other."""
        del job_return, kwargs
        if Sweep.started is None or OmegaConf.select(config, "plan") is True:
            return
        Sweep.ended += 1
        if Sweep.ended < Sweep.cells:
            spent = time.monotonic() - Sweep.since
            left = spent / Sweep.ended * (Sweep.cells - Sweep.ended)
            log.info("%d of %d cells, %s, about %s left", Sweep.ended, Sweep.cells, clock(spent), clock(left))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        del kwargs
        Sweep.started = config
        Sweep.show_finished(ended=True)


def _count_cells(config: DictConfig) -> int:
    """Return how many cells a sweep has; 0 if its sweeper is not Hydra's own, which alone can tell."""
    if not str(config.hydra.sweeper.get("_target_", "")).endswith("BasicSweeper"):
        return 0
    with suppress(HydraException, OmegaConfBaseException):
        params = OmegaConf.to_container(config.hydra.sweeper.params or OmegaConf.create({}), resolve=True)
        lines = [f"{name}={value}" for name, value in dict(params).items()]  # type: ignore[arg-type]
        typed = list(OmegaConf.to_container(config.hydra.overrides.task) or [])
        named = {line.partition("=")[0] for line in typed}
        lines = [line for line in lines if line.partition("=")[0] not in named] + typed
        overrides = OverridesParser.create().parse_overrides(lines)
        return sum(map(len, BasicSweeper.split_arguments(overrides, None)))
    return 0


def _noted(path: Path) -> dict[str, Any]:
    """Read how a cell ended; ``unknown`` if the file is missing or damaged."""
    try:
        content: dict[str, Any] = read_json(path)
    except OSError as error:
        return {"status": "unknown", "overrides": [path.parent.name], "error": os_error_line(error)}
    except UserError as error:
        return {"status": "unknown", "overrides": [path.parent.name], "error": str(error)}
    return content


def _record(path: Path) -> Record | None:
    try:
        return read_record(path)
    except OSError as error:
        log.error("%s", os_error_line(error))
    except UserError as error:
        log.error("%s", error)
    return None


def _show(records: list[dict[str, Any]], folder: Path, title: str | None) -> None:
    frame, notes = comparison(records), footnotes(records)
    heading = title or f"{len(records)} runs"
    calibrated = next((record for record in records if record["calibration"]), records[0])
    described = f"{caption(calibrated, records)} {settings_line(records)}"
    lines = [f"# {heading}", "", as_markdown(frame), "", described, "", *(f"- {note}" for note in notes), ""]
    text = "\n".join(lines)
    try:
        kept = f"wrote {write_text(folder / 'comparison.md', text)}"
    except OSError as error:
        kept = f"comparison.md could not be written: {os_error_line(error)}"
    screen = console()
    for table in as_rich(frame, heading, screen.width):
        screen.print(table)
    screen.print(described)
    if notes:
        screen.print("What differs from the paper's protocol:")
        for note in notes:
            screen.print(f"  - {note}")
    screen.print(kept, soft_wrap=True)
