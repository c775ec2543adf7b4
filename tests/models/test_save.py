"""A saved model loads anywhere, gives the same perplexity, says how it was made, and is there whole or not at all."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from support import command, compose, contains, run_with

import dass_exp
from dass_exp.errors import UserError
from dass_exp.models import save as checkpoint
from dass_exp.models.save import save_checkpoint

pytestmark = pytest.mark.usefixtures("short_texts")


@pytest.fixture
def place(tmp_path):
    return tmp_path / "deep" / "saved"


@pytest.mark.parametrize("method", ["dass", "sparsegpt", "dense"])
def test_a_saved_model_is_what_was_scored(cell, place, method):
    record = run_with(*cell, f"method={method}", f"save={place}").record
    model = transformers.AutoModelForCausalLM.from_pretrained(place).eval()
    again = run_with(
        *[part for part in cell if not part.startswith("model.")], f"model.path={place}", "method=dense"
    ).record
    assert again["metrics"]["perplexity"] == record["metrics"]["perplexity"]
    if method != "dense":
        for layer in record["sparsity"]["layers"]:
            assert (model.get_submodule(layer["name"]).weight == 0).sum() >= layer["zeros"]
        masks = dass_exp.load_masks(place / "masks.safetensors")
        assert set(masks) == {layer["name"] for layer in record["sparsity"]["layers"]}
        assert all(not model.get_submodule(name).weight[~keep].any() for name, keep in masks.items())
    assert "tokenizer.json" in {path.name for path in place.iterdir()}
    assert {path.stat().st_mode & 0o777 for path in place.iterdir() if path.name != "dass_exp.json"} == {0o644}


def test_its_config_says_nothing_of_sparsity_and_its_manifest_all(cell, place):
    record = run_with(*cell, f"save={place}").record
    assert "spars" not in (place / "config.json").read_text()
    manifest = json.loads((place / "dass_exp.json").read_text())
    assert manifest["key"] == record["key"]
    assert manifest["identity"] == record["identity"]
    assert manifest["sparsity"]["scope"] == record["sparsity"]["scope"] == 0.5
    assert manifest["told"].startswith("dass alpha=0.5 granularity=input 2:4 scope mlp of local:")


def test_scoring_it_again_says_what_it_is(cell, place):
    key = run_with(*cell, f"save={place}").record["key"]
    again = run_with(
        *[part for part in cell if not part.startswith("model.")], f"model.path={place}", "method=dense"
    ).record
    assert contains(again["protocol"]["model_note"], ["pruned by dass_exp: dass alpha=0.5", "2:4", key])


def test_the_digest_of_a_saved_model_is_of_its_weights_and_not_of_its_masks_or_manifest(cell, place, tmp_path):
    run_with(*cell, f"save={place}")
    shutil.copytree(place, tmp_path / "bare")
    for name in ("masks.safetensors", "dass_exp.json"):
        (tmp_path / "bare" / name).unlink()
    cell = [part for part in cell if not part.startswith("model.")]
    keys = {
        run_with(*cell, f"model.path={folder}", "method=dense").record["key"] for folder in (place, tmp_path / "bare")
    }
    assert len(keys) == 1


def test_saving_is_asked_for_after_the_run_too(cell, place):
    first = run_with(*cell)
    assert not place.exists()
    second = run_with(*cell, f"save={place}")
    assert not second.found
    assert second.record["metrics"] == first.record["metrics"]
    stamp = (place / "model.safetensors").stat().st_mtime_ns
    assert run_with(*cell, f"save={place}").found
    assert (place / "model.safetensors").stat().st_mtime_ns == stamp
    assert not run_with(*cell, f"save={place}", "rerun=true").found
    assert (place / "model.safetensors").stat().st_mtime_ns != stamp


def test_the_dense_counterpart_is_not_saved_over_it(cell, place):
    run_with(*cell, f"save={place}")
    assert json.loads((place / "dass_exp.json").read_text())["config"]["method"]["name"] == "dass"


def test_masks_are_kept_beside_the_record_only_where_that_is_asked(cell, place, results):
    key = run_with(*cell, f"save={place}").record["key"]
    assert not (results / "runs" / key / "masks.safetensors").exists()


@pytest.mark.parametrize("there", ["file", "folder", "another"])
def test_what_lies_there_is_not_overwritten(cell, place, results, there, monkeypatch):
    if there == "file":
        place.parent.mkdir()
        place.write_text("mine")
    elif there == "folder":
        place.mkdir(parents=True)
        (place / "thesis.txt").write_text("mine")
    else:
        run_with(*cell, "method=wanda", f"save={place}")
    monkeypatch.setattr("dass_exp.runs.pruning.prune_model", lambda *arguments: pytest.fail("it was pruned first"))
    with pytest.raises(UserError) as caught:
        run_with(*cell, f"save={place}")
    assert contains(str(caught.value), [f"save={place}", "remove it or name another folder"])
    if there == "folder":
        assert (place / "thesis.txt").read_text() == "mine"


def test_an_empty_folder_may_be_named(cell, place):
    place.mkdir(parents=True)
    run_with(*cell, f"save={place}")
    assert (place / "model.safetensors").is_file()


def test_a_disk_without_room_is_told_before_anything_is_pruned(cell, place, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr("dass_exp.runs.pruning.prune_model", lambda *arguments: pytest.fail("it was pruned first"))
    with pytest.raises(UserError, match=r"GB are needed and 0\.0 GB are free"):
        run_with(*cell, f"save={place}")


def test_a_disk_that_fills_up_leaves_nothing_behind_and_no_record(cell, place, results, monkeypatch):
    def full(masks, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_masks", full)
    with pytest.raises(OSError, match="No space left"):
        run_with(*cell, f"save={place}")
    assert not place.exists()
    assert list(place.parent.iterdir()) == []
    pruned = [
        path
        for path in results.glob("runs/*/result.json")
        if json.loads(path.read_text())["config"]["method"]["name"] != "dense"
    ]
    assert pruned == []


def test_a_checkpoint_that_is_replaced_is_never_half_there(tmp_path, tiny):
    model, tokenizer = (
        transformers.AutoModelForCausalLM.from_pretrained(tiny),
        transformers.AutoTokenizer.from_pretrained(tiny),
    )
    place = tmp_path / "saved"
    save_checkpoint(place, model, tokenizer, {}, {"key": "1", "told": "first"})
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.MonkeyPatch.context() as patched, pytest.raises(OSError, match="broken"):
        patched.setattr(checkpoint, "write_json", lambda path, content: (_ for _ in ()).throw(OSError("broken")))
        save_checkpoint(place, model, tokenizer, {}, {"key": "1", "told": "second"})
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_the_command_saves_and_scores_again(cell, tmp_path):
    assert command(*cell, "save=out", folder=tmp_path).returncode == 0
    cell = [part for part in cell if not part.startswith("model.")]
    done = command(*cell, "method=dense", "model.path=out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pruned by dass_exp: dass alpha=0.5" in " ".join(done.stdout.split())


def test_a_model_in_half_precision_is_saved_as_it_was_scored(cell, place):
    run_with(*cell, "model.dtype=bfloat16", f"save={place}")
    assert transformers.AutoModelForCausalLM.from_pretrained(place).dtype == torch.bfloat16
    assert compose(f"model.path={place}").save is None
