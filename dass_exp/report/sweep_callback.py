"""After a sweep: its cells side by side, and those that failed."""

from __future__ import annotations

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
    """What the entry point must know of the sweep that this process launches."""

    started: ClassVar[DictConfig | None] = None
    failed: ClassVar[int] = 0

    @classmethod
    def show_finished(cls) -> None:
        """Print the cells that have left word so far, and keep their comparison in the sweep's folder."""
        if cls.started is None:
            return
        folder = Path(cls.started.hydra.sweep.dir)
        paths = [path for path in folder.glob(f"*/{CELL}") if path.parent.name.isdecimal()]
        cells = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(paths, key=lambda path: int(path.parent.name))
        ]
        records = {
            cell["record"]: json.loads(Path(cell["record"]).read_text(encoding="utf-8"))
            for cell in cells
            if cell["status"] == "done"
        }
        if planned := [cell for cell in cells if cell["status"] == "planned"]:
            show_plan(planned)
        failed = [cell for cell in cells if cell["status"] in ("failed", "unplanned")]
        cls.failed = len(failed)
        if records:
            _show(list(records.values()), folder, OmegaConf.select(cls.started, "sweep.title"))
        for cell in failed:
            log.error("failed: %s: %s", " ".join(cell["overrides"]), cell["error"])


def note_cell(folder: str | Path, content: dict[str, Any]) -> None:
    """Leave word in a cell's output folder of how it ended: ``status``, and ``record`` or ``error``."""
    write_json(Path(folder) / CELL, content)


class Comparison(Callback):
    """Prints the comparison of a sweep's cells and keeps it as Markdown in the sweep's folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra once the sweep itself is composed."""
        del kwargs
        Sweep.started = config

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra once all cells have ended, wherever they ran."""
        del kwargs
        Sweep.started = config
        Sweep.show_finished()


def _show(records: list[dict[str, Any]], folder: Path, title: str | None) -> None:
    frame, notes = comparison(records), footnotes(records)
    heading = title or f"{len(records)} runs"
    described = next((record for record in records if record["calibration"]), records[0])
    described_as = f"{caption(described, records)} {settings_line(records)}"
    lines = [f"# {heading}", "", as_markdown(frame), "", described_as, "", *(f"- {note}" for note in notes), ""]
    (folder / "comparison.md").write_text("\n".join(lines), encoding="utf-8")
    screen = console()
    screen.print(as_rich(frame, heading))
    screen.print(described_as)
    if notes:
        screen.print("What differs from the paper's protocol:")
        for note in notes:
            screen.print(f"  - {note}")
    screen.print(f"wrote {folder / 'comparison.md'}", soft_wrap=True)
