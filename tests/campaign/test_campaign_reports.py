"""Records and cells that are damaged, foreign or of the future: named by their readers, and never overwritten."""

from __future__ import annotations

import json
import shutil

import pytest
from harness import Case, damages

GRID = ["-m", "sweeps=alpha", "method.alpha=0,1", "pattern=2of4"]
REPORT = {"module": "dass_exp.report.cli"}
WRONG = [None, "two", -5, 10**400, [], {}, float("nan"), float("inf"), True, "[/x]", "a\ud800b"]


def leaves(node, path=()):
    """The places of all values of a record, of a list only its first."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from leaves(value, (*path, name))
    elif isinstance(node, list) and node:
        yield from leaves(node[0], (*path, 0))
    else:
        yield path


def put(record, path, value):
    """The record with another value at a place."""
    changed = json.loads(json.dumps(record))
    node = changed
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return changed


@pytest.fixture
def grid(campaign):
    """A finished grid: a preparation, its files, and one of its records as path and content."""
    argv = [*GRID, *campaign.base()]
    state, files = campaign.state(argv), campaign.files(argv)
    paths = [path for path in files if path.name == "result.json"]
    box = campaign.box()
    state(box)
    records = {path: json.loads((box.work / path).read_text()) for path in paths}
    shutil.rmtree(box.folder)
    path = next(path for path, record in records.items() if record["calibration"])
    return state, path, records[path]


def test_a_report_of_whole_records(campaign, hold, grid):
    state, path, _ = grid
    key = path.parts[2]
    calls = {
        "all": ([], [0]),
        "one": (["alpha"], [0]),
        "twice": (["alpha", "alpha"], [0]),
        "unknown": (["nosuch"], [2]),
        "another": (["demo"], [2]),
        "elsewhere": (["--results", "/no/such"], [2]),
        "a file": (["--results", "@/model/config.json"], [2]),
        "output is a file": (["--output", "@/model/config.json"], [2]),
        "output in a device": (["--output", "/dev/null"], [2]),
        "mixed": (["--mix"], [0]),
        "layers": (["--layers", "alpha"], [0]),
        "compare none": (["compare"], [2]),
        "compare one": (["compare", key], [2]),
        "compare the same": (["compare", key, key], [0, 2]),
        "compare unknown": (["compare", key, "nosuch"], [2]),
        "markup": (["[/x]"], [2]),
        "surrogate": (["a\udcff"], [2]),
        "an unknown switch": (["--nosuch"], [2]),
    }
    hold("reports", [Case(name, more, state, REPORT, codes=codes, lines=60) for name, (more, codes) in calls.items()])


def test_files_of_a_grid_that_are_damaged(campaign, hold, grid):
    """The report names the file and goes on; it does not hang, and changes no record."""
    state, path, _ = grid
    cells = "results/hydra/*/*/0/cell.json"
    cases = []
    for pattern in (str(path), cells, "results/runs/*/.lock"):
        for name, do in damages().items():

            def prepare(box, pattern=pattern, do=do):
                state(box)
                do(next(box.work.glob(pattern)))

            job = {**REPORT, "unprivileged": name == "unreadable"}
            words = [path.parts[2]] if pattern == str(path) and name != "short" else []  # its last byte is a newline
            named = lambda box, result, words=words, name=name: [  # noqa: E731
                f"does not name {word}" for word in words if word not in result.stderr
            ]
            promise = {"codes": [0, 1, 2], "lines": 60, "after": named, "changes": True}
            cases.append(Case(f"{pattern.split('/')[-1]}-{name}", [], prepare, job, **promise))
    hold("reports", cases)


def test_values_of_a_record_that_are_wrong(campaign, hold, grid):
    """A report and a later run: neither fails on it, and a number that cannot be is shown nowhere."""
    state, path, record = grid
    cases = []
    for number, place in enumerate(leaves(record)):
        for value in (WRONG[number % len(WRONG)], WRONG[(number + 3) % len(WRONG)]):

            def prepare(box, place=place, value=value):
                state(box)
                (box.work / path).write_text(json.dumps(put(record, place, value)))

            name = f"{'.'.join(map(str, place))}={str(value)[:12]!r}"
            cases.append(Case(f"report-{name}", [], prepare, REPORT, codes=[0, 1, 2], lines=60, changes=True))
            if number % 3 == 0:
                promise = {"codes": [0, 1, 2], "lines": 3, "changes": True}
                cases.append(Case(f"run-{name}", campaign.base("method.alpha=1"), prepare, **promise))
    hold("records", cases)


@pytest.mark.parametrize("value", [0.5, -5, 0, float("nan"), float("inf"), float("-inf"), "12", True])
def test_a_perplexity_that_cannot_be_is_in_no_table(campaign, hold, grid, value):
    state, path, record = grid
    place = ("metrics", "perplexity", next(iter(record["metrics"]["perplexity"])))

    def prepare(box):
        state(box)
        (box.work / path).write_text(json.dumps(put(record, place, value)))

    def named(box, result):
        return [] if path.parts[2] in result.stderr else ["the record is not named"]

    hold("records", [Case(f"{value!r}", [], prepare, REPORT, codes=[0, 1, 2], lines=60, after=named, changes=True)])


def test_records_that_are_none_are_kept(campaign, hold, grid):
    """A run does not replace what is no record of its own: it keeps it under another name, or refuses."""
    state, path, record = grid
    contents = {
        "of the future": json.dumps({**record, "schema": 2}),
        "of the far future": json.dumps({"schema": 99}),
        "of a word": json.dumps({**record, "schema": "x"}),
        "of another key": json.dumps({**record, "key": "0" * 16}),
        "cut": json.dumps(record)[:500],
        "a list": "[]",
        "a word": '"x"',
        "null": "null",
        "nothing": "",
        "foreign": '{"mine": 1}',
        "deep": "[" * 100000,
        "a thesis": "years of work",
        "NaN": "NaN",
        "twice": json.dumps(record) * 2,
        "utf-16": json.dumps(record).encode("utf-16").decode("latin-1"),
    }
    cases, again = [], campaign.base("method.alpha=1" if record["config"]["method"]["alpha"] == 1 else "method.alpha=0")
    for name, content in contents.items():

        def prepare(box, content=content):
            state(box)
            (box.work / path).write_text(content)

        def kept(box, result, content=content):
            texts = [file.read_text(errors="replace") for file in (box.work / path.parent).iterdir() if file.is_file()]
            found = [] if content in texts else ["the file was overwritten"]
            return found if path.parts[2] in result.stderr else [*found, "the file is not named"]

        cases.append(Case(f"run-{name}", again, prepare, codes=[0, 1, 2], after=kept, lines=3))
        named = lambda box, result: [] if path.parts[2] in result.stderr else ["not named"]  # noqa: E731
        cases.append(Case(f"report-{name}", [], prepare, REPORT, codes=[0, 1, 2], lines=60, after=named, changes=True))
    hold("records", cases)


OUTPUTS = [
    "report.html",
    "report.html.partial",
    "tables",
    "tables/alpha.md",
    "tables/alpha.csv",
    "figures",
    "figures/alpha.png",
]


@pytest.mark.parametrize("target", ["elsewhere/thesis.partial", "elsewhere", "nowhere"])
def test_links_in_the_place_of_what_a_report_writes(campaign, hold, grid, target):
    state, _, _ = grid
    cases = []
    for name in OUTPUTS:

        def prepare(box, name=name):
            state(box)
            place = box.results / name
            place.parent.mkdir(exist_ok=True)
            if place.exists():
                shutil.rmtree(place) if place.is_dir() else place.unlink()
            place.symlink_to(box.folder / target)

        def intact(box, result):
            there = (box.elsewhere / "thesis.partial").read_text() == "years of work"
            return [] if there else ["a file elsewhere was changed"]

        codes = [0, 1, 2]
        cases.append(Case(f"{name}-{target}", [], prepare, REPORT, codes=codes, lines=60, after=intact, changes=True))
    hold("links", cases)


@pytest.mark.parametrize("count", [2, 3])
def test_reports_at_the_same_time(campaign, hold, grid, count):
    state, _, _ = grid
    broken: list[str] = []

    def prepare(box):
        state(box)
        jobs = [box.job([], **REPORT) for _ in range(count)]
        broken[:] = [f"{r.code}: {r.stderr[-300:]}" for r in campaign.server.run(*jobs) if r.code]

    hold(
        "processes", [Case(f"reports-{count}", [], prepare, REPORT, codes=[0], after=lambda b, r: broken, changes=True)]
    )


def test_a_disk_that_fills_up_under_a_report(campaign, hold, grid):
    state, _, _ = grid
    operations = campaign.operations([], state, **REPORT)
    cases = []
    for number, name in ((28, "ENOSPC"), (13, "EACCES"), (5, "EIO")):
        for at in range(1, len(operations) + 1, 4):
            fault = {"kind": "fail", "number": number, "sticky": True, "at": at}
            promise = {"codes": [0, 1, 2], "lines": 60, "changes": True}
            cases.append(Case(f"{name}-{at}", [], state, {**REPORT, "fault": fault}, **promise))
    hold("full disk", cases)
