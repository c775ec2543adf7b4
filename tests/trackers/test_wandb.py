"""Weights & Biases: offline runs that are read back."""

from __future__ import annotations

import json
import re
import struct
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import wandb
from fork_server import forked_command as command
from support import listening, run_with, tiny_overrides, without
from wandb.proto import wandb_internal_pb2

from dass_exp.data.texts import OfflineText
from dass_exp.errors import NumericalError
from dass_exp.report import cli
from dass_exp.report.figures import draw
from dass_exp.report.table import ResultTable, TableValue
from dass_exp.report.write import long_form, wide_form
from dass_exp.storage.record_numbers import flat_metrics
from dass_exp.trackers.wandb import WandbTracker, track_table

pytestmark = pytest.mark.usefixtures("short_texts")

# W&B's log format: blocks of records, each with a header of checksum, length and kind
BLOCK, HEADER, FULL, LAST = 32768, 7, 1, 4


def wandb_records(folder: Path, field: str) -> list[Any]:
    """The records of one kind in the .wandb file of an offline run."""
    data, position, content, records = next(folder.glob("*.wandb")).read_bytes(), HEADER, b"", []
    assert data[:4] == b":W&B"
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # a header never crosses the end of a block
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        content += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (FULL, LAST):
            records.append(wandb_internal_pb2.Record.FromString(content))
            content = b""
    return [getattr(record, field) for record in records if record.HasField(field)]


def offline_runs(results: Path) -> list[Path]:
    return list((results / "wandb").glob("offline-run-*"))


@pytest.fixture(scope="module")
def offline(tiny, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """A tracked run: its record, and the folder of its W&B run."""
    results = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)  # offline is our default, not the environment's
        patch.setenv("WANDB_API_KEY", "secret123" * 5)
        patch.setattr(OfflineText, "documents", lambda text: ["A text of some words, again and again. " * 200])
        outcome = run_with(*tiny_overrides(tiny, results), "calibration.num_samples=2", "tracker=wandb")
    dense, pruned = sorted(offline_runs(results), key=lambda folder: "-dass-" in run_record_of(folder).display_name)
    assert "-dense-" in run_record_of(dense).display_name  # the dense record, written first, has its own run
    return outcome.record, pruned


def tables(folder: Path) -> dict[str, dict[str, Any]]:
    files = folder.glob("files/media/table/*.table.json")
    return {path.name.split("_")[0]: json.loads(path.read_text()) for path in files}


def run_record_of(folder: Path) -> Any:
    """The run record of an offline run."""
    return awaited(folder, "run")


def awaited(folder: Path, kind: str) -> Any:
    """The one record of a kind; wandb's own process writes it, possibly late on a busy machine."""
    for _ in range(100):
        if records := wandb_records(folder, kind):
            break
        time.sleep(0.2)
    (record,) = records
    return record


@pytest.mark.thorough
def test_the_offline_run_holds_the_resolved_config(offline):
    record, folder = offline
    run_record = run_record_of(folder)
    config = {item.key: json.loads(item.value_json) for item in run_record.config.update}
    assert run_record.project == "dass_exp"
    assert config["key"] == record["key"]
    assert config["method"] == {"name": "dass", "alpha": 0.5, "granularity": "input"}
    assert config["model"]["dtype"] == "float32"
    assert config["calibration"]["num_samples"] == 2


def test_the_offline_run_says_what_it_is(offline):
    record, folder = offline
    run_record = run_record_of(folder)
    name = f"tiny-dass-alpha=0.5-granularity=input-2:4-mlp-seed=0-{record['key'][:6]}"
    assert run_record.display_name == name
    assert (run_record.job_type, list(run_record.tags)) == ("prune", ["dass", "2:4"])


def test_the_offline_run_holds_the_metrics(offline):
    record, folder = offline
    items = [item for history in wandb_records(folder, "history") for item in history.item]
    logged = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    for name, value in flat_metrics(record).items():
        assert logged[name] == pytest.approx(value), name


def test_the_offline_run_was_open_while_the_blocks_passed(offline):
    record, folder = offline
    items = [
        {item.nested_key[0]: json.loads(item.value_json) for item in history.item if item.nested_key}
        for history in wandb_records(folder, "history")
    ]
    steps = [step for step in items if "progress/blocks" in step]
    assert [step["progress/blocks"] for step in steps] == [1, 2]
    (error,) = {layer["block_error"] for layer in record["sparsity"]["layers"]} - {None}
    assert [step.get("progress/block_error") for step in steps] == [pytest.approx(error), None]
    assert awaited(folder, "exit").exit_code == 0


def test_the_offline_run_holds_a_table_of_results(offline):
    record, folder = offline
    table = tables(folder)["results"]
    assert table["columns"] == ["metric", "value"]
    assert dict(table["data"]) == pytest.approx(flat_metrics(record))


def test_the_offline_run_holds_a_table_of_layers(offline):
    record, folder = offline
    table, layers = tables(folder)["layers"], record["sparsity"]["layers"]
    assert {"name", "zeros", "size", "score_low", "score_high", "block_error", "seconds"} <= set(table["columns"])
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert rows == [layer | {"sparsity": 0.5} for layer in layers]


def test_no_secret_reaches_the_offline_run(offline):
    _, folder = offline
    for path in folder.parent.rglob("*"):
        if path.is_file():
            assert b"secret123" not in path.read_bytes(), path


@pytest.fixture
def init(monkeypatch):
    """A mock in the place of wandb.init, for modes that need a network."""
    mock = Mock()
    monkeypatch.setattr(wandb, "init", mock)
    return mock


@pytest.mark.parametrize(
    ("environment", "mode"), [(None, "offline"), ("online", "online"), ("offline", "offline"), ("disabled", "disabled")]
)
def test_the_mode_is_offline_unless_the_user_says_otherwise(offline, init, tmp_path, monkeypatch, environment, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    WandbTracker("mine").send(offline[0], str(tmp_path / "results"))
    settings = init.call_args.kwargs
    assert (settings["mode"], settings["project"]) == (mode, "mine")
    assert Path(settings["dir"]) == tmp_path / "results"
    init.return_value.finish.assert_called_once()


def test_a_run_is_finished_even_if_logging_fails(offline, init, tmp_path):
    init.return_value.log.side_effect = RuntimeError("no")
    with pytest.raises(RuntimeError):
        WandbTracker().send(offline[0], str(tmp_path))
    init.return_value.finish.assert_called_once()


def test_a_dense_record_has_no_table_of_layers(offline, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    record = offline[0]
    changes = {"config": record["config"] | {"pattern": None}, "sparsity": record["sparsity"] | {"layers": []}}
    WandbTracker().send(record | changes, str(tmp_path))
    (folder,) = offline_runs(tmp_path)
    assert tables(folder).keys() == {"results"}


def test_a_failed_run_is_shown_as_failed(cell, results, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    overrides = [*without(cell, "tracker", "eval"), "tracker=wandb", "method=wanda", "eval=none"]
    with pytest.raises(NumericalError):
        run_with(*overrides, context=listening(on_block_end=Mock(side_effect=NumericalError("block 0: not finite"))))
    (folder,) = offline_runs(results)
    assert awaited(folder, "exit").exit_code == 1
    summaries = [item for summary in wandb_records(folder, "summary") for item in summary.update]
    assert {item.key: json.loads(item.value_json) for item in summaries}["error"].endswith("block 0: not finite")


def test_the_files_of_a_record_are_an_artifact_where_asked_for(offline, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    record, folder = offline
    results = folder.parents[1]
    assert not logged_artifacts(folder)
    WandbTracker(artifacts=True).send(record, str(results))
    for path in offline_runs(results):
        awaited(path, "exit")  # the last that is written
    (artifact,) = [artifact for path in offline_runs(results) for artifact in logged_artifacts(path)]
    assert (artifact.name, artifact.type) == (f"record-{record['key']}", "record")
    assert {entry.path for entry in artifact.manifest.contents} == {"result.json"}


def logged_artifacts(folder: Path) -> list[Any]:
    """Those of records; W&B makes some of tables too."""
    requests = [request for request in wandb_records(folder, "request") if request.HasField("log_artifact")]
    logged = [*wandb_records(folder, "artifact"), *(request.log_artifact.artifact for request in requests)]
    return [artifact for artifact in logged if artifact.type == "record"]


@pytest.mark.thorough
def test_an_agent_gets_the_run_that_it_waits_for_and_no_other(tiny, tmp_path):
    overrides = without(tiny_overrides(tiny, tmp_path / "results"), "tracker")
    for _ in range(2):  # a run that is found is sent too: the agent waits for its numbers
        done = command(*overrides, "tracker=wandb", "method=wanda", folder=tmp_path, WANDB_RUN_ID="chosen1")
        assert done.returncode == 0, done.stderr
    runs = [run_record_of(folder) for folder in offline_runs(tmp_path / "results")]
    assert [(run_record.run_id, run_record.job_type) for run_record in runs] == [("chosen1", "prune")] * 2
    cli.main(["sync", "--results", str(tmp_path / "results")])
    assert len(offline_runs(tmp_path / "results")) == 3  # the dense record is sent by it


@pytest.mark.thorough
def test_a_summary_run_holds_the_tables_and_the_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "of_a_team")
    cells = {
        ("dense", "2:4"): TableValue((20.0,)),
        ("dass", "2:4"): TableValue((50.0, 52.0), keys=("aa", "bb"), mark="best"),
        ("wanda", "2:4"): "failed",
    }
    rows, figure = ["dense", "dass", "wanda"], {"kind": "bars"}
    table = ResultTable("perplexity", "Perplexity of all methods", "perplexity", rows, ["2:4"], cells, [], [], figure)
    forms = {"table": wide_form(table), "values": long_form(table)}
    track_table(table.title, forms, draw(table, tmp_path / "figures"), str(tmp_path))
    (folder,) = offline_runs(tmp_path)
    logged = tables(folder)
    assert logged["table"]["columns"] == ["row", "2:4"]
    assert logged["table"]["data"] == [["dense", "20.00"], ["dass", "51.00 ± 1.41"], ["wanda", "failed"]]
    values = [(row[0], row[1], row[3]) for row in logged["values"]["data"]]
    assert values == [("dense", "2:4", 20.0), ("dass", "2:4", 51.0), ("wanda", "2:4", None)]
    assert len(list(folder.glob("files/media/images/perplexity_*.png"))) == 1
    run_record = run_record_of(folder)
    assert (run_record.display_name, run_record.project) == ("Perplexity of all methods", "of_a_team")


def test_a_summary_that_fails_costs_one_warning(tmp_path, init, caplog):
    init.side_effect = RuntimeError("no such project")
    track_table("A title", {"table": [["row"], ["dense"]]}, [], str(tmp_path))
    assert [record.getMessage() for record in caplog.records] == [
        "the tracker failed, the files are safe: RuntimeError: no such project"
    ]


@pytest.mark.thorough
def test_the_runs_of_a_sweep_of_ones_own_are_a_group_and_its_table_is_known(tiny, tmp_path, capsys):
    (tmp_path / "own" / "sweeps").mkdir(parents=True)
    layout = "{title: My seeds, rows: method, columns: seed, metric: perplexity}"
    (tmp_path / "own" / "sweeps" / "mine.yaml").write_text(f"# @package _global_\nsweep: {layout}\n")
    own = [text for text in tiny_overrides(tiny, tmp_path / "results") if not text.startswith("tracker")]
    sweep = ["--config-dir", str(tmp_path / "own"), "-m", "sweeps=mine", "method=wanda", "seed=0,1"]
    done = command(*sweep, *own, "tracker=wandb", "name=a name", "tags=[first]", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 cells, 0:" in done.stderr and "2 of 2 cells" not in done.stderr
    runs = [run_record_of(folder) for folder in offline_runs(tmp_path / "results")]
    (group,) = {run_record.run_group for run_record in runs}
    assert group.startswith("mine-")
    assert {"a name"} == {run_record.display_name for run_record in runs if run_record.job_type == "prune"}
    assert all("first" in run_record.tags for run_record in runs)
    cli.main(["mine", "--results", str(tmp_path / "results")])
    table = (tmp_path / "results" / "tables" / "mine.md").read_text()
    assert table.startswith("# My seeds\n") and "| | seed=0 | seed=1 |" in table and "| Wanda |" in table
    logs = list((tmp_path / "results" / "hydra").rglob("dass_exp.log"))
    assert all(re.match(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\] INFO ", log.read_text()) for log in logs) and logs
