"""The schema of a record: what we write satisfies it, and reports name what does not instead of crashing."""

import copy
import json
import shutil

import pytest
from support import bare_record, run_with, tiny_overrides

from dass_exp.report import cli
from dass_exp.report.load import cells_of, load
from dass_exp.storage.record_schema import is_config, record_problem

KEY = "0123456789abcdef"
BARE = bare_record(KEY)
WINDOWS = {"context": 8, "dataset": "text", "split": None, "windows": 1, "windows_sha256": "f00"}
METRICS = {"perplexity": {"text": 20.0}, "window_nll": {"text": [3.0]}}

SCORED = {"metrics": METRICS, "protocol": BARE["protocol"] | WINDOWS}


# a group of tasks of which one document each was scored
GROUP = {"acc": 0.5, "split": "test", "limit": 1, "documents": 2, "num_fewshot": 0, "version": "1"}
LIMITED = {
    "metrics": {"tasks": {"mmlu": GROUP}, "mean_acc": 0.5, "mean_acc_norm": 0.5},
    "protocol": BARE["protocol"] | {"lm_eval": "0.4", "limit": 1},
}


@pytest.mark.parametrize("changes", [{}, {**SCORED, "more": {"free": 1}}, LIMITED])
def test_a_valid_record_has_no_problem(changes):
    assert record_problem(BARE | changes, KEY) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schema": 2}, "schema is 2; this version reads 1"),
        ({"schema": None}, "schema is None"),
        ({"key": "another"}, "its key is 'another'"),
        ({"config": {}}, "config.model: field required"),
        ({"config": []}, "config: input should be a valid dictionary"),
        ({"cost": None}, "cost: input should be a valid dictionary"),
        ({"cost": {**BARE["cost"], "prune_s": "long"}}, "cost.prune_s: input should be a valid number"),
        (
            {"sparsity": {"scope": 0, "decoder": 0, "model": 0, "layers": [{}]}},
            "sparsity.layers.0.name: field required",
        ),
        ({"metrics": METRICS}, "protocol: it does not say which windows the perplexity is of"),
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
def test_the_problem_of_an_invalid_record_is_named(changes, problem):
    assert record_problem(BARE | changes, KEY).startswith(problem)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -5.0, 0.0, 0.99])
def test_an_impossible_perplexity_is_named(value):
    metrics = {"perplexity": {"text": value}, "window_nll": {"text": [3.0]}}
    assert record_problem(BARE | SCORED | {"metrics": metrics}, KEY).startswith("metrics.perplexity.text: input should")


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        *[("sparsity", name, value) for name in ("scope", "decoder", "model") for value in (-0.1, 1.1, float("nan"))],
        *[("cost", name, value) for name in ("load_s", "prune_s", "eval_s") for value in (-1.0, float("inf"))],
        ("cost", "peak_rss_bytes", -1),
        ("metrics", "mean_acc", 1.5),
        ("metrics", "mean_acc_norm", float("nan")),
    ],
)
def test_a_number_out_of_its_range_is_named(section, name, value):
    changed = BARE | {section: {**BARE[section], name: value}}
    assert record_problem(changed, KEY).startswith(f"{section}.{name}: input should")


@pytest.mark.parametrize("value", [None, [], "text", 1])
def test_only_an_object_is_a_record(value):
    assert record_problem(value, KEY) == "it holds no JSON object"


def test_a_config_needs_all_settings_that_define_a_cell():
    config = {name: value for name, value in BARE["config"].items() if name != "eval"}
    assert is_config(config)
    assert not is_config(config | {"method": None})
    assert not is_config({})


CELLS = "hydra/2026-01-01/00-00-00"


@pytest.fixture(name="swept", scope="module")
def swept_fixture(tiny, tmp_path_factory):
    """A results folder with a pruned and a failed cell of the sweep alpha, and the path of the pruned cell's record."""
    results = tmp_path_factory.mktemp("sweep") / "results"
    outcome = run_with(*tiny_overrides(tiny, results))
    done = {"status": "done", "overrides": ["method.alpha=0.5", "sweeps=alpha"], "record": str(outcome.path)}
    failed = {"status": "failed", "overrides": ["method.alpha=-1", "sweeps=alpha"], "error": "no"}
    for number, note in enumerate([done, failed | {"config": outcome.record["config"]}]):
        cell = results / CELLS / str(number) / "cell.json"
        cell.parent.mkdir(parents=True)
        cell.write_text(json.dumps(note))
    return results, outcome.path.relative_to(results)


@pytest.fixture(name="results")
def copied_results_fixture(swept, tmp_path):
    """A copy of the results folder, to be damaged."""
    return shutil.copytree(swept[0], tmp_path / "results")


def paths_of(value, path=()):
    """The path of every node of a JSON value; only the first entry of a list."""
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value[:1]))
    for name, child in value.items() if isinstance(value, dict) else ():
        yield from paths_of(child, (*path, name))


def changed(value, path, replacement):
    """A copy of the value with one node replaced, or removed by ``KeyError``."""
    if not path:
        return replacement
    parent = whole = copy.deepcopy(value)
    for name in path[:-1]:
        parent = parent[name]
    parent[path[-1]] = replacement
    if replacement is KeyError:
        del parent[path[-1]]
    return whole


def report(results, tmp_path):
    """Show the sweep, or say why not: the report raises nothing but its own exit."""
    try:
        cli.main(["alpha", "--results", str(results), "--output", str(tmp_path / "out"), "--layers", "--mix"])
    except SystemExit as ended:
        assert ended.code in (1, 2)


@pytest.mark.thorough
@pytest.mark.parametrize("file", ["record", "0/cell.json", "1/cell.json"])
@pytest.mark.parametrize("replacement", [KeyError, None, "text", 7, [], {}], ids=str)
def test_no_damaged_file_stops_a_report(swept, results, tmp_path, replacement, file, monkeypatch):
    for name in ("draw", "draw_layers"):  # hundreds of pictures would take an hour, and read what the table reads
        monkeypatch.setattr(cli, name, lambda *arguments: [])
    target = results / (swept[1] if file == "record" else f"{CELLS}/{file}")
    content = json.loads(target.read_text())
    for path in paths_of(content):
        if (path[:2] == ("config", "calibration") and file != "record") or (path == () and replacement is KeyError):
            continue
        target.write_text(json.dumps(changed(content, path, replacement)))
        report(results, tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"schema": 1}', b"null", b"[" * 100_000])
def test_an_invalid_record_file_is_named(swept, results, tmp_path, content, caplog):
    (results / swept[1]).write_bytes(content)
    (problem,) = load(results).problems
    assert f"{swept[1].parent.name}/result.json" in problem
    report(results, tmp_path)
    assert problem in caplog.text


def test_the_records_we_write_are_valid(swept):
    loaded = load(swept[0])
    assert len(loaded.records) == 2
    assert loaded.problems == []


def test_cells_are_in_the_order_of_the_launch_that_ran_most(tmp_path):
    """The first launch was killed after its second cell, the third reran one cell: neither changes the order."""
    for time, alphas in (("00-00-00", ["1", "0"]), ("00-00-01", ["0", "0.5", "1"]), ("00-00-02", ["1"])):
        for number, alpha in enumerate(alphas):
            folder = tmp_path / "hydra" / "2026-01-01" / time / str(number)
            folder.mkdir(parents=True)
            overrides, record = [f"method.alpha={alpha}", "sweeps=alpha"], f"{time}-{alpha}/result.json"
            note = {"status": "done", "overrides": overrides, "record": record}
            (folder / "cell.json").write_text(json.dumps(note))
    assert [cell.key for cell in cells_of(tmp_path, "alpha")] == ["00-00-01-0", "00-00-01-0.5", "00-00-02-1"]
