"""The store of records: written atomically and last, locked, and without secrets."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import Killed, bare_record, files_under

from dass_exp.runs.memory import available_memory
from dass_exp.storage.checksum import json_digest
from dass_exp.storage.durable import now, read_json, write_json
from dass_exp.storage.environment import PeakMemory, environment
from dass_exp.storage.mask_file import PackedMask, load_masks
from dass_exp.storage.records import RecordStore

KEY = "0123456789abcdef"
WHOLE = bare_record(KEY)
OLD = {**WHOLE, "solver": {"damping_retries": 1}}
NEW = {**WHOLE, "solver": {"damping_retries": 2}}


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return RecordStore(tmp_path)


def crash(*args, **kwargs):
    raise Killed


def test_a_record_is_found_as_it_was_written(store, tmp_path):
    assert store.find(KEY) is None
    path = store.write(NEW, {})
    assert path == tmp_path / "runs" / KEY / "result.json"
    assert store.find(KEY) == NEW
    assert json.loads(path.read_text()) == {**NEW, "checksum": json_digest(NEW)}


@pytest.mark.parametrize("missing", sorted(WHOLE))
def test_an_incomplete_record_counts_as_none(store, missing):
    path = store.write(NEW, {})
    path.write_text(json.dumps({name: value for name, value in NEW.items() if name != missing}))
    assert store.find(KEY) is None


def test_the_other_files_are_written_next_to_the_record(store, tmp_path):
    with store.lock(KEY):
        store.write(NEW, {"documents.json": {"piqa": [1, 0]}}, {"a": PackedMask.pack(torch.tensor([[True, False]]))})
    assert [file for file in files_under(tmp_path) if not file.endswith(".lock")] == [
        f"runs/{KEY}/{name}" for name in ("documents.json", "masks.safetensors", "result.json")
    ]
    assert read_json(tmp_path / "runs" / KEY / "documents.json") == {"piqa": [1, 0]}
    assert load_masks(store.masks(KEY))["a"].tolist() == [[True, False]]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"text"', b"{}", b'{"key": null}', b"\xff\xfe\x00\x80"]
)
def test_an_invalid_file_counts_as_none(store, content):
    store.write(NEW, {})
    store.path(KEY).write_bytes(content)
    assert store.find(KEY) is None


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync", "json.dumps"])
def test_a_crash_while_writing_leaves_the_old_record_and_nothing_half_written(store, tmp_path, monkeypatch, broken):
    store.write(OLD, {})
    with monkeypatch.context() as patch:
        patch.setattr(broken, crash)
        with pytest.raises(Killed):
            store.write(NEW, {})
    assert store.find(KEY) == OLD
    assert files_under(tmp_path) == [f"runs/{KEY}/result.json"]


def test_a_killed_writer_leaves_no_file_that_looks_finished(store, monkeypatch):
    monkeypatch.setattr(os, "replace", crash)
    monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: None)  # a killed process does not clean up
    with pytest.raises(Killed):
        store.write(NEW, {})
    assert not store.path(KEY).exists()
    assert store.find(KEY) is None
    assert [path.suffix for path in store.path(KEY).parent.iterdir()] == [".partial"]


@pytest.fixture
def calls(monkeypatch):
    """The calls of fsync and replace, with the complete file that is renamed."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync") or fsync(descriptor))
    monkeypatch.setattr(
        os, "replace", lambda old, new: calls.append((Path(new).name, Path(old).read_bytes())) or replace(old, new)
    )
    return calls


def test_a_file_is_synced_and_renamed_when_it_is_complete(tmp_path, calls):
    write_json(tmp_path / "x.json", {"a": 1})
    assert calls[0] == "fsync"
    assert json.loads(calls[1][1]) == {"a": 1, "checksum": json_digest({"a": 1})}


def test_the_record_is_the_last_file_to_appear(store, calls):
    with store.lock(KEY):
        store.write(NEW, {"documents.json": {}}, {"a": PackedMask.pack(torch.ones(1, 1, dtype=torch.bool))})
    names = [call[0] for call in calls if call != "fsync"]
    assert names == ["masks.safetensors", "documents.json", "result.json"]


def test_content_that_json_cannot_hold_is_not_written(store):
    with pytest.raises(TypeError):
        store.write({**NEW, "solver": {"x": object()}}, {})
    assert store.find(KEY) is None
    assert list(store.path(KEY).parent.iterdir()) == []


def test_a_failure_is_recorded_and_raised_again(store):
    with pytest.raises(ZeroDivisionError), store.recording_failure(KEY, {"method": "x"}):
        _ = 1 // 0
    failure = json.loads((store.path(KEY).parent / "failed.json").read_text())
    assert (failure["key"], failure["config"], failure["type"]) == (KEY, {"method": "x"}, "ZeroDivisionError")
    assert "1 // 0" in failure["traceback"]
    assert store.find(KEY) is None


def test_a_failure_leaves_an_existing_record_and_a_success_removes_the_failure(store):
    store.write(OLD, {})
    with pytest.raises(ValueError, match="no"), store.recording_failure(KEY, {}):
        raise ValueError("no")
    assert store.find(KEY) == OLD
    store.write(NEW, {})
    assert [path.name for path in store.path(KEY).parent.iterdir()] == ["result.json"]


def test_one_holder_of_a_key_at_a_time(store):
    alone = threading.Lock()

    def work(_):
        with store.lock(KEY):
            was_free = alone.acquire(blocking=False)
            time.sleep(0.05)
            alone.release()
            return was_free

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_different_keys_do_not_wait_for_each_other(store):
    with store.lock(KEY), store.lock("fedcba9876543210", wait=False):
        pass


def test_a_lock_whose_owner_failed_is_free(store):
    with pytest.raises(ValueError, match="no"), store.lock(KEY):
        raise ValueError("no")
    with store.lock(KEY, wait=False):
        pass


def test_the_environment_has_versions_and_hardware_and_no_secret(monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret123")
    fields = environment()
    assert {"torch", "transformers", "datasets", "lm_eval", "python", "cpu", "threads", "gpu"} < fields.keys()
    assert "git_commit" in fields
    assert fields["torch"] == torch.__version__
    assert fields["threads"] == torch.get_num_threads()
    text = json.dumps(fields)
    assert "secret123" not in text
    assert str(Path.home()) not in text


def test_the_time_is_in_utc():
    assert now().endswith("+00:00")


def test_peak_memory_is_measured_from_its_start():
    before = PeakMemory()
    block = torch.ones(75 * 2**20, dtype=torch.float32)  # 300 MiB, touched
    size = block.numel() * 4
    del block
    peak = before.read()["peak_rss_bytes"]
    assert peak >= size
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert PeakMemory().read()["peak_rss_bytes"] <= peak - size // 2
    assert before.read()["peak_gpu_bytes"] is None


def test_the_gpu_of_a_record_is_that_of_its_run(monkeypatch):
    """A machine with two GPUs: the card and the peak are those of the device that was computed on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"card {device.index}")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 100 + device.index)
    second = torch.device("cuda:1")
    assert (environment(second)["gpu"], PeakMemory(second).read()["peak_gpu_bytes"]) == ("card 1", 101)
    for other in (None, torch.device("cpu")):
        assert (environment(other)["gpu"], PeakMemory(other).read()["peak_gpu_bytes"]) == (None, None)


def test_memory_that_the_allocator_of_a_gpu_keeps_is_free(monkeypatch):
    sizes = {"mem_get_info": (10, 80), "memory_reserved": 60, "memory_allocated": 25}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    assert available_memory(torch.device("cuda")) == 10 + 60 - 25
