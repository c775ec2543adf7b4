"""One result.json per run, written atomically and found by its key."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from dass_exp.config.redact import redact
from dass_exp.errors import DamagedFileError, NewerRecordError, UserError
from dass_exp.paths import MASKS
from dass_exp.storage.durable import now, read_json, refuse_links, remove_partial_files, write_json
from dass_exp.storage.record_schema import SCHEMA, record_problem, schema_is_newer

if TYPE_CHECKING:
    from dass_exp.storage.mask_file import PackedMask

log = logging.getLogger(__name__)

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

    def has_masks(self, key: str) -> bool:
        """Check whether the masks of a run were saved and are intact."""
        from dass_exp.storage.mask_file import read_packed  # torch, which a report without masks does not need

        try:
            return bool(read_packed(self.masks(key)))
        except UserError:
            return False

    def find(self, key: str) -> Record | None:
        """Return the finished record of this key; None if there is none, or the file is no valid record.

        Raises:
            NewerRecordError: a later version of this project wrote it.
        """
        try:
            return read_record(self.path(key))
        except NewerRecordError:
            raise
        except (OSError, DamagedFileError):
            return None

    def records(self) -> list[Record]:
        """Return all finished records; skip invalid files (:mod:`dass_exp.report.load` names them)."""
        records = []
        for path in sorted(self.runs.glob("*/result.json")):
            with suppress(OSError, DamagedFileError, NewerRecordError):
                records.append(read_record(path))
        return records

    @contextmanager
    def lock(self, key: str, wait: bool = True) -> Iterator[None]:
        """Lock the key against other processes; the kernel releases the lock of a process that dies.

        Raises:
            UserError: the folder of the key is a link.
            Timeout: another process holds it, and ``wait`` is False.
        """
        folder, lock = self.runs / key, self.runs / key / ".lock"
        refuse_links(lock, self.runs.parent)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=-1 if wait else 0):
            yield

    def make_way(self, key: str) -> None:
        """Keep what is no valid record under another name, which a warning says, before a record takes its place.

        Raises:
            NewerRecordError: a later version of this project wrote the record; it must stay.
        """
        path = self.path(key)
        try:
            read_record(path)
        except NewerRecordError:
            raise
        except (OSError, DamagedFileError) as error:
            if os.path.lexists(path):
                log.warning("%s; it is kept as %s, and the run is done again", error, _set_aside(path))
        if os.path.lexists(masks := self.masks(key)) and not self.has_masks(key):
            log.warning("%s: the masks are damaged; the file is kept as %s", masks, _set_aside(masks))

    def tidy(self, key: str) -> None:
        """Remove what killed or failed runs left beside a finished record."""
        remove_partial_files(self.runs / key)
        (self.runs / key / "failed.json").unlink(missing_ok=True)

    def write(
        self, record: Record, attachments: Mapping[str, Any], masks: Mapping[str, PackedMask] | None = None
    ) -> Path:
        """Write a finished record atomically, after its masks and its attachments (JSON content by file name).

        Raises:
            NewerRecordError: the record that is there is of a later version.
            TypeError: the record is invalid: it would not be found again.
        """
        key = record["key"]
        if (problem := record_problem(record, key)) is not None:
            raise TypeError(f"record {key}: {problem}")
        folder = self.runs / key
        refuse_links(folder, self.runs.parent)
        self.make_way(key)
        folder.mkdir(parents=True, exist_ok=True)
        if masks is not None:
            from dass_exp.storage.mask_file import write_masks

            write_masks(masks, self.masks(key))
        for name, content in attachments.items():
            write_json(folder / name, content)
        write_json(self.path(key), {**redact(record), "identity": record["identity"]})
        self.tidy(key)
        return self.path(key)

    @contextmanager
    def recording_failure(self, key: str, config: Mapping[str, Any]) -> Iterator[None]:
        """Write a failed.json if the body raises, and re-raise; an existing record stays."""
        try:
            yield
        except Exception as error:
            cause = {"error": str(error), "type": type(error).__name__, "traceback": traceback.format_exc()}
            with suppress(OSError):  # a full disk must not hide the error that it caused
                note = {"key": key, "created": now(), "config": config, **cause}
                write_json(self.runs / key / "failed.json", redact(note))
            raise


def read_record(path: Path) -> Record:
    """Read a record, whose key is the name of its folder.

    Raises:
        NewerRecordError: a later version of this project wrote it.
        DamagedFileError: it is damaged or no record; the message names it.
        OSError: it is missing or cannot be read.
    """
    record = read_json(path)
    if schema_is_newer(record):
        raise NewerRecordError(
            f"{path}: a later version of dass_exp wrote it (schema {record['schema']}; this version reads {SCHEMA}); "
            "update dass_exp, or name another results_dir"
        )
    if (problem := record_problem(record, path.parent.name)) is not None:
        raise DamagedFileError(f"{path}: not a record of this project ({problem})")
    valid: Record = record
    return valid


def _set_aside(path: Path) -> str:
    """Rename a file that cannot be used, so that nothing overwrites it; return its new name."""
    kept = path.with_name(f"{path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}")
    path.rename(kept)
    return kept.name
