"""The shape of a record: what we write has it, and what has not is named, never tripped over."""

import copy
import json
import shutil

import pytest
from support import bare_record, run_with, tiny_overrides

from dass_exp.report import cli
from dass_exp.report.load import cells_of, load
from dass_exp.storage.record_schema import is_config, problem_of

KEY = "0123456789abcdef"
SCORED = {
    "metrics": {"perplexity": {"text": 20.0}, "window_nll": {"text": [3.0]}},
    "protocol": {
        **bare_record(KEY)["protocol"],
        "context": 8,
        "dataset": "text",
        "split": None,
        "windows": 1,
        "windows_sha256": "f00",
    },
}


def test_the_least_record_is_one():
    assert problem_of(bare_record(KEY), KEY) is None
    assert problem_of(bare_record(KEY, **SCORED, more={"free": 1}), KEY) is None
    assert (
        problem_of(
            bare_record(
                KEY, **{**SCORED, "metrics": {"perplexity": {"text": float("nan")}, "window_nll": {"text": [1]}}}
            ),
            KEY,
        )
        is None
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schema": 2}, "schema is 2; this version reads 1"),
        ({"schema": None}, "schema is None"),
        ({"key": "another"}, "its key is 'another'"),
        ({"config": {}}, "config.model: field required"),
        ({"config": []}, "config: input should be a valid dictionary"),
        ({"cost": None}, "cost: input should be a valid dictionary"),
        ({"cost": {**bare_record(KEY)["cost"], "prune_s": "long"}}, "cost.prune_s: input should be a valid number"),
        (
            {"sparsity": {"scope": 0, "decoder": 0, "model": 0, "layers": [{}]}},
            "sparsity.layers.0.name: field required",
        ),
        ({"metrics": SCORED["metrics"]}, "protocol: it does not say which windows the perplexity is of"),
        (
            {**SCORED, "metrics": {"perplexity": {"text": 1.0}}},
            "metrics.window_nll: nothing for a perplexity that is there",
        ),
        (
            {"metrics": {"tasks": {"piqa": {"acc": 1.0, "acc_stderr": 0.1, "split": "test", "limit": None}}}},
            "metrics: tasks without their mean_acc",
        ),
    ],
)
def test_what_is_no_record_is_told(changes, told):
    assert problem_of(bare_record(KEY) | changes, KEY).startswith(told)


@pytest.mark.parametrize("found", [None, [], "text", 1])
def test_what_is_no_object_is_told(found):
    assert problem_of(found, KEY) == "it holds no JSON object"


def test_what_a_cell_was_meant_to_be():
    meant = {name: value for name, value in bare_record(KEY)["config"].items() if name != "eval"}
    assert is_config(meant)
    assert not is_config(meant | {"method": None})
    assert not is_config({})


@pytest.fixture(name="swept", scope="module")
def swept_fixture(tiny, tmp_path_factory):
    """A results folder with one scored, pruned cell of the sweep alpha, its dense record, and the note of a failed cell."""
    results = tmp_path_factory.mktemp("fuzzed") / "results"
    outcome = run_with(*tiny_overrides(tiny, results))
    folder = results / "hydra" / "2026-01-01" / "00-00-00"
    notes = [
        {"status": "done", "overrides": ["method.alpha=0.5", "sweeps=alpha"], "record": str(outcome.path)},
        {
            "status": "failed",
            "overrides": ["method.alpha=-1", "sweeps=alpha"],
            "error": "no",
            "config": outcome.record["config"],
        },
    ]
    for number, note in enumerate(notes):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "cell.json").write_text(json.dumps(note))
    return results, outcome.record["key"]


def paths_of(value, path=()):
    """Every place in a JSON value, lists by their first entry."""
    yield path
    entries = (
        value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    )
    for name, inner in entries:
        yield from paths_of(inner, (*path, name))


def changed(value, path, put):
    """The value with something else in one place, or without that place."""
    if not path:
        return put
    whole = copy.deepcopy(value)
    place = whole
    for step in path[:-1]:
        place = place[step]
    if put is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = put
    return whole


@pytest.fixture(name="undrawn")
def undrawn_fixture(monkeypatch):
    """Drawing hundreds of pictures would take an hour; a picture reads what the table reads."""
    monkeypatch.setattr("dass_exp.report.cli.draw", lambda *arguments: [])
    monkeypatch.setattr("dass_exp.report.cli.draw_layers", lambda *arguments: [])


def survives(results, tmp_path):
    """The report either shows a sweep or says why not: it raises nothing but its own exit."""
    try:
        cli.main(["alpha", "--results", str(results), "--output", str(tmp_path / "out"), "--layers", "--mix"])
    except SystemExit as ended:
        assert ended.code in (1, 2)


@pytest.mark.parametrize("put", [KeyError, None, "text", 7, [], {}], ids=str)
def test_no_record_that_was_tampered_with_stops_a_report(swept, tmp_path, put, undrawn):
    whole, key = swept
    results = tmp_path / "results"
    shutil.copytree(whole, results)
    target = results / "runs" / key / "result.json"
    record = json.loads(target.read_text())
    for path in paths_of(record):
        if path == () and put is KeyError:
            continue
        target.write_text(json.dumps(changed(record, path, put)))
        survives(results, tmp_path)


@pytest.mark.parametrize("put", [KeyError, None, "text", 7, [], {}], ids=str)
def test_no_note_that_was_tampered_with_stops_a_report(swept, tmp_path, put, undrawn):
    whole, _ = swept
    results = tmp_path / "results"
    shutil.copytree(whole, results)
    for number in (0, 1):
        target = results / "hydra" / "2026-01-01" / "00-00-00" / str(number) / "cell.json"
        note = json.loads(target.read_text())
        for path in paths_of(note):
            if path[:2] == ("config", "calibration") or (path == () and put is KeyError):
                continue
            target.write_text(json.dumps(changed(note, path, put)))
            survives(results, tmp_path)
        target.write_text(json.dumps(note))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"schema": 1}', b"null", b"[" * 100_000])
def test_a_file_that_is_no_record_is_named(swept, tmp_path, content, caplog):
    whole, key = swept
    results = tmp_path / "results"
    shutil.copytree(whole, results)
    (results / "runs" / key / "result.json").write_bytes(content)
    problems = load(results).problems
    assert len(problems) == 1
    assert f"{key}/result.json" in problems[0]
    survives(results, tmp_path)
    assert problems[0] in caplog.text


def test_what_we_write_has_the_shape(swept):
    results, _ = swept
    loaded = load(results)
    assert len(loaded.records) == 2
    assert loaded.problems == []


def test_the_order_of_cells_is_that_of_the_launch_that_ran_most(tmp_path):
    """A first launch was killed after its second cell, a third ran one cell again: neither shows."""
    for time, alphas in (("00-00-00", ["1", "0"]), ("00-00-01", ["0", "0.5", "1"]), ("00-00-02", ["1"])):
        for number, alpha in enumerate(alphas):
            folder = tmp_path / "hydra" / "2026-01-01" / time / str(number)
            folder.mkdir(parents=True)
            note = {
                "status": "done",
                "overrides": [f"method.alpha={alpha}", "sweeps=alpha"],
                "record": f"{time}-{alpha}/result.json",
            }
            (folder / "cell.json").write_text(json.dumps(note))
    assert [cell.key for cell in cells_of(tmp_path, "alpha")] == ["00-00-01-0", "00-00-01-0.5", "00-00-02-1"]
