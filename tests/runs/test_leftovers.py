"""What runs that were killed, failed or overtaken leave behind: nothing in a saved model, nothing of anybody else's, and a line that helps."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers
from dass_exp.runs.journal import Journal
from safetensors.torch import load_file
from support import Killed, contains, run_with, settings_of, stopped_behind

from dass_exp.errors import UserError
from dass_exp.models import save as checkpoint
from dass_exp.runs import progress
from dass_exp.runs.context import Shelf
from dass_exp.runs.memory import BASE
from dass_exp.runs.plan import plan
from dass_exp.runs.run import run
from dass_exp.storage.records import RecordStore

STREAM, RESIDENT = "model.placement=stream", "model.placement=resident"
TASKS = ["eval=mini", "eval.perplexity.context=32", "eval.perplexity.max_windows=4", "eval.zeroshot.limit=2"]

pytestmark = pytest.mark.usefixtures("short_texts")


def elsewhere(cell, folder):
    return [f"results_dir={folder}" if part.startswith("results_dir") else part for part in cell]


def with_tasks(cell):
    return [part for part in cell if not part.startswith("eval")] + TASKS


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_saved_model_holds_no_file_of_a_writer_that_was_killed(cell, tmp_path, results, monkeypatch):
    run_with(*elsewhere(cell, tmp_path / "other"), STREAM, f"save={tmp_path}/whole")
    settings = [*cell, STREAM, f"save={tmp_path}/saved", "save_masks=true"]
    stopped_behind(0, monkeypatch, *settings)
    made = tmp_path / ".saved.partial" / "made"
    for name in (".tmpXyZ123", "dass_exp.json.77.partial", "model.safetensors.index.json.77.partial"):
        (made / name).write_bytes(b"half")
    (folder,) = results.glob("runs/*")
    (folder / ".tmpAbC").write_bytes(b"half")
    (folder / "result.json.77.partial").write_bytes(b"half")
    run_with(*settings)
    assert names(tmp_path / "saved") == names(tmp_path / "whole")
    assert not [path for path in results.rglob("*") if path.name.startswith(".tmp") or path.suffix == ".partial"]


@pytest.mark.parametrize("placement", [STREAM, RESIDENT])
def test_what_somebody_puts_there_meanwhile_stays(cell, tmp_path, placement, monkeypatch):
    note = Journal.note

    def slow(journal, report, pattern):
        (tmp_path / "saved").mkdir(exist_ok=True)
        (tmp_path / "saved" / "thesis.txt").write_text("years of work")
        note(journal, report, pattern)

    monkeypatch.setattr(Journal, "note", slow)
    with pytest.raises(
        UserError, match="it holds what is no checkpoint of this project; remove it or name another folder"
    ):
        run_with(*cell, placement, f"save={tmp_path}/saved")
    assert (tmp_path / "saved" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("placement", [STREAM, RESIDENT])
@pytest.mark.parametrize("ending", [OSError, Killed])
def test_a_checkpoint_that_was_to_be_replaced_comes_back(cell, tmp_path, placement, ending, monkeypatch):
    settings = [*cell, placement, f"save={tmp_path}/saved"]
    run_with(*settings)
    before, rename = load_file(next((tmp_path / "saved").glob("model*.safetensors"))), type(tmp_path).rename

    def fragile(path, target):
        if path.name == "made" or (ending is Killed and path.name == "before"):  # a kill lets nobody put it back
            raise ending("on the way")
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(ending):
        patched.setattr(type(tmp_path), "rename", fragile)
        run_with(*settings, "rerun=true")
    if ending is Killed:
        assert not (tmp_path / "saved").exists()
    with pytest.raises(UserError, match="it holds the checkpoint of run"):  # it is put back, and nobody's to take
        run_with(*cell, placement, f"save={tmp_path}/saved", "method=magnitude")
    found = load_file(next((tmp_path / "saved").glob("model*.safetensors")))
    assert all(torch.equal(tensor, found[name]) for name, tensor in before.items())
    run_with(*settings, "rerun=true")
    assert "saved" in names(tmp_path)
    assert not (tmp_path / ".saved.partial").exists()


def test_a_found_record_leaves_the_state_of_a_run_in_progress_alone(cell, tmp_path, results, monkeypatch):
    run_with(*elsewhere(cell, tmp_path / "other"), STREAM, f"save={tmp_path}/saved")
    settings = [*cell, STREAM, f"save={tmp_path}/saved", "rerun=true"]
    real, seen = progress.save_step, []

    def watched(folder, identity, placement, step):
        real(folder, identity, placement, step)
        run_with(*elsewhere(cell, tmp_path / "other"), STREAM, f"save={tmp_path}/saved")
        seen.append(names(folder))

    monkeypatch.setattr("dass_exp.runs.journal.save_step", watched)
    run_with(*settings)
    assert all({"made", "state.safetensors"} <= set(found) for found in seen)


def test_a_finished_record_is_given_out_while_it_is_made_again(cell, results):
    key = run_with(*cell).record["key"]
    with RecordStore(results).lock(key):
        done = []
        thread = threading.Thread(target=lambda: done.append(run_with(*cell)))
        thread.start()
        thread.join(20)
        assert done
        assert done[0].found


def test_what_a_failed_run_still_holds_does_not_reach_the_files_of_the_next(cell, results, tmp_path, monkeypatch):
    settings, kept, hold = [*cell, STREAM, "calibration.cache=disk", "calibration.batch_size=1"], [], Cache.hold
    with monkeypatch.context() as patched:
        patched.setattr(Cache, "hold", lambda cache, tensor: kept.append(hold(cache, tensor)) or kept[-1])
        stopped_behind(0, monkeypatch, *settings)
    real = progress.save_step

    def late(folder, identity, placement, step):
        real(folder, identity, placement, step)
        kept.clear()  # as when a notebook forgets its last traceback

    monkeypatch.setattr("dass_exp.runs.journal.save_step", late)
    assert run_with(*settings).record["metrics"]["perplexity"]
    assert not list(results.glob("runs/*/work"))


@pytest.mark.parametrize(("then", "now"), [(BASE, 1 << 40), (1 << 40, BASE)])
def test_tasks_stay_as_they_were_when_a_run_was_interrupted(cell, tmp_path, then, now, monkeypatch, caplog):
    """Whether they can be scored depends on the memory at hand, which is another at each start."""
    settings = [*with_tasks(cell), STREAM, f"save={tmp_path}/saved"]
    monkeypatch.setattr("dass_exp.runs.settled.available", lambda device: then)
    stopped_behind(0, monkeypatch, *settings)
    monkeypatch.setattr("dass_exp.runs.settled.available", lambda device: now)
    caplog.set_level("INFO")
    record = run_with(*settings).record
    assert "going on behind block 0" in caplog.text
    assert ("tasks" in record["metrics"]) == (then > now)


def test_a_plan_finds_a_run_without_its_tasks(cell):
    settings = [*with_tasks(cell), STREAM]
    record = run_with(*settings).record
    found = plan(settings_of(*settings))
    assert (found.done, found.key) == (True, record["key"])


@pytest.mark.parametrize("file", ["block-00000", "masks-00000"])
@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_damaged_file_of_an_interrupted_run_is_one_line(cell, results, monkeypatch, file, harm):
    settings = [*cell, RESIDENT, "checkpoint=true", "save_masks=true"]
    stopped_behind(0, monkeypatch, *settings)
    (work,) = results.glob("runs/*/work")
    path = work / f"{file}.safetensors"
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.unlink()
    if (file, harm) == ("masks-00000", "gone"):
        assert run_with(*settings).record  # as where none were asked for: it begins again
        return
    with pytest.raises(UserError) as caught:
        run_with(*settings)
    assert contains(str(caught.value), [str(path), "is missing or damaged", f"remove {work} to begin again"])


def test_in_a_sweep_an_interrupted_run_goes_on_though_the_model_is_in_memory(cell, monkeypatch, caplog):
    stopped_behind(0, monkeypatch, *cell, "method=wanda", STREAM)
    shelf = Shelf()
    run(settings_of(*cell), shelf=shelf)
    caplog.set_level("INFO")
    run(settings_of(*cell, "method=wanda"), shelf=shelf)
    assert "going on behind block 0" in caplog.text
    assert run(settings_of(*cell, "method=magnitude"), shelf=shelf).record


def test_a_home_folder_may_be_named_by_its_sign(cell, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "tasks" in run_with(*with_tasks(cell), STREAM, "save='~/saved'").record["metrics"]
    assert (tmp_path / "saved" / "config.json").is_file()


@pytest.mark.parametrize("placement", [STREAM, RESIDENT])
def test_a_disk_that_fills_up_under_the_tokenizer_is_told_as_such(cell, tmp_path, results, placement, monkeypatch):
    def full(*arguments, **settings):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left on device"):
        run_with(*cell, placement, f"save={tmp_path}/saved")
    assert not [path for path in results.glob("runs/*/result.json") if (path.parent / "failed.json").exists()]
    assert not (tmp_path / "saved").exists()


def test_killed_before_its_record_a_streamed_run_reads_nothing_again(cell, tmp_path, monkeypatch):
    write, keys = Store.write, []

    def fragile(store, record, *rest):
        keys.append(record["key"])
        if len(keys) == 2:
            raise Killed
        return write(store, record, *rest)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(RecordStore, "write", fragile)
        run_with(*cell, STREAM)
    monkeypatch.setattr(Journal, "note", lambda *arguments: pytest.fail("pruned again"))
    found = run_with(*cell, STREAM)
    assert [found.dense["key"], found.record["key"]] == keys


def test_the_state_of_a_run_that_saved_nothing_goes_with_one_that_does(cell, tmp_path, results, monkeypatch):
    stopped_behind(0, monkeypatch, *cell, STREAM)
    assert list(results.glob("runs/*/work/state.safetensors"))
    run_with(*cell, STREAM, f"save={tmp_path}/saved")
    assert not list(results.glob("runs/*/work"))


def test_a_run_that_keeps_no_state_leaves_nothing_when_it_fails(cell, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("broken")

    monkeypatch.setattr(checkpoint.Growing, "finish", fail)
    with pytest.raises(OSError, match="broken"):
        run_with(*cell, STREAM, "checkpoint=false", f"save={tmp_path}/saved")
    assert names(tmp_path) == ["results"]


def test_room_is_asked_for_what_waits_on_the_disk(cell, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("dass_exp.runs.making.check_room", lambda folder, size: asked.append(size))
    for more in (["checkpoint=false"], [], ["calibration.cache=disk"]):
        run_with(*cell, STREAM, f"save={tmp_path}/saved", "rerun=true", *more)
    tokens = 4 * 32 * 32 * 4
    assert (
        asked[1] - asked[0] == 2 * 3 * tokens
    )  # calibration, and windows for two models; twice while the state is replaced
    assert asked[2] - asked[1] == 5 * tokens


def test_a_model_with_code_of_its_own_is_saved_with_it(tiny, cell, tmp_path):
    folder = tmp_path / "model"
    code = folder / "modeling_own.py"
    transformers.AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    code.write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = (folder / "config.json").read_text()
    auto = '"auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}, "model_type": "own"'
    (folder / "config.json").write_text(config.replace('"model_type": "llama"', auto))
    rest = [part for part in cell if not part.startswith("model.p")]
    run_with(*rest, f"model.path={folder}", "model.trust_remote_code=true", STREAM, f"save={tmp_path}/saved")
    assert {"configuration_own.py", "modeling_own.py"} <= set(names(tmp_path / "saved"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert model.config.architectures == ["OwnModel"]
