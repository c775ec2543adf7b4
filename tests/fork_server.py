"""The client of campaign/server.py, a process that has imported everything and forks one child per run of a command."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from support import ROOT, environment

DOING = ("finding ", "model.placement=stream: the model is read", "continuing after block")
_SHORT_TEXTS = """
import functools
from dass_exp.data.texts import OfflineText
documents = functools.cache(OfflineText.documents)
OfflineText.documents = lambda text: documents(text)[:20]
"""  # as the fixture short_texts
_RUN = ("prelude", "dass_exp.__main__", "dass_exp.report.cli")  # modules that a job runs as its main one


@dataclasses.dataclass(frozen=True)
class Result:
    """How one process ended."""

    code: int
    stdout: str
    stderr: str
    operations: list[list[str]]
    ended: str | None
    seconds: float

    @property
    def messages(self) -> list[str]:
        """The different lines on standard error but those that say what the run is doing."""
        lines = dict.fromkeys(line for line in self.stderr.splitlines() if line.strip())
        return [line for line in lines if not re.fullmatch(r"[^:]* \.\.\.", line) and not line.startswith(DOING)]


class Server:
    """The client of server.py."""

    def __init__(self, folder: Path) -> None:
        self._errors, self.folder, home = (folder / "server.log").open("w"), folder, folder / "home"
        home.mkdir()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, "HOME": str(home), "HF_HOME": str(home), "DASS_EXP_ROOT": str(ROOT)}
        env |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        call, pipe = [sys.executable, str(Path(__file__).parent / "campaign" / "server.py")], subprocess.PIPE
        self._process = subprocess.Popen(
            call, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, env=env, cwd=folder
        )
        self._ask({"modules": ["torch", "transformers", "hydra", "dass_exp.runs.run"]})

    def _ask(self, request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        assert reply, f"the server has ended: {(self.folder / 'server.log').read_text()[-2000:]}"
        return json.loads(reply)

    def run(self, *jobs: dict[str, Any]) -> list[Result]:
        """Run jobs at the same time."""
        return [Result(**result) for result in self._ask(jobs)]

    def preload(self, job: dict[str, Any]) -> None:
        """Let the server import all modules that a job imports."""
        listing = self.folder / "modules.json"
        save = f"open({str(listing)!r}, 'w').write(json.dumps(list(sys.modules)))"
        (result,) = self.run({**job, "prelude": f"import atexit, json, sys\natexit.register(lambda: {save})"})
        assert result.code == 0, result.stderr
        modules = [name for name in json.loads(listing.read_text()) if name != "__main__" and name not in _RUN]
        self._ask({"modules": modules})

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


@functools.cache
def _shared_server() -> Server:
    """One server for all tests of a process."""
    folder = Path(tempfile.mkdtemp())
    server = Server(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.close)
    return server


def forked_command(*arguments: str, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the command as :func:`support.command` does, in a fork of a process that has imported the libraries.

    They have read their own environment variables by then: for tests that change nothing of that. Texts are short,
    as by the fixture short_texts, but in processes that the command starts.
    """
    server = _shared_server()
    env = environment(**changes)
    path = [part for part in env["PYTHONPATH"].split(os.pathsep) if part]
    box = tempfile.mkdtemp(dir=server.folder)
    env.setdefault("DASS_EXP_CACHE", str(Path.home() / ".cache" / "dass_exp"))
    job = {"module": "dass_exp", "argv": list(arguments), "cwd": str(folder), "env": env, "box": box, "path": path}
    (result,) = server.run({**job, "prelude": _SHORT_TEXTS, "seconds": 300})
    return subprocess.CompletedProcess(list(arguments), result.code, result.stdout, result.stderr)
