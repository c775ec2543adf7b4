"""What every tracker is told of a run, what is sent later, and failures, which cost one warning and no result."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from fork_server import forked_command as command
from mlflow import MlflowClient
from support import listening, run_with, settings_of, tiny_overrides, without

from dass_exp.cell import _named_sweep
from dass_exp.errors import NumericalError, UserError
from dass_exp.report import cli
from dass_exp.runs.run import run
from dass_exp.storage.durable import read_json
from dass_exp.storage.record_numbers import flat_metrics
from dass_exp.trackers.base import Tracker, sweep_of_run
from dass_exp.trackers.mlflow import MlflowTracker
from dass_exp.trackers.none import NullTracker
from dass_exp.trackers.tracking import Tracking, send_missing
from dass_exp.trackers.trackio import TrackioTracker
from dass_exp.trackers.wandb import WandbTracker

pytestmark = pytest.mark.usefixtures("short_texts")


@dataclass
class Listener(Tracker):
    """Notes what it is told, and raises at one kind of call."""

    broken: str = ""
    told: list[Any] = field(default_factory=list)

    def note(self, kind, *content):
        self.told.append((kind, *content))
        if kind == self.broken:
            raise ConnectionError("the server\nis down")

    def begin(self, run, results):
        self.note("begin", run["config"]["method"]["name"])

    def progress(self, numbers):
        self.note("progress", numbers["blocks"])

    def send(self, record, results):
        self.note("send", record["config"]["method"]["name"])

    def fail(self, error):
        self.note("fail", error)


@dataclass
class FunctionTracker(Tracker):
    """A tracker that calls a function."""

    function: Callable[[dict[str, Any], str], None]

    def send(self, record, results):
        self.function(record, results)


def tracked(tracker, *overrides, context=None):
    """Run with a tracker, or one that calls a function."""
    tracker = tracker if isinstance(tracker, Tracker) else FunctionTracker(tracker)
    return run(replace(settings_of(*overrides), tracker=tracker), context)


def unscored(cell):
    return [*without(cell, "eval"), "eval=none"]


def warnings_in(caplog):
    return [entry.getMessage() for entry in caplog.records if entry.name.startswith("dass_exp")]


def test_a_tracker_is_told_of_the_beginning_every_block_and_the_end(cell):
    tracked(listener := Listener(), *cell, "method=wanda")
    dense, pruned = [("begin", "dense"), ("send", "dense")], [("begin", "wanda"), ("progress", 1), ("progress", 2)]
    assert listener.told == [*dense, *pruned, ("send", "wanda")]


def test_a_tracker_is_told_of_a_failure(cell, caplog):
    context = listening(
        on_block_end=lambda report: (_ for _ in ()).throw(NumericalError(f"{report.name}:\nnot finite"))
    )
    with pytest.raises(NumericalError):
        tracked(listener := Listener(), *unscored(cell), "method=wanda", context=context)
    assert listener.told == [("begin", "wanda"), ("fail", "NumericalError: model.layers.0: not finite")]
    assert not warnings_in(caplog)


@pytest.mark.parametrize("broken", ["begin", "progress", "send"])
def test_a_tracker_that_fails_is_told_nothing_more_of_the_run(cell, results, caplog, broken):
    with caplog.at_level(logging.WARNING):
        outcome = tracked(listener := Listener(broken), *unscored(cell), "method=wanda")
    assert warnings_in(caplog) == ["the tracker failed, the record is safe: ConnectionError: the server is down"]
    assert [kind for kind, *_ in listener.told].count(broken) == 1 and listener.told[-1][0] == broken
    assert read_json(outcome.path) == outcome.record
    assert not (outcome.path.parent / "tracked.json").exists()


def test_a_tracker_that_fails_costs_one_warning_and_no_result(cell, caplog):
    def broken(record, results):
        raise ConnectionError("the server\nis down")

    with caplog.at_level(logging.WARNING):
        outcome = tracked(broken, *cell, "method=dense")
    assert warnings_in(caplog) == ["the tracker failed, the record is safe: ConnectionError: the server is down"]
    assert read_json(outcome.path) == outcome.record
    assert not (outcome.path.parent / "failed.json").exists()


def test_the_record_is_written_before_the_tracker_sees_it(cell, results):
    def compare(record, results):
        compared.append(read_json(Path(results) / "runs" / record["key"] / "result.json") == record)

    compared = []
    tracked(compare, *cell, "method=dense")
    assert compared == [True]


def test_an_existing_record_is_not_tracked_again(cell):
    sent = []
    for _ in range(2):
        tracked(lambda record, results: sent.append(record["config"]["method"]["name"]), *cell, "method=magnitude")
    assert sent == ["dense", "magnitude"]


def test_the_null_tracker_writes_nothing(tmp_path):
    Tracking(NullTracker(), str(tmp_path / "results")).send({"identity": {}})
    assert list(tmp_path.iterdir()) == []


def test_flat_names_of_the_numbers():
    record = {
        "metrics": {
            "perplexity": {"wikipedia_mini": 20.5},
            "divergence": {"wikipedia_mini": {"kl": 0.5, "agreement": 0.75, "perplexity_ratio": 2.0}},
            "tasks": {"piqa": {"acc": 0.6, "acc_stderr": 0.1, "version": 1.0, "limit": 20}},
            "mean_acc": 0.6,
            "mean_acc_norm": 0.6,
        },
        "sparsity": {"scope": 0.5, "decoder": 0.4, "model": 0.3, "layers": [], "excess_zeros": 0},
        "cost": {"prune_s": 1.5, "peak_gpu_bytes": None},
    }
    assert flat_metrics(record) == {
        "perplexity/wikipedia_mini": 20.5,
        "kl/wikipedia_mini": 0.5,
        "agreement/wikipedia_mini": 0.75,
        "perplexity_ratio/wikipedia_mini": 2.0,
        "piqa/acc": 0.6,
        "piqa/acc_stderr": 0.1,
        "mean_acc": 0.6,
        "mean_acc_norm": 0.6,
        "sparsity/scope": 0.5,
        "sparsity/decoder": 0.4,
        "sparsity/model": 0.3,
        "cost/prune_s": 1.5,
    }


def records_of(*outcomes):
    return [record for outcome in outcomes for record in (outcome.dense, outcome.record)]


def test_only_what_was_not_sent_is_sent_later(cell, results):
    records = records_of(run_with(*cell, "method=wanda"))
    listener = Listener()
    assert send_missing(listener, records, str(results)) == (2, 0)
    assert send_missing(listener, records, str(results)) == (0, 2)
    assert send_missing(FunctionTracker(lambda record, results: None), records, str(results)) == (2, 0)  # another place
    again = run_with(*cell, "method=wanda", "rerun=true")  # a new record under the same key
    assert send_missing(listener, records_of(again), str(results)) == (1, 1)
    assert listener.told == [("send", "dense"), ("send", "wanda"), ("send", "wanda")]


def test_what_the_run_has_sent_is_not_sent_later(cell, results):
    outcome = tracked(listener := Listener(), *cell, "method=wanda")
    assert send_missing(listener, records_of(outcome), str(results)) == (0, 2)


def test_a_damaged_note_is_sent_again(cell, results):
    outcome = tracked(listener := Listener(), *unscored(cell), "method=wanda")
    (outcome.path.parent / "tracked.json").write_text("{")
    assert send_missing(listener, [outcome.record], str(results)) == (1, 0)


def test_a_record_that_cannot_be_sent_later_is_named(cell, results):
    record = run_with(*unscored(cell), "method=wanda").record
    with pytest.raises(UserError, match=f"^record {record['key']} was not sent: ConnectionError: the server is down$"):
        send_missing(Listener("send"), [record], str(results))


def report(capsys, *arguments):
    try:
        cli.main([*arguments])
        code = 0
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr().err


@pytest.mark.thorough
def test_the_command_sends_what_its_filters_admit(cell, results, capsys, caplog):
    record = run_with(*cell, "method=wanda").record
    arguments = ["sync", "--tracker", "mlflow", "--results", str(results)]
    with caplog.at_level(logging.INFO):
        assert report(capsys, *arguments, "--where", "method=wanda")[0] == 0
        assert report(capsys, *arguments)[0] == 0
    assert warnings_in(caplog)[-2:] == [
        "mlflow:mlflow.db:dass_exp: 1 records sent, 0 were there",
        "mlflow:mlflow.db:dass_exp: 1 records sent, 1 were there",
    ]
    assert {sent.data.tags["key"] for sent in mlflow_runs(results)} >= {record["key"]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sync", "--tracker", "nobody"], "tracker='nobody': expected one of mlflow, none, trackio, wandb"),
        (["sync", "--tracker", "none"], "--tracker none: it sends nothing; name another of conf/tracker"),
        (["sync", "wanda"], "dass-report sync wanda: records are chosen with --where FIELD=VALUE"),
    ],
)
def test_what_cannot_be_sent_is_one_line(tmp_path, capsys, caplog, arguments, words):
    assert report(capsys, *arguments, "--results", str(tmp_path))[0] == 2
    assert warnings_in(caplog) == [words]


@pytest.mark.parametrize("kind", [WandbTracker, TrackioTracker, MlflowTracker])
def test_a_setting_of_the_wrong_type_is_named(kind):
    name = "experiment" if kind is MlflowTracker else "project"
    with pytest.raises(UserError, match=rf"^tracker\.{name}='': expected a name$"):
        kind("")
    if kind is not TrackioTracker:
        with pytest.raises(UserError, match=r"^tracker\.artifacts='yes': expected true or false$"):
            kind(artifacts="yes")


def mlflow_runs(results: Path) -> list[Any]:
    client = MlflowClient(f"sqlite:///{results.resolve() / 'mlflow.db'}")
    return client.search_runs([client.get_experiment_by_name("dass_exp").experiment_id])


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_trackers_are_told_no_secret(cell, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "secret123")
    told = []

    class Hearing(Listener):
        def begin(self, run, results):
            told.append(json.dumps(run))

        def send(self, record, results):
            told.append(json.dumps(record))

    tracked(Hearing(), *unscored(cell), "method=wanda", "name=of secret123", "notes=secret123")
    assert len(told) == 2 and not [text for text in told if "secret123" in text]


def test_an_mlflow_run_holds_the_record(cell, results, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_GROUP", "my sweep")
    named = ["name=first try", "tags=[mine]", "notes=as in the paper"]
    record = run_with(*without(cell, "tracker"), "tracker=mlflow", "tracker.artifacts=true", *named).record
    dense, pruned = sorted(mlflow_runs(results), key=lambda found: found.data.params["method.name"] == "dass")
    assert [found.info.status for found in (dense, pruned)] == ["FINISHED", "FINISHED"]
    assert pruned.info.run_name == "first try" and dense.info.run_name.startswith("tiny-dense-")
    expected = {"method.alpha": "0.5", "pattern.name": "2:4", "calibration.num_samples": "4", "seed": "0"}
    assert expected.items() <= pruned.data.params.items()
    numbers = flat_metrics(record)
    assert {name: pruned.data.metrics[name] for name in numbers} == pytest.approx(numbers)
    history = MlflowClient(f"sqlite:///{results.resolve() / 'mlflow.db'}").get_metric_history(
        pruned.info.run_id, "progress/blocks"
    )
    assert [(entry.step, entry.value) for entry in history] == [(1, 1), (2, 2)]
    tags = {
        "sweep": "my sweep",
        "tag.mine": "true",
        "tag.dass": "true",
        "key": record["key"],
        "mlflow.note.content": "as in the paper",
    }
    assert tags.items() <= pruned.data.tags.items()
    kept = list((results / "mlflow").rglob("result.json"))
    assert record["key"] in {json.loads(path.read_text())["key"] for path in kept} and len(kept) == 2


@pytest.mark.thorough
def test_a_failed_mlflow_run_says_so(cell, results):
    overrides = [*without(unscored(cell), "tracker"), "tracker=mlflow", "method=wanda"]
    context = listening(on_block_end=Mock(side_effect=NumericalError("not finite")))
    with pytest.raises(NumericalError):
        run_with(*overrides, context=context)
    (failed,) = mlflow_runs(results)
    assert failed.info.status == "FAILED" and failed.data.tags["error"] == "NumericalError: not finite"


@pytest.mark.thorough
def test_a_trackio_run_holds_the_record(tiny, tmp_path):
    overrides = without(tiny_overrides(tiny, tmp_path / "results"), "tracker")
    done = command(*overrides, "tracker=trackio", "name=first try", folder=tmp_path, TRACKIO_DIR=str(tmp_path / "kept"))
    assert done.returncode == 0 and "racker failed" not in done.stderr, done.stderr
    assert "Trackio" not in done.stdout
    with sqlite3.connect(tmp_path / "kept" / "dass_exp.db") as database:
        rows = database.execute("select run_name, metrics from metrics order by id").fetchall()
        configs = dict(database.execute("select run_name, config from configs").fetchall())
    logged = {name: {} for name, _ in rows}
    for name, numbers in rows:
        logged[name] |= json.loads(numbers)
    (path,) = (path for path in (tmp_path / "results" / "runs").glob("*/result.json") if read_json(path).get("name"))
    numbers = flat_metrics(read_json(path))
    assert {name: logged["first try"][name] for name in numbers} == pytest.approx(numbers)
    assert logged["first try"]["progress/blocks"] == 2
    assert json.loads(configs["first try"])["method.alpha"] == 0.5


@pytest.mark.parametrize("own", [None, "of the user"])
def test_the_name_of_a_sweep_ends_with_its_run(own, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    if own is not None:
        monkeypatch.setenv("WANDB_RUN_GROUP", own)
    seen = []
    for overrides, folder in ((["sweeps=mine"], "results/first"), (["seed=1"], "results/second")):
        with _named_sweep(overrides, folder):
            seen.append(sweep_of_run())
        assert sweep_of_run() == own
    assert seen == ([own, own] if own else ["mine-first", "grid-second"])
