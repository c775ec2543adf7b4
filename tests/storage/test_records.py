"""The store of records: written once, atomically and last; locked; and nothing in it that names a secret."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from support import bare_record, files_under

from dass_exp.storage import records as record_module
from dass_exp.storage.mask_file import PackedMask, load_masks
from dass_exp.storage.records import PeakMemory, Store, environment, now, write_json

KEY = "0123456789abcdef"
WHOLE = bare_record(KEY)
OLD = {**WHOLE, "solver": {"damping_retries": 1}}
NEW = {**WHOLE, "solver": {"damping_retries": 2}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


class Crash(BaseException):
    """What no handler of the code under test may swallow."""


def crash(*args, **kwargs):
    raise Crash


def test_a_record_is_found_as_it_was_written(store, tmp_path):
    assert store.find(KEY) is None
    path = store.write(NEW, {})
    assert path == tmp_path / "runs" / KEY / "result.json"
    assert store.find(KEY) == json.loads(path.read_text()) == NEW


@pytest.mark.parametrize("missing", sorted(WHOLE))
def test_a_record_that_is_not_whole_counts_as_none(store, missing):
    path = store.write(NEW, {})
    path.write_text(json.dumps({name: value for name, value in NEW.items() if name != missing}))
    assert store.find(KEY) is None


def test_the_other_files_lie_beside_the_record(store, tmp_path):
    with store.lock(KEY):
        store.write(NEW, {"documents.json": {"piqa": [1, 0]}}, {"a": PackedMask.of(torch.tensor([[True, False]]))})
    assert [file for file in files_under(tmp_path) if not file.endswith(".lock")] == [
        f"runs/{KEY}/{name}" for name in ("documents.json", "masks.safetensors", "result.json")
    ]
    assert json.loads((tmp_path / "runs" / KEY / "documents.json").read_text()) == {"piqa": [1, 0]}
    assert load_masks(store.masks(KEY))["a"].tolist() == [[True, False]]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "{}", '{"key": "another key"}', '{"key": null}'])
def test_a_file_that_is_no_record_counts_as_none(store, content):
    store.write(NEW, {})
    store.path(KEY).write_text(content)
    assert store.find(KEY) is None


def test_a_binary_file_counts_as_none(store):
    store.write(NEW, {})
    store.path(KEY).write_bytes(b"\xff\xfe\x00\x80")
    assert store.find(KEY) is None


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync", "json.dumps"])
def test_a_crash_while_writing_leaves_the_old_record_and_nothing_half_written(store, tmp_path, monkeypatch, broken):
    store.write(OLD, {})
    with monkeypatch.context() as patch:
        patch.setattr(broken, crash)
        with pytest.raises(Crash):
            store.write(NEW, {})
    assert store.find(KEY) == OLD
    assert files_under(tmp_path) == [f"runs/{KEY}/result.json"]


def test_a_killed_writer_leaves_no_file_that_looks_finished(store, monkeypatch):
    monkeypatch.setattr(record_module, "settle", crash)
    monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: None)  # a killed process tidies nothing up
    with pytest.raises(Crash):
        store.write(NEW, {})
    assert not store.path(KEY).exists()
    assert store.find(KEY) is None
    assert [path.suffix for path in store.path(KEY).parent.iterdir()] == [".partial"]


def test_a_file_is_renamed_into_place_whole_and_durable(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), fsync(handle))[1])
    monkeypatch.setattr(
        os, "replace", lambda one, other: (events.append(Path(one).read_text()), replace(one, other))[1]
    )
    write_json(tmp_path / "x.json", {"a": 1})
    assert events[0] == "sync"
    assert json.loads(events[1]) == {"a": 1}


def test_the_record_is_the_last_file_to_appear(store, monkeypatch):
    order, settle = [], record_module.settle
    monkeypatch.setattr(
        record_module, "settle", lambda scratch, path: (order.append(path.name), settle(scratch, path))[1]
    )
    with store.lock(KEY):
        store.write(NEW, {"documents.json": {}}, {"a": PackedMask.of(torch.ones(1, 1, dtype=torch.bool))})
    assert order == ["masks.safetensors", "documents.json", "result.json"]


def test_content_that_is_no_json_is_not_written(store):
    with pytest.raises(TypeError):
        store.write({**NEW, "solver": {"x": object()}}, {})
    assert store.find(KEY) is None
    assert list(store.path(KEY).parent.iterdir()) == []


def test_a_failure_is_noted_and_raised_again(store):
    with pytest.raises(ZeroDivisionError), store.noting_failure(KEY, {"method": "x"}):
        _ = 1 // 0
    noted = json.loads((store.path(KEY).parent / "failed.json").read_text())
    assert noted["key"] == KEY
    assert noted["config"] == {"method": "x"}
    assert noted["type"] == "ZeroDivisionError"
    assert "1 // 0" in noted["traceback"]
    assert store.find(KEY) is None


def test_a_success_removes_the_note_of_a_failure(store):
    with pytest.raises(ValueError, match="no"), store.noting_failure(KEY, {}):
        raise ValueError("no")
    store.write(NEW, {})
    assert [path.name for path in store.path(KEY).parent.iterdir()] == ["result.json"]


def test_a_failure_leaves_the_record_that_was_there(store):
    store.write(OLD, {})
    with pytest.raises(ValueError, match="no"), store.noting_failure(KEY, {}):
        raise ValueError("no")
    assert store.find(KEY) == OLD


def test_one_holder_of_a_key_at_a_time(store):
    inside, most = 0, 0

    def work():
        nonlocal inside, most
        with store.lock(KEY):
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (inside, most) == (0, 1)


def test_different_keys_do_not_wait_for_each_other(store):
    reached = threading.Event()

    def other():
        with store.lock("fedcba9876543210"):
            reached.set()

    with store.lock(KEY):
        thread = threading.Thread(target=other)
        thread.start()
        assert reached.wait(10)
    thread.join(10)


def test_a_lock_whose_owner_failed_is_free(store):
    with pytest.raises(ValueError, match="no"), store.lock(KEY):
        raise ValueError("no")
    with store.lock(KEY):
        pass


def test_the_environment_says_what_made_the_numbers_and_no_secret(monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret123")
    found = environment()
    assert {"torch", "transformers", "datasets", "lm_eval", "python", "cpu", "threads", "gpu", "git_commit"} <= set(
        found
    )
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    text = json.dumps(found)
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
    if not torch.cuda.is_available():
        assert before.read()["peak_gpu_bytes"] is None
