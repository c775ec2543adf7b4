"""A run that is killed at any moment goes on from its last block and ends with the same weights, masks and figures."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
import torch
from dass_exp.runs.journal import Journal
from safetensors.torch import load_file
from support import Killed, contains, run_with, save_tiny, stopped_behind, tiny_config, tiny_overrides

import dass_exp
from dass_exp.engine.prune import prune_model
from dass_exp.errors import UserError
from dass_exp.models.shards import Shards
from dass_exp.runs import progress

STREAM = "model.placement=stream"
RESIDENT = "model.placement=resident"
BLOCKS = 6

pytestmark = pytest.mark.usefixtures("short_texts")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of six blocks."""
    return save_tiny(tmp_path_factory.mktemp("deep") / "model", tiny_config(num_hidden_layers=BLOCKS))


def content(folder):
    """Everything that a run left, but for times and where and when it was made."""
    (path,) = [
        path
        for path in folder.glob("results/runs/*/result.json")
        if json.loads(path.read_text())["config"]["method"]["name"] != "dense"
    ]
    record = json.loads(path.read_text())
    (dense,) = [
        path
        for path in folder.glob("results/runs/*/result.json")
        if json.loads(path.read_text())["config"]["method"]["name"] == "dense"
    ]
    layers = [
        {name: value for name, value in layer.items() if name != "seconds"} for layer in record["sparsity"]["layers"]
    ]
    weights = {
        name: tensor for file in folder.glob("saved/model*.safetensors") for name, tensor in load_file(file).items()
    }
    masks = dass_exp.load_masks(folder / "saved" / "masks.safetensors")
    files = sorted(path.name for path in (folder / "saved").iterdir())
    return record["key"], record["metrics"], layers, json.loads(dense.read_text())["metrics"], files, weights, masks


def same(one, other):
    tensors = [
        part
        for part in one
        if isinstance(part, dict) and part and all(isinstance(value, torch.Tensor) for value in part.values())
    ]
    assert len(tensors) == 2
    for ours, theirs in zip(one, other, strict=True):
        if any(ours is part for part in tensors):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        else:
            assert ours == theirs


def overrides(deep, folder, method="dass", placement=STREAM):
    return [
        *tiny_overrides(deep, folder / "results"),
        f"method={method}",
        "scope=all",
        placement,
        f"save={folder}/saved",
    ]


def killed_after(seconds, *settings):
    """Do a run in a process of its own and kill it; whether it came to its end before."""
    child = os.fork()
    if not child:
        status = 1
        try:
            run_with(*settings)
            status = 0
        finally:
            os._exit(status)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


@pytest.mark.parametrize(("method", "more"), [("dass", []), ("sparsegpt", []), ("dass", [RESIDENT, "checkpoint=true"])])
def test_killed_at_random_moments_it_ends_in_the_same_weights(deep, tmp_path, method, more):
    (tmp_path / "whole").mkdir()
    run_with(
        *overrides(deep, tmp_path / "whole", "dense"), "save=null", RESIDENT
    )  # a model in memory is scored dense first: the kills are for what follows
    start = time.perf_counter()
    run_with(*overrides(deep, tmp_path / "whole", method), *more)
    lasts = time.perf_counter() - start
    expected, draw, gone_on, moment = content(tmp_path / "whole"), random.Random(0), 0, 0
    while moment < 10 or (gone_on < 3 and moment < 40):  # on a busy machine most kills may come too early or too late
        folder = tmp_path / str(moment)
        folder.mkdir()
        if RESIDENT in more:
            run_with(*overrides(deep, folder, "dense"), "save=null", RESIDENT)
        for _ in range(2):
            killed_after(draw.uniform(0.1, 1.0) * lasts, *overrides(deep, folder, method), *more)
            gone_on += (folder / ".saved.partial" / "state.safetensors").is_file()
        run_with(*overrides(deep, folder, method), *more)
        same(content(folder), expected)
        left = {path.name for path in folder.iterdir()}
        assert left - {".saved.lock"} == {"results", "saved"}  # an empty file, if the kill came behind the record
        moment += 1
    assert gone_on >= 3  # some were killed in the midst


@pytest.mark.parametrize("method", ["dass", "magnitude", "dense"])
@pytest.mark.parametrize("block", [0, 2, BLOCKS - 1])
def test_it_goes_on_behind_the_last_block_that_was_done(deep, tmp_path, method, block, monkeypatch, caplog):
    (tmp_path / "whole").mkdir()
    settings = overrides(deep, tmp_path, method)
    stopped_behind(block, monkeypatch, *settings)
    reads, read = [], Shards.read
    caplog.set_level("INFO")
    with monkeypatch.context() as patched:
        patched.setattr(
            Shards,
            "read",
            lambda shards, names, dtype: reads.extend(names := list(names)) or read(shards, names, dtype),
        )
        found = run_with(*settings).record
    assert f"going on behind block {block} of an interrupted run" in caplog.text
    assert {int(name.split(".")[2]) for name in reads if ".layers." in name} == set(range(block + 1, BLOCKS))
    whole = run_with(*overrides(deep, tmp_path / "whole", method)).record
    assert found["metrics"] == whole["metrics"]
    if method != "dense":
        same(content(tmp_path), content(tmp_path / "whole"))


@pytest.mark.parametrize("method", ["dass", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("block", [0, 3, BLOCKS - 1])
def test_a_model_in_memory_goes_on_too(deep, tmp_path, method, block, monkeypatch):
    settings = [*overrides(deep, tmp_path, method, RESIDENT), "checkpoint=true"]
    stopped_behind(block, monkeypatch, *settings)
    pruned = []
    with monkeypatch.context() as patched:
        note = Journal.note
        patched.setattr(
            Journal,
            "note",
            lambda journal, report, pattern: pruned.append(report.name) or note(journal, report, pattern),
        )
        run_with(*settings)
    assert pruned == [f"model.layers.{index}" for index in range(block + 1, BLOCKS)]
    (tmp_path / "whole").mkdir()
    run_with(*overrides(deep, tmp_path / "whole", method, RESIDENT))
    same(content(tmp_path), content(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "saved", "whole"]


def test_killed_while_it_is_scored_it_prunes_no_block_again(deep, tmp_path, monkeypatch):
    settings = [part for part in overrides(deep, tmp_path, placement=RESIDENT) if not part.startswith("save=")] + [
        "checkpoint=true"
    ]
    run_with(*settings, "method=dense")

    def kill(*arguments):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("dass_exp.runs.making.perplexity", kill)
        run_with(*settings)
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "note", lambda *arguments: pytest.fail("pruned again"))
        found = run_with(*settings).record
    whole = run_with(*settings, "rerun=true", "checkpoint=false").record
    assert found["metrics"] == whole["metrics"]
    assert not list(tmp_path.glob("results/runs/*/work"))


def test_what_was_spent_before_a_kill_counts(deep, tmp_path, monkeypatch):
    settings, real, slept = overrides(deep, tmp_path), progress.save_step, []

    def slow(folder, identity, placement, step):
        if not slept:
            slept.append(time.sleep(1.0))
        real(folder, identity, placement, step)

    monkeypatch.setattr("dass_exp.runs.journal.save_step", slow)
    stopped_behind(2, monkeypatch, *settings)  # this replaces the slow one for its time
    assert run_with(*settings).record["cost"]["prune_s"] >= 1.0
    assert len(slept) == 1


def test_another_placement_is_named_and_auto_goes_on_as_it_began(deep, tmp_path, monkeypatch, caplog):
    stopped_behind(1, monkeypatch, *overrides(deep, tmp_path))
    with pytest.raises(UserError, match=r"model\.placement=stream \(now resident\)"):
        run_with(*overrides(deep, tmp_path, placement=RESIDENT))
    caplog.set_level("INFO")
    run_with(*overrides(deep, tmp_path, placement="model.placement=auto"))
    assert "going on behind block 1 of an interrupted run" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "saved"]


def test_no_state_is_kept_where_none_is_asked_for(deep, tmp_path, monkeypatch):
    monkeypatch.setattr("dass_exp.runs.journal.save_step", lambda *arguments: pytest.fail("kept"))
    run_with(*overrides(deep, tmp_path), "checkpoint=false")
    run_with(*overrides(deep, tmp_path, placement=RESIDENT), "rerun=true")


def test_each_block_draws_for_itself(deep, tmp_path, monkeypatch):
    """A method that draws random numbers goes on with those that it would have drawn."""
    drawn = {}

    def noting(journal, report, pattern, note=Journal.note):
        drawn.setdefault(report.name, []).append(float(torch.rand(1)))
        note(journal, report, pattern)

    monkeypatch.setattr(Journal, "note", noting)
    run_with(*overrides(deep, tmp_path))
    stopped_behind(2, monkeypatch, *overrides(deep, tmp_path), "rerun=true")
    run_with(*overrides(deep, tmp_path), "rerun=true")
    assert all(len(numbers) == 2 and len(set(numbers)) == 1 for numbers in drawn.values())
    assert len({numbers[0] for numbers in drawn.values()}) == BLOCKS


@pytest.mark.parametrize("more", [[], ["rerun=true"]])
@pytest.mark.parametrize(
    "place",
    [
        "dass_exp.models.save.write_masks",
        "dass_exp.runs.run.discard",
        "dass_exp.runs.progress.shutil.rmtree",
        "dass_exp.runs.run.compose",
    ],
)
def test_killed_around_the_end_it_ends_the_same(deep, tmp_path, place, more, monkeypatch):
    """Before the checkpoint is renamed into place, behind that, and before the record is written."""

    def kill(*arguments, **settings):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(place, kill)
        run_with(*overrides(deep, tmp_path), *more)
    run_with(*overrides(deep, tmp_path), *more)
    (tmp_path / "whole").mkdir()
    run_with(*overrides(deep, tmp_path / "whole"))
    same(content(tmp_path), content(tmp_path / "whole"))
    assert not (tmp_path / ".saved.partial").exists()


def interrupted(deep, tmp_path, monkeypatch, *more):
    calls = []

    def fragile(*arguments, **settings):
        calls.append(None)
        if len(calls) == 3:
            raise Killed
        return progress.save_step(*arguments, **settings)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("dass_exp.runs.journal.save_step", fragile)
        run_with(*overrides(deep, tmp_path), *more)


def test_a_changed_setting_is_named(deep, tmp_path, monkeypatch):
    interrupted(deep, tmp_path, monkeypatch)
    with pytest.raises(UserError) as caught:
        run_with(*overrides(deep, tmp_path), "method.alpha=0.25", "seed=3")
    assert contains(
        str(caught.value),
        [".saved.partial", "method.alpha=0.5 (now 0.25)", "seed=0 (now 3)", "set it back, or remove the folder"],
    )
    assert not (tmp_path / "saved").exists()


def test_another_batch_size_may_go_on(deep, tmp_path, monkeypatch):
    interrupted(deep, tmp_path, monkeypatch)
    found = run_with(*overrides(deep, tmp_path), "calibration.batch_size=3", "eval.batch_size=1").record
    (tmp_path / "whole").mkdir()
    whole = run_with(*overrides(deep, tmp_path / "whole")).record
    assert [layer["zeros"] for layer in found["sparsity"]["layers"]] == [
        layer["zeros"] for layer in whole["sparsity"]["layers"]
    ]
    assert found["metrics"]["perplexity"]["wikipedia_mini"] == pytest.approx(
        whole["metrics"]["perplexity"]["wikipedia_mini"], rel=1e-5
    )


def test_a_damaged_state_or_a_block_that_is_gone_is_told(deep, tmp_path, monkeypatch):
    interrupted(deep, tmp_path, monkeypatch)
    scratch = tmp_path / ".saved.partial"
    victim = scratch / "made" / "model-00002-of-00007.safetensors"
    content = victim.read_bytes()
    victim.unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00007\.safetensors is missing.*to begin again"):
        run_with(*overrides(deep, tmp_path))
    victim.write_bytes(content)
    (scratch / "state.safetensors").write_bytes(b"half")
    with pytest.raises(
        UserError, match=r"state of an interrupted run cannot be read .*remove the folder to begin again"
    ):
        run_with(*overrides(deep, tmp_path))


def test_without_a_place_to_save_the_state_lies_beside_the_record(deep, tmp_path, monkeypatch):
    settings = [part for part in overrides(deep, tmp_path) if not part.startswith("save=")]
    calls = []

    def fragile(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise Killed
        return progress.save_step(*arguments)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("dass_exp.runs.journal.save_step", fragile)
        run_with(*settings)
    (state,) = tmp_path.glob("results/runs/*/work/state.safetensors")
    assert run_with(*settings).record["metrics"]["perplexity"]
    assert not state.parent.exists()


def test_the_engine_begins_at_the_start_without_progress(tiny_model, tokens):
    from dass_exp.api import method_of
    from dass_exp.engine.prune import Options
    from dass_exp.masks import NM

    assert Options().progress.returns_tuple is None
    assert prune_model(tiny_model("llama"), tokens, method_of("wanda"), NM(2, 4), Options()) == []
