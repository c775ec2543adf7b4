"""A process that imports everything once and forks one child per run of a command: a run costs half a second.

It reads lists of jobs as lines of JSON, runs the jobs of one list at the same time, and answers with a list. A mapping
with ``modules`` makes it import these.

A job: ``argv``, ``cwd``, ``env`` (the whole environment), ``module`` (what ``python -m`` would run), ``path`` (before
``sys.path``), ``prelude`` (Python that the child executes first), ``fault`` (see :class:`FaultyFiles`), ``limits`` (of
``resource``, by name), ``stdout`` and ``stderr`` (``file``, ``closed``, or a path), ``encoding``, ``umask``,
``unprivileged``, ``finalise`` (whether the interpreter is ended in full), ``seconds`` and ``bytes`` (limits that the
server enforces), ``box`` (the folder whose file operations count).
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import hashlib
import importlib
import io
import json
import os
import resource
import runpy
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate"}
_PRIVILEGES = (1, 2, 3)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER: with them root ignores permissions
TEXTS = {"c4": "c4.utf8", "wikipedia": "wiki.utf8"}  # the texts of the campaign, by asset and file


class FaultyFiles:
    """Counts operations that change files below a folder, and does something to the process before one of them.

    The fault: ``at`` (which operation, from 1), ``kind``: ``count``; ``kill``, ``signal`` (``number``); ``fail``
    (``number`` is the errno; ``sticky``: all later ones fail too); ``torn`` (half of a tensor file is written, then a
    kill); ``remove``, ``readonly`` (what happens to ``path``), ``flip`` (one bit of the files that match ``path``).
    """

    def __init__(self, box: str, log: str, fault: dict[str, Any]) -> None:
        self._box, self._fault, self._count, self._busy = f"{os.path.realpath(box)}/work/", fault, 0, False
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.addaudithook(self._audit)
        fsync = os.fsync

        def counted_fsync(descriptor: int) -> None:
            self.operation("fsync", str(Path(f"/proc/self/fd/{int(descriptor)}").readlink()))
            fsync(descriptor)

        os.fsync = counted_fsync
        import safetensors.torch

        serialize = safetensors.torch.serialize_file

        def counted_serialize(tensors: Any, filename: Any, *arguments: Any, **settings: Any) -> None:
            torn = self.operation("tensors", os.fspath(filename))
            serialize(tensors, filename, *arguments, **settings)
            if torn:
                os.truncate(filename, os.path.getsize(filename) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        safetensors.torch.serialize_file = counted_serialize

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & _WRITING:
                self.operation(event, path)
        elif event in _CHANGING and isinstance(arguments[0], (str, bytes, os.PathLike)):
            self.operation(event, arguments[0])

    def operation(self, name: str, path: Any) -> bool:
        """Count an operation and do what is due; True if half of it is to be done."""
        path = os.path.abspath(os.fsdecode(path))
        if self._busy or not path.startswith(self._box) or path.endswith(".log"):
            return False
        self._count += 1
        self._busy = True
        try:
            os.write(self._log, json.dumps([name, path[len(self._box) :]]).encode() + b"\n")
            late = self._count >= self._fault.get("at", 0) if self._fault.get("sticky") else False
            return (late or self._count == self._fault.get("at")) and self._strike(name)
        finally:
            self._busy = False

    def _strike(self, name: str) -> bool:
        fault, kind = self._fault, self._fault["kind"]
        path = fault.get("path", "")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "signal":
            os.kill(os.getpid(), fault["number"])
        elif kind == "fail":
            raise OSError(fault["number"], os.strerror(fault["number"]))
        elif kind == "readonly":
            with suppress(FileNotFoundError):
                Path(path).chmod(0o500)
        elif kind == "remove":
            shutil.rmtree(path, ignore_errors=True)
        elif kind == "flip":
            for found in Path("/").glob(path.lstrip("/")):
                with suppress(OSError), open(found, "r+b") as file:
                    file.seek(os.path.getsize(found) * 3 // 4)
                    byte = file.read(1)
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([byte[0] ^ 4]))
        return kind == "torn" and name == "tensors"


def _drop_privileges() -> None:
    """Let permission bits hold for root too."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, data) == 0:
        for bit in _PRIVILEGES:
            data[0] &= ~(1 << bit)
        libc.capset(header, data)


def _redirect(target: str, number: int, log: str) -> None:
    if target == "closed":
        with suppress(OSError):
            os.close(number)
        return
    descriptor = os.open(log if target == "file" else target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, number)
    os.close(descriptor)


def _become(job: dict[str, Any], files: str) -> None:
    """Turn this fork of the server into a process that was started with the job's command line."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for name, number in (("stdout", 1), ("stderr", 2)):
        _redirect(job.get(name, "file"), number, f"{files}.{name}.log")
        encoding = job.get("encoding", "utf-8")
        try:
            buffer = open(number, "wb", closefd=False)  # noqa: SIM115
        except OSError:
            setattr(sys, name, None)  # as the interpreter starts with a closed descriptor
            setattr(sys, f"__{name}__", None)
            continue
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = io.TextIOWrapper(buffer, encoding=encoding, errors=errors, line_buffering=name == "stderr")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.environ.clear()
    os.environ.update(job["env"])
    os.umask(job.get("umask", 0o022))
    os.chdir(job["cwd"])
    tempfile.tempdir = None
    sys.path[:0] = job.get("path", [])
    sys.argv = [job["module"], *job["argv"]]
    _use_texts(Path(job["env"]["DASS_EXP_CACHE"]))
    if job.get("unprivileged"):
        _drop_privileges()
    if prelude := job.get("prelude"):
        exec(compile(prelude, "prelude", "exec"), {"__name__": "prelude"})
    if fault := job.get("fault"):
        FaultyFiles(job["box"], f"{files}.operations.log", fault)
    for name, value in job.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (value, value))


def _use_texts(cache: Path) -> None:
    """Make the small texts of the campaign the offline texts, with the hash that they had when they were written."""
    from dass_exp.data import assets

    try:
        hashes = json.loads((cache / "texts.json").read_text())
    except (OSError, ValueError):
        return  # the case is about another cache
    for name, digest in hashes.items():
        assets.TEXTS[name] = assets.Asset(TEXTS[name], digest, assets.TEXTS[name].parts)


def write_texts(cache: Path, lines: list[str]) -> None:
    """Write the small texts into the cache of a box, as :func:`dass_exp.data.assets.fetch` would."""
    files = cache / "files"
    files.mkdir(parents=True)
    articles = "\n".join(f'<doc id="{number}">\n{line}\n{line}\n</doc>' for number, line in enumerate(lines))
    contents = {"c4": "\n".join(lines), "wikipedia": articles}
    for name, text in contents.items():
        (files / TEXTS[name]).write_text(text, encoding="utf-8")
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents.items()}
    (cache / "texts.json").write_text(json.dumps(hashes))


class Child:
    """A forked job and how it ended."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.files, self.start = job, f"{job['box']}/job-{time.monotonic_ns()}", time.monotonic()
        self.ended: str | None = None
        self.peak = 0
        self.pid = os.fork()

    def poll(self) -> dict[str, Any] | None:
        """The result once the child has ended; one that takes too long or too much memory is ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            with suppress(OSError, ValueError, IndexError):
                private = Path(f"/proc/{self.pid}/statm").read_text().split()
                self.peak = max(self.peak, (int(private[1]) - int(private[2])) * resource.getpagesize())
            if time.monotonic() - self.start > self.job.get("seconds", 20):
                self._end("time limit")
            elif self.peak > self.job.get("bytes", 3 << 30):
                self._end("memory limit")
            return None
        with suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        texts = {name: self._read(f"{self.files}.{name}.log") for name in ("stdout", "stderr")}
        operations = [json.loads(line) for line in self._read(f"{self.files}.operations.log").splitlines()]
        code = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - self.start
        return {"code": code, **texts, "operations": operations, "ended": self.ended, "seconds": round(seconds, 2)}

    def _end(self, reason: str) -> None:
        self.ended = self.ended or reason
        with suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)

    @staticmethod
    def _read(path: str) -> str:
        if not Path(path).is_file():
            return ""
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        Path(path).unlink()
        return text


def _import_all(modules: list[str]) -> None:
    for name in modules:
        with suppress(Exception):
            importlib.import_module(name)
    with suppress(Exception):  # a table that takes a fifth of a second to build
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    gc.collect()
    gc.freeze()  # the pages of what is imported stay shared


def serve() -> dict[str, Any]:
    """Answer lists of jobs, or of modules to import, until standard input ends; in a child, return its job."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    requests = os.fdopen(os.dup(0), "r")
    for line in requests:
        children, request = [], json.loads(line)
        if isinstance(request, dict):
            _import_all(request["modules"])
            request = []
        for job in request:
            child = Child(job)
            if child.pid == 0:
                requests.close()
                os.close(replies.fileno())
                _become(job, child.files)
                return job
            children.append(child)
        results: list[dict[str, Any] | None] = [None] * len(children)
        while None in results:
            select.select([], [], [], 0.005)
            for number, child in enumerate(children):
                results[number] = results[number] or child.poll()
        replies.write(json.dumps(results) + "\n")
        replies.flush()
    sys.exit(0)


def run_job(job: dict[str, Any]) -> None:
    """Run the module as the interpreter would, up to the exit code; the end of the interpreter itself is left out."""
    code: object = 1
    try:
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as exit_:
        code = exit_.code
        if isinstance(code, str):
            sys.stderr.write(code + "\n")
    except KeyboardInterrupt:
        code = 130
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        code = 120
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _job = serve()
    if not _job.get("finalise"):
        run_job(_job)
    runpy.run_module(_job["module"], run_name="__main__", alter_sys=True)
