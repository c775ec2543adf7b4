"""Trackers: an offline W&B run that can be read again, and failures that cost one warning and no result."""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from support import run_with, settings_of
from wandb.proto import wandb_internal_pb2

from dass_exp.report.figures import draw
from dass_exp.report.table import Entry, ResultTable
from dass_exp.report.write import long_form, wide_form
from dass_exp.runs.run import run
from dass_exp.runs.track import NullTracker, Tracker, WandbTracker, flat_metrics, track_sheet

pytestmark = pytest.mark.usefixtures("short_texts")

BLOCK, HEADER, FULL, LAST = (
    32768,
    7,
    1,
    4,
)  # of the log format that W&B writes: blocks of records, each with checksum, length and kind


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, which is how an offline run is kept until it is synced."""
    data, place, whole = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # a header never crosses the end of a block
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        whole += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


@pytest.fixture(scope="module")
def offline(tiny, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """A tracked run: its record, and the folder of its W&B run."""
    results = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)  # offline is our default, not the environment's
        patch.setenv("WANDB_API_KEY", "secret123" * 5)
        patch.setattr(
            "dass_exp.data.tokens.OfflineText.documents", lambda text: ["A text of some words, again and again. " * 200]
        )
        outcome = run_with(
            f"model.path={tiny}",
            f"results_dir={results}",
            "eval=ppl_mini",
            "eval.perplexity.context=32",
            "calibration.num_samples=2",
            "calibration.seq_len=16",
            "tracker=wandb",
        )
    runs = [path for path in (results / "wandb").iterdir() if path.name.startswith("offline-run-")]
    by_name = {
        path: [
            record.run.display_name for record in wandb_records(next(path.glob("*.wandb"))) if record.HasField("run")
        ]
        for path in runs
    }
    (folder,) = [path for path, names in by_name.items() if any("dass" in name for name in names)]
    assert len(runs) == 2  # the dense record, which was made on the way, has a run of its own
    return outcome.record, folder


def tables(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name.split("_")[0]: json.loads(path.read_text()) for path in folder.glob("files/media/table/*.table.json")
    }


def run_record_of(folder: Path) -> Any:
    """What an offline run says of itself; wandb's own process writes the file, and may be late on a busy machine."""
    for _ in range(100):
        if found := [
            entry.run for file in folder.glob("*.wandb") for entry in wandb_records(file) if entry.HasField("run")
        ]:
            break
        time.sleep(0.2)
    (run_record,) = found
    return run_record


def test_the_offline_run_holds_the_resolved_config(offline):
    record, folder = offline
    run_record = run_record_of(folder)
    config = {item.key: json.loads(item.value_json) for item in run_record.config.update}
    assert run_record.project == "dass_exp"
    assert config["key"] == record["key"]
    assert config["method"] == {"name": "dass", "alpha": 0.5, "granularity": "input"}
    assert config["model"]["dtype"] == "float32"
    assert config["calibration"]["num_samples"] == 2


def test_the_offline_run_holds_the_metrics(offline):
    record, folder = offline
    logged: dict[str, Any] = {}
    for entry in wandb_records(next(folder.glob("*.wandb"))):
        if entry.HasField("history"):
            logged |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in entry.history.item
            }
    for name, value in flat_metrics(record).items():
        assert logged[name] == pytest.approx(value), name


def test_the_offline_run_holds_a_table_of_results(offline):
    record, folder = offline
    table = tables(folder)["results"]
    assert table["columns"] == ["metric", "value"]
    assert dict(table["data"]) == pytest.approx(flat_metrics(record))


def test_the_offline_run_holds_a_table_of_layers(offline):
    record, folder = offline
    table, layers = tables(folder)["layers"], record["sparsity"]["layers"]
    assert {"name", "zeros", "size", "score_low", "score_high", "block_error", "seconds"} <= set(table["columns"])
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == [
        {**layer, "sparsity": 0.5} for layer in layers
    ]


def test_no_secret_reaches_the_offline_run(offline):
    _, folder = offline
    for path in folder.parent.rglob("*"):
        if path.is_file():
            assert b"secret123" not in path.read_bytes(), path


@dataclass
class Broken(Tracker):
    """A tracker whose server is down."""

    def send(self, record, results):
        raise ConnectionError("the server\nis down")


def test_a_tracker_that_fails_costs_one_warning_and_no_result(cell, caplog):
    with caplog.at_level(logging.WARNING):
        outcome = run(replace(settings_of(*cell, "method=dense"), tracker=Broken()))
    warnings = [entry.getMessage() for entry in caplog.records if entry.name.startswith("dass_exp")]
    assert warnings == ["the tracker failed, the record is safe: ConnectionError: the server is down"]
    assert json.loads(outcome.path.read_text()) == outcome.record
    assert not (outcome.path.parent / "failed.json").exists()


def test_the_record_is_written_before_the_tracker_sees_it(cell, results):
    seen = []

    class Looking(Broken):
        def send(self, record, results):
            seen.append(json.loads((Path(results) / "runs" / record["key"] / "result.json").read_text()) == record)

    run(replace(settings_of(*cell, "method=dense"), tracker=Looking()))
    assert seen == [True]


def test_a_record_that_is_found_is_not_tracked_again(cell):
    sent = []

    class Counting(Broken):
        def send(self, record, results):
            sent.append(record["config"]["method"]["name"])

    for _ in range(2):
        run(replace(settings_of(*cell, "method=magnitude"), tracker=Counting()))
    assert sent == ["dense", "magnitude"]


class FakeRun:
    """What wandb.init returns, with nothing behind it."""

    def __init__(self) -> None:
        self.logged: dict[str, Any] = {}
        self.finished = False
        self.error: Exception | None = None

    def log(self, content):
        if self.error is not None:
            raise self.error
        self.logged |= content

    def finish(self):
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    made, asked = FakeRun(), {}

    def init(**settings):
        asked.update(settings)
        return made

    monkeypatch.setattr(wandb, "init", init)
    return made, asked


@pytest.mark.parametrize(
    ("environment", "mode"), [(None, "offline"), ("online", "online"), ("offline", "offline"), ("disabled", "disabled")]
)
def test_the_mode_is_offline_unless_the_user_says_otherwise(offline, fake, tmp_path, monkeypatch, environment, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    WandbTracker("mine").send(offline[0], str(tmp_path / "results"))
    run_, asked = fake
    assert (asked["mode"], asked["project"]) == (mode, "mine")
    assert Path(asked["dir"]) == tmp_path / "results"
    assert run_.finished


def test_a_run_is_finished_even_where_logging_fails(offline, fake, tmp_path):
    fake[0].error = RuntimeError("no")
    with pytest.raises(RuntimeError):
        WandbTracker().send(offline[0], str(tmp_path))
    assert fake[0].finished


def test_a_dense_record_has_no_table_of_layers(fake, offline, tmp_path):
    record = offline[0]
    dense = {
        **record,
        "config": {**record["config"], "pattern": None},
        "sparsity": {**record["sparsity"], "layers": []},
    }
    WandbTracker().send(dense, str(tmp_path))
    assert "results" in fake[0].logged
    assert "layers" not in fake[0].logged


def test_the_null_tracker_writes_nothing(tmp_path):
    NullTracker().track({}, str(tmp_path / "results"))
    assert list(tmp_path.iterdir()) == []


def test_flat_names_of_the_numbers():
    record = {
        "metrics": {
            "perplexity": {"wikipedia_mini": 20.5},
            "tasks": {"piqa": {"acc": 0.6, "acc_stderr": 0.1, "version": 1.0, "limit": 20}},
            "mean_acc": 0.6,
            "mean_acc_norm": 0.6,
        },
        "sparsity": {"scope": 0.5, "decoder": 0.4, "model": 0.3, "layers": [], "excess_zeros": 0},
        "cost": {"prune_s": 1.5, "peak_gpu_bytes": None},
    }
    assert flat_metrics(record) == {
        "perplexity/wikipedia_mini": 20.5,
        "piqa/acc": 0.6,
        "piqa/acc_stderr": 0.1,
        "mean_acc": 0.6,
        "mean_acc_norm": 0.6,
        "sparsity/scope": 0.5,
        "sparsity/decoder": 0.4,
        "sparsity/model": 0.3,
        "cost/prune_s": 1.5,
    }


def test_a_summary_run_holds_the_tables_and_the_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "of_a_team")
    cells = {
        ("dense", "2:4"): Entry((20.0,)),
        ("dass", "2:4"): Entry((50.0, 52.0), keys=("aa", "bb"), mark="best"),
        ("wanda", "2:4"): "failed",
    }
    sheet = ResultTable(
        "perplexity",
        "Perplexity of every method",
        "perplexity",
        ["dense", "dass", "wanda"],
        ["2:4"],
        cells,
        [],
        [],
        {"kind": "bars"},
    )
    track_sheet(
        sheet.title,
        {"table": wide_form(sheet), "values": long_form(sheet)},
        draw(sheet, tmp_path / "figures"),
        str(tmp_path),
    )
    (folder,) = (path for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline-run-"))
    found = tables(folder)
    assert found["table"]["columns"] == ["row", "2:4"]
    assert found["table"]["data"] == [["dense", "20.00"], ["dass", "51.00 ± 1.41"], ["wanda", "failed"]]
    values = [(row[0], row[1], row[3]) for row in found["values"]["data"]]
    assert values == [("dense", "2:4", 20.0), ("dass", "2:4", 51.0), ("wanda", "2:4", None)]
    assert len(list(folder.glob("files/media/images/perplexity_*.png"))) == 1
    run_record = run_record_of(folder)
    assert (run_record.display_name, run_record.project) == ("Perplexity of every method", "of_a_team")


def test_a_summary_that_fails_costs_one_warning(tmp_path, monkeypatch, caplog):
    def broken(**settings):
        raise RuntimeError("no such project")

    monkeypatch.setattr(wandb, "init", broken)
    track_sheet("A title", {"table": [["row"], ["dense"]]}, [], str(tmp_path))
    assert [record.getMessage() for record in caplog.records] == [
        "the tracker failed, the files are safe: RuntimeError: no such project"
    ]
