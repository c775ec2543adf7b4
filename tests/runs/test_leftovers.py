"""What killed, failed or concurrent runs leave behind: nothing in a saved model, nothing of anybody else's lost."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import (
    SHORT,
    KillAfter,
    Killed,
    contains,
    killed_after_block,
    listening,
    run_with,
    save_tiny,
    settings_of,
    tiny_config,
    tiny_overrides,
    without,
)

from dass_exp.errors import UserError
from dass_exp.runs import execute
from dass_exp.runs.context import ModelCache, RunContext
from dass_exp.runs.plan import plan
from dass_exp.runs.resolve import resolve
from dass_exp.storage.records import RecordStore

STREAM, RESIDENT = "model.placement=stream", "model.placement=resident"
TASKS = ["eval=mini", "eval.zeroshot.tasks=[piqa]", "eval.zeroshot.limit=2", *SHORT]
both_placements = pytest.mark.parametrize("placement", [STREAM, RESIDENT])

pytestmark = pytest.mark.usefixtures("short_texts")


@pytest.fixture(name="save")
def save_fixture(tmp_path):
    return f"save={tmp_path}/saved"


@pytest.fixture(name="elsewhere")
def elsewhere_fixture(tiny, tmp_path):
    """The same run with another results folder."""
    return tiny_overrides(tiny, tmp_path / "other")


@pytest.fixture(name="with_tasks")
def with_tasks_fixture(cell):
    return [*without(cell, "eval", "calibration"), *TASKS, STREAM]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.thorough
def test_a_saved_model_holds_no_file_of_a_killed_writer(cell, elsewhere, save, tmp_path, results):
    run_with(*elsewhere, STREAM, f"save={tmp_path}/whole")
    settings = [*cell, STREAM, save, "save_masks=true"]
    killed_after_block(0, *settings)
    (record,) = results.glob("runs/*")
    for name in (".tmpXyZ123", "dass_exp.json.77.partial", "model.safetensors.index.json.77.partial"):
        (tmp_path / ".saved.partial" / "made" / name).write_bytes(b"half")
        (record / name).write_bytes(b"half")
    run_with(*settings)
    assert names(tmp_path / "saved") == names(tmp_path / "whole")
    assert not [path for path in results.rglob("*") if path.name.startswith(".tmp") or path.suffix == ".partial"]


@both_placements
def test_files_that_appear_in_the_save_folder_meanwhile_stay(cell, save, tmp_path, placement):
    def write(report):
        (tmp_path / "saved").mkdir(exist_ok=True)
        (tmp_path / "saved" / "thesis.txt").write_text("years of work")

    message = "it holds what is no checkpoint of this project; remove it or name another folder"
    with pytest.raises(UserError, match=message):
        run_with(*cell, placement, save, context=listening(on_block_end=write))
    assert (tmp_path / "saved" / "thesis.txt").read_text() == "years of work"


@pytest.mark.thorough
@both_placements
@pytest.mark.parametrize("ending", [OSError, Killed])
def test_a_checkpoint_that_was_to_be_replaced_is_restored(cell, save, tmp_path, placement, ending, monkeypatch):
    run_with(*cell, placement, save)
    before, rename = load_file(next((tmp_path / "saved").glob("model*.safetensors"))), os.rename

    def fragile(source, target):
        if Path(source).name == "made" or (ending is Killed and Path(source).name == "before"):  # a kill restores none
            raise ending("on the way")
        return rename(source, target)

    with monkeypatch.context() as patched, pytest.raises(ending):
        patched.setattr(os, "rename", fragile)
        run_with(*cell, placement, save, "rerun=true")
    assert (tmp_path / "saved").exists() == (ending is not Killed)
    with pytest.raises(UserError, match="it holds the checkpoint of run"):  # restored, and not for another run to take
        run_with(*cell, placement, save, "method=magnitude")
    after = load_file(next((tmp_path / "saved").glob("model*.safetensors")))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    run_with(*cell, placement, save, "rerun=true")
    assert "saved" in names(tmp_path)
    assert not (tmp_path / ".saved.partial").exists()


@pytest.mark.thorough
def test_finding_a_record_leaves_the_state_of_a_run_in_progress_alone(cell, elsewhere, save, tmp_path):
    run_with(*elsewhere, STREAM, save)
    seen = []

    def find(report):
        assert run_with(*elsewhere, STREAM, save).found
        seen.append(names(tmp_path / ".saved.partial"))

    run_with(*cell, STREAM, save, "rerun=true", context=listening(on_block_end=find))
    assert len(seen) == 2
    assert all({"made", "state.safetensors"} <= set(files) for files in seen)


@pytest.mark.thorough
def test_a_finished_record_is_returned_while_another_process_makes_it_again(cell, results):
    outcomes = [run_with(*cell)]
    with RecordStore(results).lock(outcomes[0].record["key"]):
        thread = threading.Thread(target=lambda: outcomes.append(run_with(*cell)))
        thread.start()
        thread.join(20)
        assert outcomes[1].found


@pytest.mark.thorough
def test_tensors_of_a_failed_run_do_not_delete_files_of_the_next(cell, results):
    settings, errors = [*cell, STREAM, "calibration.cache=disk", "calibration.batch_size=1"], []
    try:
        run_with(*settings, context=RunContext(callbacks=[KillAfter(0)]))
    except Killed as error:
        errors.append(error)  # its traceback refers to the tensors, as in a notebook

    def forget(report):
        errors.clear()
        gc.collect()

    assert run_with(*settings, context=listening(on_block_end=forget)).record["metrics"]["perplexity"]
    assert not list(results.glob("runs/*/work"))


@pytest.mark.thorough
@pytest.mark.parametrize("fit", [False, True])
def test_tasks_stay_as_they_were_when_a_run_was_interrupted(with_tasks, save, tmp_path, fit, caplog):
    """Whether they can be scored depends on the free memory, which differs from start to start."""
    deep = save_tiny(tmp_path / "deep", tiny_config(num_hidden_layers=16))
    settings = [*without(with_tasks, "model.path"), f"model.path={deep}", save]
    needs = resolve(settings_of(*settings), RunContext()).needs
    little, ample = needs.streamed, 1 << 40
    assert little < needs.scored

    class Context(RunContext):
        def available_memory(self, device):
            return ample if fit == bool(self.callbacks) else little  # a killed start has callbacks

    with pytest.raises(Killed):
        run_with(*settings, context=Context(callbacks=[KillAfter(0)]))
    caplog.set_level("INFO")
    run_with(*without(settings, "save", STREAM), "method=dense")  # scored in memory, which is ample here
    record = run_with(*settings, context=Context()).record
    assert "continuing after block 0" in caplog.text
    assert ("tasks" in record["metrics"]) == fit


@pytest.mark.thorough
def test_a_plan_finds_a_run_without_its_tasks(with_tasks):
    record = run_with(*with_tasks).record
    planned = plan(settings_of(*with_tasks))
    assert (planned.done, planned.key) == (True, record["key"])


@pytest.mark.thorough
@pytest.mark.parametrize("file", ["block-00000", "masks-00000"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_file_of_an_interrupted_run_is_one_line(cell, results, file, damage):
    settings = [*cell, RESIDENT, "resume=true", "save_masks=true"]
    killed_after_block(0, *settings)
    (work,) = results.glob("runs/*/work")
    path = work / f"{file}.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.unlink()
    if (file, damage) == ("masks-00000", "missing"):
        assert run_with(*settings).record  # as if none had been kept: it begins again
        return
    with pytest.raises(UserError) as caught:
        run_with(*settings)
    assert contains(str(caught.value), [str(path), "is missing or damaged", f"remove {work} to begin again"])


@pytest.mark.thorough
def test_in_a_sweep_an_interrupted_run_continues_though_the_model_is_in_memory(cell, caplog):
    killed_after_block(0, *cell, "method=wanda", STREAM)
    shared = ModelCache()
    run_with(*cell, context=RunContext(shared=shared))
    caplog.set_level("INFO")
    run_with(*cell, "method=wanda", context=RunContext(shared=shared))
    assert "continuing after block 0" in caplog.text
    assert run_with(*cell, "method=magnitude", context=RunContext(shared=shared)).record


@pytest.mark.thorough
def test_the_home_folder_may_be_a_tilde(with_tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "tasks" in run_with(*with_tasks, "save='~/saved'").record["metrics"]
    assert (tmp_path / "saved" / "config.json").is_file()


@both_placements
def test_a_disk_that_fills_up_leaves_no_checkpoint_and_no_record(cell, save, tmp_path, results, placement, monkeypatch):
    def full(*arguments, **settings):
        raise Exception("No space left on device (os error 28)")  # as tokenizers report it

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left on device"):
        run_with(*cell, placement, save)
    assert names(tmp_path) == ["results"] if placement == RESIDENT else [".saved.partial", "results"]
    (failed,) = results.glob("runs/*/failed.json")
    assert not (failed.parent / "result.json").exists()


@pytest.mark.thorough
def test_the_state_of_a_run_that_saved_nothing_is_removed_by_one_that_saves(cell, save, results):
    killed_after_block(0, *cell, STREAM)
    assert list(results.glob("runs/*/work/state.safetensors"))
    run_with(*cell, STREAM, save)
    assert not list(results.glob("runs/*/work"))


def test_a_run_that_keeps_no_state_leaves_nothing_when_it_fails(cell, save, tmp_path):
    def fail():
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        run_with(*cell, STREAM, "resume=false", save, context=listening(on_end=fail))
    assert names(tmp_path) == ["results"]


@pytest.mark.thorough
def test_the_room_that_is_checked_includes_what_waits_on_the_disk(cell, save, monkeypatch):
    sizes, tokens = [], 4 * 32 * 32 * 4  # bytes of four sequences of 32 tokens and 32 features
    monkeypatch.setattr(execute, "check_room", lambda folder, size: sizes.append(size))
    for more in (["resume=false"], [], ["calibration.cache=disk"]):
        run_with(*cell, STREAM, save, "rerun=true", *more)
    assert sizes[1] - sizes[0] == 2 * 3 * tokens  # calibration and two models' windows; twice while it is replaced
    assert sizes[2] - sizes[1] == 5 * tokens


CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
""",
}
OWN = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


def test_a_model_with_code_of_its_own_is_saved_with_it(tiny, cell, save, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    for name, code in CODE.items():
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": OWN, "model_type": "own"}))
    run_with(*without(cell, "model.p"), f"model.path={folder}", "model.trust_remote_code=true", STREAM, save)
    assert set(CODE) <= set(names(tmp_path / "saved"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert (type(model).__name__, model.config.architectures) == ("OwnModel", ["OwnModel"])
