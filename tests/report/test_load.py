"""Cells of a sweep: which launches are of the same cell, and which failures have a record by now."""

import pytest
from factory import failed, record_of

from dass_exp.report.load import SweepCell, cells_of, recovered, told_apart
from dass_exp.report.sweep_callback import note_cell


@pytest.fixture(name="note")
def note_fixture(results):
    """Write the note of the next cell of the sweep alpha."""
    numbers = iter(range(100))

    def write(*overrides, **content):
        folder = results / "hydra" / "2026-01-01" / "00-00-00" / str(next(numbers))
        note_cell(folder, {"overrides": [*overrides, "sweeps=alpha"], **content})

    return write


ADVICE = ["calibration.cache=disk", "calibration.batch_size=1", "model.placement=stream", "threads=1", "tracker=none"]


@pytest.mark.parametrize("advice", ADVICE)
def test_a_cell_that_was_launched_again_as_advised_is_the_same_cell(note, results, advice):
    note("method.alpha=0", status="failed", error="out of memory")
    note("method.alpha=0", advice, status="done", record="runs/0123/result.json")
    (cell,) = cells_of(results, "alpha")
    assert (cell.status, cell.key) == ("done", "0123")


@pytest.mark.parametrize("override", ["protocol=paper", "seed=1", "calibration.seq_len=64", "model.dtype=bfloat16"])
def test_a_setting_with_an_effect_makes_another_cell(note, results, override):
    note("method.alpha=0", status="failed", error="out of memory", key=None)
    note("method.alpha=0", override, status="done", record="runs/0123/result.json")
    assert [cell.status for cell in cells_of(results, "alpha")] == ["failed", "done"]


def test_a_failed_cell_keeps_its_key(note, results):
    note("method.alpha=0", status="failed", error="no", key="0123456789abcdef")
    assert [cell.key for cell in cells_of(results, "alpha")] == ["0123456789abcdef"]


def test_a_failure_is_repaired_by_a_record_of_its_key():
    cell = failed("wanda", key="the key")
    assert recovered(cell, [record_of("dass", key="the key")])
    assert not recovered(cell, [record_of("wanda", key="another key")])


@pytest.mark.parametrize("advice", [{"cache": "disk"}, {"batch_size": 1}])
def test_without_a_key_a_failure_is_repaired_by_a_record_of_the_same_effective_settings(advice):
    cell = failed("wanda")
    cell.config["calibration"] |= {
        "cache": "device",
        "batch_size": 8,
        "text": {"_target_": "dass_exp.data.OfflineText"},
    }
    cell.config["model"] |= {"dtype": "auto", "revision": None, "placement": "auto"}
    record = record_of("wanda")
    record["config"]["calibration"] |= {"cache": "device", "batch_size": 8, **advice}
    record["config"]["calibration"]["text"] = {"_target_": "dass_exp.data.texts.OfflineText"}
    record["config"]["model"] |= {"dtype": "float32", "revision": "1a2b", "placement": "stream"}
    assert recovered(cell, [record])


@pytest.mark.parametrize("changes", [{"num_samples": 4}, {"seed": 1}, {"pattern": "4:8"}, {"scope": "all"}])
def test_another_run_repairs_no_failure(changes):
    assert not recovered(failed("wanda"), [record_of("wanda", **changes), record_of("dass"), record_of("dense")])
    assert not recovered(SweepCell(("method=foo",), "failed", None, "no such method"), [record_of("wanda")])


def test_a_failed_cell_belongs_to_the_model_that_its_config_names():
    records = [record_of("wanda", key=f"a{number}" * 8) for number in (1, 2)]
    for number, record in enumerate(records):
        record["identity"]["model"] = f"local:{number}f00dfeed"
        record["config"]["model"]["path"] = f"/models/{number}"
    ended = SweepCell((), "failed", None, "no memory", record_of("dass")["config"])
    ended.config["model"] = dict(records[1]["config"]["model"])
    renamed, (cell,) = told_apart(records, [ended])
    names = [record["config"]["model"]["name"] for record in renamed]
    assert names == ["smollm2_135m@0f00df", "smollm2_135m@1f00df"]
    assert cell.config["model"]["name"] == names[1]
    assert told_apart(records[:1], [ended]) == (records[:1], [ended])
