"""Print a comparison of a sweep's cells after it has ended, and the cells that failed."""

import json
import logging
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from dass_exp.report.compare import as_markdown, as_rich, comparison, footnotes, settings_line
from dass_exp.report.console import caption, console, show_plan
from dass_exp.storage.durable import write_json

log = logging.getLogger(__name__)

CELL = "cell.json"


class Sweep:
    """The sweep that this process launches: its config once it has started, and how many cells failed."""

    started: ClassVar[DictConfig | None] = None
    failed: ClassVar[int] = 0

    @classmethod
    def show_finished(cls) -> None:
        """Print the cells that have ended so far, and write their comparison into the sweep's folder."""
        if cls.started is None:
            return
        folder = Path(cls.started.hydra.sweep.dir)
        numbers = sorted(int(path.parent.name) for path in folder.glob(f"*/{CELL}") if path.parent.name.isdecimal())
        cells = [_read(folder / str(number) / CELL) for number in numbers]
        if planned := [cell for cell in cells if cell["status"] == "planned"]:
            show_plan(planned)
        paths_of_records = dict.fromkeys(cell["record"] for cell in cells if cell["status"] == "done")
        if records := [_read(Path(path)) for path in paths_of_records]:
            _show(records, folder, OmegaConf.select(cls.started, "sweep.title"))
        failed = [cell for cell in cells if cell["status"] in ("failed", "unplanned")]
        cls.failed = len(failed)
        for cell in failed:
            log.error("failed: %s: %s", " ".join(cell["overrides"]), cell["error"])


def note_cell(folder: str | Path, content: dict[str, Any]) -> None:
    """Write how a cell ended into its output folder: ``status``, ``overrides``, and ``record`` or ``error``."""
    write_json(Path(folder) / CELL, content)


class Comparison(Callback):
    """Prints the comparison of a sweep's cells once all have ended, and keeps it as Markdown in the sweep's folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        del kwargs
        Sweep.started = config

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        del kwargs
        Sweep.started = config
        Sweep.show_finished()


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _show(records: list[dict[str, Any]], folder: Path, title: str | None) -> None:
    frame, notes = comparison(records), footnotes(records)
    heading = title or f"{len(records)} runs"
    calibrated = next((record for record in records if record["calibration"]), records[0])
    described = f"{caption(calibrated, records)} {settings_line(records)}"
    lines = [f"# {heading}", "", as_markdown(frame), "", described, "", *(f"- {note}" for note in notes), ""]
    (folder / "comparison.md").write_text("\n".join(lines), encoding="utf-8")
    screen = console()
    screen.print(as_rich(frame, heading))
    screen.print(described)
    if notes:
        screen.print("What differs from the paper's protocol:")
        for note in notes:
            screen.print(f"  - {note}")
    screen.print(f"wrote {folder / 'comparison.md'}", soft_wrap=True)
