"""What surrounds a run: streams, locales, folders, variables, limits, trackers, and other processes."""

from __future__ import annotations

import re

import pytest
from harness import Case
from support import ROOT

STREAMS = {
    "stdout closed": {"stdout": "closed"},
    "stderr closed": {"stderr": "closed"},
    "both closed": {"stdout": "closed", "stderr": "closed"},
    "stdout full": {"stdout": "/dev/full"},
    "stderr full": {"stderr": "/dev/full"},
    "both full": {"stdout": "/dev/full", "stderr": "/dev/full"},
    "ascii": {"encoding": "ascii"},
    "latin": {"encoding": "latin-1"},
    "japanese": {"encoding": "shift_jis"},
    "utf-16": {"encoding": "utf-16"},
}
COMMANDS = {
    "run": ([], [0, 1, 120]),
    "refused": (["seed=-1"], [2, 120]),
    "plan": (["plan=true"], [0, 1, 120]),
    "grid": (["-m", "repeat=0,1"], [0, 1, 120]),
    "name": (["model.name='\u2603 é'"], [0, 1, 120]),
    "refused by hydra": (["nosuch=1"], [2, 120]),
    "help": (["--help"], [0, 1, 120]),
    "shown": (["--cfg", "job"], [0, 1, 120]),
}


@pytest.mark.parametrize("finalise", [False, True])
def test_streams(campaign, hold, finalise):
    """One line or none, and nothing when the interpreter ends; a run that ends with 0 has its outcome."""
    cases = []
    for name, streams in STREAMS.items():
        for command, (more, codes) in COMMANDS.items():
            argv = [*campaign.base(), *more]
            promise = {"codes": codes, "lines": 40, "same_as": argv if command in ("run", "grid") else None}
            cases.append(Case(f"{name}-{command}", argv, job={**streams, "finalise": finalise}, **promise))
    hold("streams", cases[finalise::2])


VARIABLES = {
    "HOME": [None, "", "/no/such/home", "/dev/null", "/proc", "relative", "x" * 5000],
    "TMPDIR": [None, "", "/no/such/folder", "/dev/null", "relative"],
    "LANG": ["C", "POSIX", "nosuch", "tr_TR.UTF-8", ""],
    "LC_ALL": ["C", "de_DE.UTF-8", "nosuch"],
    "TERM": ["dumb", "", "nosuch", "xterm-256color"],
    "COLUMNS": ["0", "1", "-1", "x", "1000000"],
    "LINES": ["0", "x"],
    "NO_COLOR": ["1"],
    "FORCE_COLOR": ["1"],
    "TZ": ["nosuch", "", "Asia/Tokyo"],
    "PATH": [None, ""],
    "USER": [None, ""],
    "OMP_NUM_THREADS": ["0", "-1", "x", "1000000"],
    "HYDRA_FULL_ERROR": ["0", "x", ""],
    "PYTHONHASHSEED": ["1"],
    "CUDA_VISIBLE_DEVICES": ["", "-1", "x"],
    "HF_HOME": ["/no/such/folder", "/dev/null"],
    "WANDB_MODE": ["disabled", "x", ""],
}
BAD_VALUES = ["", "0", "-1", "x", "1e9", "/no/such/folder", "/dev/null", "[/x]", "é", "${x}", "x" * 3000]


def own_variables() -> list[str]:
    """All variables of ours that the package and its configuration read."""
    files = [*(ROOT / "dass_exp").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")]
    found = {name for file in files for name in re.findall(r"DASS_EXP_[A-Z_]+", file.read_text(encoding="utf-8"))}
    return sorted(found - {"DASS_EXP_LAUNCHER"})  # set at every start


def test_variables(campaign, hold):
    argv, cases = campaign.base(), []
    for name, values in VARIABLES.items():
        for value in values:
            cases.append(
                Case(f"{name}={str(value)[:20]}", argv, job={"env": {name: value}}, codes=[0, 2], same_as=argv)
            )
    for name in own_variables():
        for value in BAD_VALUES:
            job, promise = {"env": {name: value}}, {"codes": [0, 1, 2], "changes": True, "lines": 2}
            cases.append(Case(f"{name}={value[:20]}", argv, job=job, words=[], **promise))
    hold("variables", cases)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077, 0o177, 0o777])
def test_the_umask_holds_for_every_file(campaign, hold, mask):
    cases = []
    for name, more in {
        "masks": ["save_masks=true"],
        "saved": ["save=saved"],
        "stream": ["model.placement=stream", "save=saved"],
    }.items():

        def modes(box, result):
            files = [path for path in [*box.results.rglob("*"), *box.saved.rglob("*")] if path.is_file()]
            return [
                f"{path.name} has mode {path.stat().st_mode & 0o777:o}" for path in files if path.stat().st_mode & mask
            ]

        argv = campaign.base(*more)
        cases.append(
            Case(
                f"{name}-{mask:o}", argv, job={"umask": mask}, codes=[0] if not mask & 0o300 else [0, 1, 2], after=modes
            )
        )
    hold("surroundings", cases)


def test_working_directories(campaign, hold):
    argv = campaign.base()
    prepare = {
        "read-only": lambda box: box.work.chmod(0o500),
        "unreadable": lambda box: box.work.chmod(0o300),
        "with a module named torch": lambda box: (box.work / "torch.py").write_text("raise SystemExit(3)"),
        "with a conf": lambda box: (box.work / "conf").mkdir(),
        "with a dotenv": lambda box: (box.work / ".env").write_text(
            "DASS_EXP_PLUGINS=evil\nDASS_EXP_CACHE=/dev/null\n"
        ),
        "with netrc": lambda box: (box.folder / "home" / ".netrc").write_text("machine [/x]"),
        "results is a file": lambda box: (box.work / "results").write_text("x"),
        "runs is a file": lambda box: ((box.work / "results").mkdir(), (box.work / "results" / "runs").write_text("x")),
        "hydra is a file": lambda box: (
            (box.work / "results").mkdir(),
            (box.work / "results" / "hydra").write_text("x"),
        ),
    }
    cases = [Case(name, argv, do, {"unprivileged": True}, codes=[0, 1, 2]) for name, do in prepare.items()]
    hold("surroundings", cases)


LIMITS = {
    "RLIMIT_AS": [1 << bits for bits in (32, 33, 34, 36)],
    "RLIMIT_DATA": [1 << bits for bits in (29, 30, 31, 33)],
    "RLIMIT_NOFILE": [8, 12, 16, 24, 32, 64, 128],
    "RLIMIT_STACK": [1 << bits for bits in (16, 18, 20, 23)],
    "RLIMIT_FSIZE": [1, 100, 1000, 10000],
    "RLIMIT_NPROC": [1, 10],
}


@pytest.mark.parametrize("placement", ["resident", "stream"])
def test_limits_of_the_process(campaign, hold, placement):
    """A run fits, or one line; then the same command without the limit succeeds."""
    argv, cases = campaign.base(f"model.placement={placement}"), []
    for name, values in LIMITS.items():
        for value in values:
            job = {"limits": {name: value}}
            cases.append(Case(f"{name}={value}", argv, job=job, codes=[0, 1, 2], lines=2))
    hold("limits", cases)


HUGE = {
    "samples": ["calibration.num_samples=1000000000"],
    "sequence": ["calibration.seq_len=1000000000"],
    "positions": ["calibration.seq_len=4096"],
    "both": ["calibration.num_samples=100000", "calibration.seq_len=4096"],
    "batch": ["calibration.batch_size=1000000000"],
    "scoring batch": ["eval.batch_size=1000000000"],
    "context": ["eval.perplexity.context=1000000000"],
    "windows": ["eval.perplexity.max_windows=1000000000"],
    "threads": ["threads=1000000"],
    "a block of SparseGPT": ["method=sparsegpt", "++method.block_size=1000000000"],
}


@pytest.mark.parametrize("placement", ["resident", "stream"])
def test_sizes_beyond_all_bounds(campaign, hold, placement):
    """Refused in seconds and without much memory, or the run goes on."""
    job = {"seconds": 15, "bytes": 1 << 30}
    hold(
        "limits",
        [
            Case(name, campaign.base(f"model.placement={placement}", *more), job=job, codes=[0, 2])
            for name, more in HUGE.items()
        ],
    )


WANDB = """
import sys, types
wandb = types.ModuleType("wandb")
sys.modules["wandb"] = wandb
class Panic(BaseException): pass
def fail(*arguments, **settings):
    {body}
class Run:
    def log(self, *arguments, **settings): {log}
    def finish(self, *arguments, **settings): {finish}
    config = summary = {{}}
    id = name = "x"
def init(*arguments, **settings):
    {init}
    return Run()
wandb.init = init
wandb.Settings = lambda **settings: {settings}
wandb.Table = lambda **settings: {table}
"""
FAILURES = {
    "raises": "raise RuntimeError('[/x] no')",
    "raises many lines": "raise ValueError('a\\nb\\nc')",
    "exits": "sys.exit(0)",
    "exits with 3": "sys.exit(3)",
    "panics": "raise Panic('panicked')",
    "memory": "raise MemoryError",
    "recursion": "fail()",
    "not found": "raise FileNotFoundError(2, 'no such file', 'wandb')",
    "connection": "raise ConnectionError('network')",
    "keyboard": "raise TimeoutError('slow')",
    "prints": "sys.stderr.flush()",
    "unicode": "raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'bad')",
}


def test_trackers_that_fail(campaign, hold):
    """Whatever a tracker does: one warning, and the result is there."""
    clean, cases = campaign.base(), []
    for place in ("init", "log", "finish", "settings", "table"):
        for name, body in FAILURES.items():
            calls = dict.fromkeys(("init", "log", "finish"), "pass") | dict.fromkeys(("settings", "table"), "None")
            source = WANDB.format(body=body, **{**calls, place: "fail()"})
            argv = campaign.base("tracker=wandb")

            def warned(box, result, name=name):
                if name in ("prints",):
                    return []
                return [] if len(result.messages) in (1, 2) else [f"{len(result.messages)} warnings"]

            cases.append(Case(f"{place}-{name}", argv, job={"prelude": source}, codes=[0], same_as=clean, after=warned))
    missing = "import sys; sys.modules['wandb'] = None"
    cases.append(
        Case("not installed", campaign.base("tracker=wandb"), job={"prelude": missing}, codes=[0], same_as=clean)
    )
    hold("trackers", cases)


def test_the_true_tracker_in_odd_surroundings(campaign, hold):
    argv, clean = campaign.base("tracker=wandb"), campaign.base()
    folder = {
        "a file": lambda box: (box.results.mkdir(), (box.results / "wandb").write_text("x")),
        "read-only": lambda box: (box.results / "wandb").mkdir(parents=True) or (box.results / "wandb").chmod(0o500),
    }
    job = {"unprivileged": True, "seconds": 60}
    cases = [Case(name, argv, do, job, codes=[0], same_as=clean, lines=3) for name, do in folder.items()]
    for mode in ("offline", "disabled", "dryrun", "nosuch", "online"):
        settings = {
            "seconds": 90,
            "env": {"WANDB_MODE": mode, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"},
        }
        cases.append(Case(f"mode-{mode}", argv, job=settings, codes=[0], same_as=clean))
    hold("trackers", cases)


@pytest.mark.parametrize("run", [["save_masks=true"], ["model.placement=stream", "save=saved"], ["-m", "repeat=0,1"]])
@pytest.mark.parametrize("count", [2, 4])
def test_many_processes_on_one_key(campaign, hold, run, count):
    """All end, one record and one outcome; a second writer of a save folder may be refused."""
    argv = [*run, *campaign.base()]
    others: list[str] = []

    def start(box):
        jobs = [box.job(argv) for _ in range(count)]
        others[:] = [
            f"{r.code}: {r.stderr[-300:]}" for r in campaign.server.run(*jobs) if r.code not in (0, 2) or r.ended
        ]

    repeats = [f"{run[0]}-{count}-{number}" for number in range(3)]
    hold("processes", [Case(name, argv, start, codes=[0], same_as=argv, after=lambda b, r: others) for name in repeats])
