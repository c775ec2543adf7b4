"""What every case of the campaign has in common: its box of files, its promise, and how it is tried and counted."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from fork_server import Result, Server
from safetensors import SafetensorError
from safetensors.torch import load_file
from server import write_texts
from support import save_tiny, tiny_overrides

# which cases are tried: sample, all, every so-many-th, or those with this text in their name
WHAT = os.environ.get("DASS_EXP_CAMPAIGN", "sample")
SAMPLED = 1  # cases of a test that are in the sample
TROUBLE = re.compile(
    r"Traceback \(most recent|Exception ignored|panicked at|terminate called|Segmentation|--- Logging error|core dumped"
)
LINES = [
    f"Line {number} of the text: the cat sat on mat {number * 7} and the river ran to the sea." for number in range(40)
]


class Box:
    """The folder of one case: ``work`` (where commands run), ``home``, ``tmp``, ``elsewhere``, ``model``, ``cache``."""

    def __init__(self, folder: Path, template: Path) -> None:
        self.folder = folder
        shutil.copytree(template, folder, symlinks=True)
        self.work, self.elsewhere = folder / "work", folder / "elsewhere"
        self.model, self.cache = folder / "model", folder / "cache"
        self.results, self.saved = self.work / "results", self.work / "saved"

    def job(self, argv: Sequence[str], **settings: Any) -> dict[str, Any]:
        """A job for the server: the command in this box."""
        env = {"PATH": os.environ["PATH"], "HOME": str(self.folder / "home"), "TMPDIR": str(self.folder / "tmp")}
        env |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false", "PIP_NO_INDEX": "1"}
        env |= {"DASS_EXP_CACHE": str(self.cache), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "LANG": "C.UTF-8"}
        env |= settings.pop("env", {})
        job = {"module": "dass_exp", "cwd": str(self.work), "box": str(self.folder), **settings}
        job["env"] = {name: value for name, value in env.items() if value is not None}
        job["argv"] = list(argv)
        return json.loads(json.dumps(job).replace("@/", f"{self.folder}/"))

    def outside(self) -> dict[str, str]:
        """Every file that no run may change, with its content's hash."""
        mine = (self.results, self.saved, self.work / ".saved.partial", self.work / ".saved.lock")
        kept: dict[str, str] = {}
        for root, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if Path(root, name) not in mine]
            for name in files:
                path = Path(root, name)
                if path not in mine and not name.endswith(".lock") and path.is_file():
                    kept[str(path.relative_to(self.folder))] = hashlib.md5(path.read_bytes()).hexdigest()
        return kept

    def leftovers(self) -> list[str]:
        """Scratch files and folders that a finished run may not leave."""
        found = [path for path in self.work.rglob("*") if ".partial" in path.name or path.name.startswith(".tmp")]
        found = [path for path in found if "hydra" not in path.parts]  # each run has a folder of its own there
        found += [path for path in self.results.glob("runs/*/work")]
        found += [path for path in self.results.glob("runs/*/failed.json") if (path.parent / "result.json").is_file()]
        return [str(path.relative_to(self.work)) for path in found]

    def outcome(self) -> dict[str, Any]:
        """What must be the same however often a run was interrupted: metrics, masks, saved weights."""
        outcome: dict[str, Any] = {}
        for path in sorted(self.results.glob("runs/*/result.json")):
            record = json.loads(path.read_text())
            outcome[path.parent.name] = _without_times(
                {name: record[name] for name in ("metrics", "sparsity", "solver")}
            )
        masks = (path for path in self.results.glob("runs/*/masks.safetensors") if not path.is_symlink())
        for path in [*sorted(masks), *sorted(self.saved.glob("*.safetensors"))]:
            outcome[str(path.relative_to(self.work))] = _tensor_hash(path)
        return outcome


@dataclasses.dataclass(frozen=True)
class Case:
    """One hostile attempt and what is promised.

    Args:
        name: unique inside its test.
        argv: the overrides; a ``@/`` stands for the box.
        prepare: changes the box before.
        job: further settings of the job.
        before: jobs that run first, in order; each is (overrides, settings), and may end in any way but a hang.
        codes: exit codes that are promised.
        words: all of them are in the messages of a run that does not end with 0.
        secret: what may be in no file and no message.
        same_as: whether a run that ends with 0 must have the outcome of the clean run of these overrides.
        meanwhile: changes the box between those and the run that counts.
        after: further checks.
        changes: whether the case itself changes files outside the results.
        tidy: whether a run that ends with 0 may leave no scratch file.
        lines: the most lines of message that an error may take.
    """

    name: str
    argv: Sequence[str]
    prepare: Callable[[Box], Any] = lambda box: None
    job: dict[str, Any] = dataclasses.field(default_factory=dict)
    before: Sequence[tuple[Sequence[str], dict[str, Any]]] = ()
    codes: Sequence[int] = (0, 2)
    words: Sequence[str] = ()
    secret: str | None = None
    same_as: Sequence[str] | None = None
    meanwhile: Callable[[Box], Any] = lambda box: None
    after: Callable[[Box, Result], Iterable[str]] = lambda box, result: ()
    changes: bool = False
    tidy: bool = True
    lines: int = 1


class Campaign:
    """Tries cases, each in a box of its own, and counts them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.template = folder / "template"
        for name in ("work", "home", "tmp", "elsewhere"):
            (self.template / name).mkdir(parents=True)
        (self.template / "elsewhere" / "thesis.partial").write_text("years of work")
        (self.template / "elsewhere" / ".tmpthesis").write_text("years of work")
        save_tiny(self.template / "model")
        write_texts(self.template / "cache", LINES)
        self.server = Server(folder)
        self._boxes, self._clean, self._states = 0, {}, {}
        box = self.box()
        self.server.preload(box.job(self.base()))

    def base(self, *more: str) -> list[str]:
        """A run of the tiny model of a fraction of a second, with the last of several values of one setting."""
        overrides = [*tiny_overrides(Path("@/model"), Path("results")), *more]
        return list({text.partition("=")[0]: text for text in overrides}.values())

    def box(self) -> Box:
        """A new box."""
        self._boxes += 1
        return Box(self.folder / f"box{self._boxes}", self.template)

    def clean(self, argv: Sequence[str]) -> dict[str, Any]:
        """The outcome of an undisturbed run."""
        if (known := tuple(argv)) not in self._clean:
            box = self.box()
            (result,) = self.server.run(box.job(argv))
            assert result.code == 0, result.stderr
            self._clean[known] = box.outcome()
            shutil.rmtree(box.folder)
        return self._clean[known]

    def state(self, argv: Sequence[str], **job: Any) -> Callable[[Box], None]:
        """What a run leaves in ``work``, to be copied into other boxes; the run is done once."""
        known = json.dumps([argv, job])
        if known not in self._states:
            self._states[known] = self.box()
            (result,) = self.server.run(self._states[known].job(argv, **job))
            assert job or result.code == 0, result.stderr
        work = self._states[known].work
        return lambda box: shutil.copytree(work, box.work, symlinks=True, dirs_exist_ok=True)

    def files(self, argv: Sequence[str], **job: Any) -> list[Path]:
        """The files in ``work`` after a run, relative to it, without those of Hydra."""
        self.state(argv, **job)
        work = self._states[json.dumps([argv, job])].work
        paths = (path.relative_to(work) for path in sorted(work.rglob("*")) if path.is_file())
        return [path for path in paths if "hydra" not in path.parts and path.suffix != ".lock" and path.name != ".lock"]

    def operations(
        self, argv: Sequence[str], prepare: Callable[[Box], Any] = lambda box: None, **job: Any
    ) -> list[str]:
        """The file operations of an undisturbed run, in order."""
        box = self.box()
        prepare(box)
        (result,) = self.server.run(box.job(argv, fault={"kind": "count"}, **job))
        shutil.rmtree(box.folder)
        return [" ".join(operation) for operation in result.operations]

    def problems(self, case: Case) -> list[str]:
        """Try a case; return what does not hold."""
        box = self.box()
        case.prepare(box)
        found = []
        for argv, settings in case.before:
            (result,) = self.server.run(box.job(argv, **settings))
            make_writable(box.folder)
            found += [f"before: {problem}" for problem in _hang_or_trouble(result)]
        case.meanwhile(box)
        outside = box.outside()
        (result,) = self.server.run(box.job(case.argv, **case.job))
        found += _hang_or_trouble(result) + self._broken_promises(case, box, result)
        if not case.changes and (changed := _changed(outside, box.outside())):
            found.append(f"changed outside of its folders: {changed}")
        found += case.after(box, result)
        if found:
            found.append(f"code {result.code}, {result.seconds} s, in {box.folder}: {result.stderr[-600:]!r}")
        else:
            make_writable(box.folder)
            shutil.rmtree(box.folder, ignore_errors=True)
        return found

    def _broken_promises(self, case: Case, box: Box, result: Result) -> Iterator[str] | list[str]:
        found = []
        if result.code not in case.codes:
            found.append(f"ended with {result.code}, not {case.codes}")
        if result.code != 0:
            text = "\n".join(result.messages)
            planned = "this run needs" in text  # the memory is what is named
            found += [f"does not name {word!r}" for word in case.words if word not in text and not planned]
            if result.code > 0 and not 0 < len(result.messages) <= case.lines and "stderr" not in case.job:
                found.append(f"{len(result.messages)} lines")
        else:
            found += [f"left {name}" for name in box.leftovers() if case.tidy]
            if case.same_as is not None and (wrong := _differences(self.clean(case.same_as), box.outcome())):
                found.append(f"another outcome than the clean run: {wrong}")
        if case.secret is not None:
            found += [f"the secret is in {where}" for where in _holding(case.secret, box, result)]
        return found


def try_all(campaign: Campaign, record: Callable[[str, object], None], kind: str, cases: Iterable[Case]) -> None:
    """Try the cases of one test, or a sample of them; count them under ``kind``; fail with those that do not hold."""
    cases = list(cases)
    assert len({case.name for case in cases}) == len(cases), "names of cases are unique"
    if WHAT in ("all", "sample") or WHAT.isdecimal():
        stride = {"all": 1, "sample": max(1, -(-len(cases) // SAMPLED))}.get(WHAT)
        chosen = cases[:: stride or int(WHAT)]
    else:
        chosen = [case for case in cases if WHAT in case.name]
    broken: dict[str, list[str]] = {}
    for case in chosen:
        if problems := campaign.problems(case):
            broken[case.name] = problems
            with (campaign.folder / "broken.log").open("a", encoding="utf-8", errors="replace") as log:
                log.write(
                    f"{kind}: {case.name}: " + "\n    ".join(problems) + "\n"
                )  # to be read while others are tried
    record("campaign", [kind, len(cases), len(chosen), len(chosen) - len(broken)])
    listed = "\n".join(f"{name}: " + "\n    ".join(problems) for name, problems in broken.items())
    assert not broken, f"{len(broken)} of {len(chosen)} cases do not hold:\n{listed}"


def damages() -> dict[str, Callable[[Path], Any]]:
    """What may happen to a file, by name."""
    found: dict[str, Callable[[Path], Any]] = {
        f"flip-{position}": functools.partial(flip, position=position) for position in (0, 0.1, 0.5, 0.97)
    }
    found["cut"] = lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found["short"] = lambda path: path.write_bytes(path.read_bytes()[:-1])
    found["empty"] = lambda path: path.write_bytes(b"")
    found["zeros"] = lambda path: path.write_bytes(bytes(path.stat().st_size))
    found["text"] = lambda path: path.write_text("no file of this kind")
    found["list"] = lambda path: path.write_text("[]")
    found["pipe"] = lambda path: (path.unlink(), os.mkfifo(path))
    found["folder"] = lambda path: (path.unlink(), path.mkdir())
    found["dangling"] = lambda path: (path.unlink(), path.symlink_to("/no/such/file"))
    found["loop"] = lambda path: (path.unlink(), path.symlink_to(path))
    found["device"] = lambda path: (path.unlink(), path.symlink_to("/dev/zero"))
    found["unreadable"] = lambda path: path.chmod(0)
    return found


def flip(path: Path, position: float) -> None:
    """Flip one bit at a place of a file: 0 is its first byte, 1 its last."""
    content = bytearray(path.read_bytes() or b"x")
    content[min(len(content) - 1, int(position * len(content)))] ^= 4
    path.write_bytes(content)


def _hang_or_trouble(result: Result) -> list[str]:
    found = [f"ended by the {result.ended}"] if result.ended else []
    if trouble := TROUBLE.search(result.stderr + result.stdout):
        found.append(f"{trouble.group()!r} in its output")
    return found


def _changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    ours = re.compile(r"^(job-|home/\.cache|home/\.config|home/\.local/share/wandb|home/\.netrc)")
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name) and not ours.match(name))


def _differences(clean: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in clean if clean[name] != other.get(name)]


def _holding(secret: str, box: Box, result: Result) -> Iterator[str]:
    if secret in result.stdout + result.stderr:
        yield "the output"
    for path in box.work.rglob("*"):
        if path.is_file() and secret.encode() in path.read_bytes():
            yield str(path.relative_to(box.work))


def make_writable(folder: Path) -> None:
    """Undo what a case did to the permissions of folders."""
    for root, folders, _ in os.walk(folder):
        for path in (Path(root, name) for name in folders):
            if not path.is_symlink():
                path.chmod(0o755)


def _without_times(node: Any) -> Any:
    if isinstance(node, dict):
        return {name: _without_times(value) for name, value in node.items() if name != "seconds"}
    return [_without_times(value) for value in node] if isinstance(node, list) else node


def _tensor_hash(path: Path) -> str:
    digest = hashlib.md5()
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
