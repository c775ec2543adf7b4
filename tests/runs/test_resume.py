"""A run that is killed at any moment continues after its last block, to the same weights, masks and scores."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import (
    Killed,
    contains,
    killed_after_block,
    listening,
    run_with,
    save_tiny,
    tiny_config,
    tiny_overrides,
    without,
)

import dass_exp
from dass_exp.errors import UserError
from dass_exp.models.shards import Shards
from dass_exp.runs import resume
from dass_exp.runs.context import RunContext, SilentReporter

STREAM, RESIDENT = "model.placement=stream", "model.placement=resident"
BLOCKS = 6

pytestmark = pytest.mark.usefixtures("short_texts")


@pytest.fixture(autouse=True)
def disk_fixture(monkeypatch):
    """A disk that is never slow, whatever else this machine does."""
    monkeypatch.setattr(resume, "_SLOW_S", float("inf"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of six blocks."""
    return save_tiny(tmp_path_factory.mktemp("deep") / "model", tiny_config(num_hidden_layers=BLOCKS))


@pytest.fixture(name="settings")
def settings_fixture(deep, tmp_path):
    """A function: the overrides of a resumable run in a folder, the test's own by default."""

    def overrides(method="dass", placement=STREAM, folder=tmp_path):
        run = [*tiny_overrides(deep, folder / "results"), f"method={method}", "scope=all", placement]
        return [*run, "resume=true", f"save={folder}/saved"]

    return overrides


@pytest.fixture(scope="module", name="cache")
def cache_fixture():
    return {}


@pytest.fixture(name="whole")
def whole_fixture(settings, cache, tmp_path_factory):
    """A function: what a run of this method and placement leaves behind that nobody kills."""

    def content(method="dass", placement=STREAM):
        if (method, placement) not in cache:
            folder = tmp_path_factory.mktemp("whole")
            run_with(*settings(method, placement, folder), "resume=false")
            cache[method, placement] = content_of(folder)
        return cache[method, placement]

    return content


def content_of(folder):
    """Everything that a run has left behind, without times and places: numbers and names, weights, masks."""
    records = [json.loads(path.read_text()) for path in folder.glob("results/runs/*/result.json")]
    facts = {"files": sorted(path.name for path in (folder / "saved").iterdir())}
    for record in records:
        layers = [{**layer, "seconds": None} for layer in record["sparsity"]["layers"]]
        facts[record["config"]["method"]["name"]] = record["key"], record["metrics"], layers
    tensors = {}
    for file in folder.glob("saved/model*.safetensors"):
        tensors |= load_file(file)
    masks = dass_exp.load_masks(folder / "saved" / "masks.safetensors")
    return facts, tensors, masks


def assert_same(content, expected):
    assert content[0] == expected[0]
    for tensors, others in zip(content[1:], expected[1:], strict=True):
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def names(folder):
    """The files and folders there; a lock of a run that is killed may stay, an empty file."""
    return {path.name for path in folder.iterdir()} - {".saved.lock"}


@contextmanager
def killed_before(stop):
    """Kill in place of the first file operation for which ``stop(operation, name)`` holds; refuse all later ones."""
    killed = []

    def watched(operation, real):
        def call(*paths, **settings):
            target = [path for path in paths if not isinstance(path, int)][-1]  # mkdir takes a mode
            if killed or stop(operation, Path(target).name):
                killed.append(operation)
                raise Killed
            return real(*paths, **settings)

        return call

    with pytest.MonkeyPatch.context() as patched:
        for operation in ("mkdir", "rename", "replace", "unlink", "remove", "rmdir"):
            patched.setattr(os, operation, watched(operation, getattr(os, operation)))
        yield


def killed_after(seconds, *overrides):
    """Do a run in a forked process and kill it after some time."""
    child = os.fork()
    if not child:
        status = 1
        try:
            run_with(*overrides)
            status = 0
        finally:
            os._exit(status)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("method", "placement"), [("dass", STREAM), ("sparsegpt", STREAM), ("dass", RESIDENT)])
def test_killed_at_random_moments_it_ends_in_the_same_weights(settings, whole, tmp_path, method, placement):
    expected, start = whole(method, placement), time.perf_counter()
    run_with(*settings(method, placement), "rerun=true")
    duration, draw, resumed, moment = time.perf_counter() - start, random.Random(0), 0, 0
    while moment < 10 or (resumed < 3 and moment < 40):  # on a busy machine most kills may come too early or too late
        folder = tmp_path / str(moment)
        for _ in range(2):
            killed_after(draw.uniform(0.1, 1.0) * duration, *settings(method, placement, folder))
            resumed += (folder / ".saved.partial" / "state.safetensors").is_file()
        run_with(*settings(method, placement, folder))
        assert_same(content_of(folder), expected)
        assert names(folder) == {"results", "saved"}
        moment += 1
    assert resumed >= 3


@pytest.mark.slow
@pytest.mark.parametrize("placement", [STREAM, RESIDENT])
def test_killed_before_any_file_operation_it_ends_in_the_same_weights(settings, whole, tmp_path, placement):
    operations = []
    with killed_before(lambda *operation: operations.append(operation)):
        run_with(*settings(placement=placement))
    assert len(operations) > 40
    for last in range(len(operations)):
        folder, countdown = tmp_path / str(last), iter(range(last))
        with killed_before(lambda *operation, left=countdown: next(left, None) is None), pytest.raises(Killed):
            run_with(*settings(placement=placement, folder=folder))
        run_with(*settings(placement=placement, folder=folder))
        assert_same(content_of(folder), whole(placement=placement))
        assert names(folder) == {"results", "saved"}


@pytest.mark.thorough
@pytest.mark.parametrize("more", [[], ["rerun=true"]])
@pytest.mark.parametrize(
    ("last", "times"),
    [
        (("rename", "saved"), 1),  # the checkpoint is moved into place
        (("replace", "result.json"), 1),  # the record of the dense model
        (("replace", "result.json"), 2),
        (("unlink", "state.safetensors"), 1),  # the state is deleted
        (("rmdir", ".saved.partial"), 1),
    ],
)
def test_killed_near_the_end_it_ends_the_same(settings, whole, tmp_path, last, times, more):
    done, pruned = [], []
    with killed_before(lambda *call: done.append(call) or done.count(last) == times), pytest.raises(Killed):
        run_with(*settings(), *more)
    run_with(*settings(), *more, context=listening(on_block_end=pruned.append))
    assert_same(content_of(tmp_path), whole())
    assert not pruned or (more and last[0] in ("unlink", "rmdir"))  # a finished run may run again
    assert not (tmp_path / ".saved.partial").exists()


@pytest.mark.thorough
@pytest.mark.parametrize(("method", "block"), [("dass", 0), ("dass", 5), ("sparsegpt", 2), ("magnitude", 2)])
@pytest.mark.parametrize("placement", [STREAM, RESIDENT])
def test_it_continues_after_the_last_finished_block(settings, whole, tmp_path, method, block, placement, caplog):
    killed_after_block(block, *settings(method, placement))
    caplog.set_level("INFO")
    pruned = []
    context = listening(on_block_end=lambda report: pruned.append(report.index))
    run_with(*settings(method, placement), context=context)
    assert f"continuing after block {block} of an interrupted run" in caplog.text
    assert pruned == list(range(block + 1, BLOCKS))
    assert_same(content_of(tmp_path), whole(method, placement))
    assert names(tmp_path) == {"results", "saved"}


@pytest.mark.parametrize("placement", [STREAM, RESIDENT])
def test_a_state_that_is_slow_to_write_is_written_seldom(settings, whole, tmp_path, placement, caplog, monkeypatch):
    """Behind the first block, not for long afterwards, and behind the last block."""
    monkeypatch.setattr(resume, "_SLOW_S", 0.0)
    monkeypatch.setattr(resume, "_SHARE", 1e9)
    monkeypatch.setattr(resume, "_LONGEST_S", 1e9)
    written, save_state = [], resume.save_state
    monkeypatch.setattr(
        resume, "save_state", lambda *arguments: written.append(arguments[-1].blocks) or save_state(*arguments)
    )
    killed_after_block(3, *settings("dass", placement))
    assert written == [1]
    caplog.set_level("INFO")
    run_with(*settings("dass", placement))
    assert "continuing after block 0 of an interrupted run" in caplog.text
    assert written == [1, 2, BLOCKS]
    monkeypatch.setattr(resume, "_LONGEST_S", 0.0)
    run_with(*settings("dass", placement), "rerun=true")
    assert written[3:] == list(range(1, BLOCKS + 1))
    assert_same(content_of(tmp_path), whole("dass", placement))


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["dass", "dense"])
def test_finished_blocks_are_not_read_again(settings, tmp_path, method, monkeypatch):
    killed_after_block(2, *settings(method))
    reads, read = [], Shards.read
    with monkeypatch.context() as patched:
        patched.setattr(Shards, "read", lambda shards, names, *rest: read(shards, reads.extend(names) or names, *rest))
        record = run_with(*settings(method)).record
    assert {int(name.split(".")[2]) for name in reads if ".layers." in name} == {3, 4, 5}
    assert record["metrics"] == run_with(*settings(method, folder=tmp_path / "whole")).record["metrics"]


@pytest.mark.thorough
def test_killed_while_it_is_scored_it_prunes_no_block_again(settings, tmp_path):
    class KillWhileScored(SilentReporter):
        def phase(self, name, steps=None):
            if name == "perplexity of dass":
                raise Killed
            return super().phase(name, steps)

    overrides, pruned = without(settings(placement=RESIDENT), "save="), []
    with pytest.raises(Killed):
        run_with(*overrides, context=RunContext(KillWhileScored()))
    record = run_with(*overrides, context=listening(on_block_end=pruned.append)).record
    assert pruned == []
    assert record["metrics"] == run_with(*overrides, "rerun=true", "resume=false").record["metrics"]
    assert not list(tmp_path.glob("results/runs/*/work"))


@pytest.mark.thorough
def test_time_spent_before_a_kill_counts(settings):
    def slow(report):
        time.sleep(report.index == 0)
        if report.index == 2:
            raise Killed

    with pytest.raises(Killed):
        run_with(*settings(), context=listening(on_block_end=slow))
    assert run_with(*settings()).record["cost"]["prune_s"] >= 1.0


@pytest.mark.thorough
def test_another_placement_is_named_and_auto_continues_as_it_began(settings, tmp_path, caplog):
    killed_after_block(1, *settings())
    with pytest.raises(UserError, match=r"model\.placement=stream \(now resident\)"):
        run_with(*settings(placement=RESIDENT))
    caplog.set_level("INFO")
    run_with(*settings(placement="model.placement=auto"))
    assert "continuing after block 1 of an interrupted run" in caplog.text
    assert names(tmp_path) == {"results", "saved"}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("overrides", "kept"),
    [([STREAM, "resume=false"], False), ([RESIDENT], False), ([STREAM], True), ([RESIDENT, "resume=true"], True)],
)
def test_state_is_kept_where_it_is_requested_and_by_default_in_streamed_runs(settings, tmp_path, overrides, kept):
    seen = []
    context = listening(on_block_end=lambda report: seen.append(bool(list(tmp_path.rglob("state.safetensors")))))
    run_with(*without(settings(), "resume=", "model.placement"), *overrides, context=context)
    assert seen == [kept] * BLOCKS


@pytest.mark.thorough
def test_each_block_draws_the_same_random_numbers_after_a_kill(settings):
    def drawing(numbers, last=None):
        def stop(report):
            if report.index == last:
                raise Killed

        return listening(on_block_start=lambda index: numbers.append(float(torch.rand(1))), on_block_end=stop)

    whole, resumed = [], []
    run_with(*settings(), context=drawing(whole))
    with pytest.raises(Killed):
        run_with(*settings(), "rerun=true", context=drawing(resumed, last=2))
    run_with(*settings(), "rerun=true", context=drawing(resumed))
    assert resumed == whole
    assert len(set(whole)) == BLOCKS


@pytest.mark.thorough
def test_a_changed_setting_is_named(settings, tmp_path):
    killed_after_block(1, *settings())
    with pytest.raises(UserError) as caught:
        run_with(*settings(), "method.alpha=0.25", "seed=3")
    words = [".saved.partial", "method.alpha=0.5 (now 0.25)", "seed=0 (now 3)", "set it back, or remove the folder"]
    assert contains(str(caught.value), words)
    assert not (tmp_path / "saved").exists()


@pytest.mark.thorough
def test_it_may_continue_with_another_batch_size(settings, tmp_path, whole):
    killed_after_block(1, *settings())
    run_with(*settings(), "calibration.batch_size=3", "eval.batch_size=1")
    (_, metrics, layers), (_, expected, others) = content_of(tmp_path)[0]["dass"], whole()[0]["dass"]
    assert [layer["zeros"] for layer in layers] == [layer["zeros"] for layer in others]
    assert metrics["perplexity"]["wikipedia_mini"] == pytest.approx(expected["perplexity"]["wikipedia_mini"], rel=1e-5)


@pytest.mark.thorough
def test_a_damaged_state_or_a_missing_block_is_named(settings, tmp_path):
    killed_after_block(1, *settings())
    partial = tmp_path / ".saved.partial"
    victim = partial / "made" / "model-00002-of-00007.safetensors"
    content = victim.read_bytes()
    victim.unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00007\.safetensors is missing.*to begin again"):
        run_with(*settings())
    victim.write_bytes(content)
    (partial / "state.safetensors").write_bytes(b"half")
    message = r"state\.safetensors is missing or damaged.*to begin again"
    with pytest.raises(UserError, match=message):
        run_with(*settings())


@pytest.mark.thorough
@pytest.mark.parametrize("placement", [STREAM, RESIDENT])
@pytest.mark.parametrize(
    "stages",
    [
        ["permute=neurons", "repair=least_squares"],
        ["refine=swaps"],
        ["pattern=unstructured", "allocation=owl"],
        ["repair=block", "repair.epochs=1"],
    ],
    ids=",".join,
)
def test_a_run_with_stages_continues_to_the_same_weights(settings, tmp_path, stages, placement):
    one, other = tmp_path / "one", tmp_path / "other"
    run_with(*settings("dass", placement, one), *stages)
    killed_after_block(2, *settings("dass", placement, other), *stages)
    pruned = []
    context = listening(on_block_end=lambda report: pruned.append(report.index))
    run_with(*settings("dass", placement, other), *stages, context=context)
    assert pruned == list(range(3, BLOCKS))
    assert_same(content_of(other), content_of(one))
