"""One result.json per run, written atomically and found by its key."""

import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from dass_exp.storage.durable import now, replace_durably, write_json
from dass_exp.storage.mask_file import MASKS, PackedMask, write_masks
from dass_exp.storage.record_schema import record_problem

Record = dict[str, Any]


class RecordStore:
    """The records of a results folder, in ``<results>/runs/<key>/``."""

    def __init__(self, results: str | Path) -> None:
        self.runs = Path(results) / "runs"

    def path(self, key: str) -> Path:
        """Return the path of a record, whether it exists or not."""
        return self.runs / key / "result.json"

    def masks(self, key: str) -> Path:
        """Return the path of a run's masks, whether they were saved or not."""
        return self.runs / key / MASKS

    def find(self, key: str) -> Record | None:
        """Return the finished record of this key; None if there is none, or the file is no valid record."""
        try:
            record = json.loads(self.path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return record if record_problem(record, key) is None else None

    def records(self) -> list[Record]:
        """Return all finished records; skip invalid files (:mod:`dass_exp.report.load` names them)."""
        records = (self.find(path.parent.name) for path in sorted(self.runs.glob("*/result.json")))
        return [record for record in records if record is not None]

    @contextmanager
    def lock(self, key: str, wait: bool = True) -> Iterator[None]:
        """Lock the key against other processes; the kernel releases the lock of a process that dies.

        Raises:
            Timeout: another process holds it, and ``wait`` is False.
        """
        folder = self.runs / key
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=-1 if wait else 0):
            yield

    def write(
        self, record: Record, attachments: Mapping[str, Any], masks: Mapping[str, PackedMask] | None = None
    ) -> Path:
        """Write a finished record atomically, after its masks and its attachments (JSON content by file name).

        Raises:
            TypeError: the record is invalid: it would not be found again.
        """
        key = record["key"]
        if (problem := record_problem(record, key)) is not None:
            raise TypeError(f"record {key}: {problem}")
        folder = self.runs / key
        folder.mkdir(parents=True, exist_ok=True)
        if masks is not None:
            scratch = folder / f"{MASKS}.partial"
            try:
                write_masks(masks, scratch)
                replace_durably(scratch, self.masks(key))
            finally:
                scratch.unlink(missing_ok=True)
        for name, content in attachments.items():
            write_json(folder / name, content)
        write_json(self.path(key), record)
        (folder / "failed.json").unlink(missing_ok=True)
        return self.path(key)

    @contextmanager
    def recording_failure(self, key: str, config: Mapping[str, Any]) -> Iterator[None]:
        """Write a failed.json if the body raises, and re-raise; an existing record stays."""
        try:
            yield
        except Exception as error:
            cause = {"error": str(error), "type": type(error).__name__, "traceback": traceback.format_exc()}
            with suppress(OSError):  # a full disk must not hide the error that it caused
                write_json(self.runs / key / "failed.json", {"key": key, "created": now(), "config": config, **cause})
            raise
