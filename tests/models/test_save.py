"""A saved model loads anywhere, gives the same perplexity, says how it was pruned, and exists whole or not at all."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from support import contains, listening, run_with, without

import dass_exp
from dass_exp.errors import DamagedFileError, UserError
from dass_exp.report.console import show_run

pytestmark = pytest.mark.usefixtures("short_texts")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "deep" / "saved"


def scored_again(cell, folder):
    """The record of a saved model that is scored as it is."""
    return run_with(*without(cell, "model."), f"model.path={folder}", "method=dense").record


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["dass", "sparsegpt", "dense"])
def test_a_saved_model_is_what_was_scored(cell, target, method):
    record = run_with(*cell, f"method={method}", f"save={target}").record
    model = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
    assert scored_again(cell, target)["metrics"]["perplexity"] == record["metrics"]["perplexity"]
    if method != "dense":
        for layer in record["sparsity"]["layers"]:
            assert (model.get_submodule(layer["name"]).weight == 0).sum() >= layer["zeros"]
        masks = dass_exp.load_masks(target / "masks.safetensors")
        assert set(masks) == {layer["name"] for layer in record["sparsity"]["layers"]}
        assert all(not model.get_submodule(name).weight[~keep].any() for name, keep in masks.items())
    assert "tokenizer.json" in {path.name for path in target.iterdir()}
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o644}


def test_its_config_says_nothing_of_sparsity_and_its_manifest_all(cell, target, results):
    record = run_with(*cell, f"save={target}").record
    assert "spars" not in (target / "config.json").read_text()
    manifest = json.loads((target / "dass_exp.json").read_text())
    assert (manifest["key"], manifest["identity"]) == (record["key"], record["identity"])
    assert manifest["config"]["method"]["name"] == "dass"  # the dense counterpart is not saved over it
    assert manifest["sparsity"]["scope"] == record["sparsity"]["scope"] == 0.5
    assert manifest["told"].startswith("dass alpha=0.5 granularity=input 2:4 scope mlp of local:")
    assert not list(results.glob("runs/*/masks.safetensors"))  # nobody asked for them beside the record


@pytest.mark.thorough
def test_scoring_it_again_says_what_it_is_and_depends_on_its_weights_alone(cell, target, tmp_path):
    key = run_with(*cell, f"save={target}").record["key"]
    again = scored_again(cell, target)
    assert contains(again["protocol"]["model_note"], ["pruned by dass_exp: dass alpha=0.5", "2:4", key])
    shutil.copytree(target, tmp_path / "bare")
    for name in ("masks.safetensors", "dass_exp.json"):
        (tmp_path / "bare" / name).unlink()
    assert scored_again(cell, tmp_path / "bare")["key"] == again["key"]


@pytest.mark.thorough
def test_a_saved_model_that_was_damaged_is_not_scored(cell, target):
    run_with(*cell, f"save={target}")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "dass_exp.json"):
        content = (target / name).read_bytes()
        position = content.rindex(b"0")
        (target / name).write_bytes(content[:position] + b"1" + content[position + 1 :])
        with pytest.raises(DamagedFileError, match=name):
            scored_again(cell, target)
        (target / name).write_bytes(content)
    assert scored_again(cell, target)


@pytest.mark.thorough
def test_a_finished_run_can_be_saved_later(cell, target):
    first = run_with(*cell)
    assert not target.exists()
    second = run_with(*cell, f"save={target}")
    assert not second.found
    assert second.record["metrics"] == first.record["metrics"]
    stamp = (target / "model.safetensors").stat().st_mtime_ns
    assert run_with(*cell, f"save={target}").found
    assert (target / "model.safetensors").stat().st_mtime_ns == stamp
    assert not run_with(*cell, f"save={target}", "rerun=true").found
    assert (target / "model.safetensors").stat().st_mtime_ns != stamp


def fail(loop):
    pytest.fail("it was pruned first")


@pytest.mark.thorough
@pytest.mark.parametrize("present", ["file", "folder", "checkpoint"])
def test_what_is_already_there_is_not_overwritten(cell, target, present):
    if present == "file":
        target.parent.mkdir()
        target.write_text("mine")
    elif present == "folder":
        target.mkdir(parents=True)
        (target / "thesis.txt").write_text("mine")
    else:
        run_with(*cell, "method=wanda", f"save={target}")
    with pytest.raises(UserError) as caught:
        run_with(*cell, f"save={target}", context=listening(on_start=fail))
    advice = "expected a folder" if present == "file" else "remove it or name another folder"
    assert contains(str(caught.value), [str(target), advice])
    if present == "folder":
        assert (target / "thesis.txt").read_text() == "mine"


def test_an_empty_folder_may_be_named(cell, target):
    target.mkdir(parents=True)
    run_with(*cell, "model.dtype=bfloat16", f"save={target}")
    assert transformers.AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16


def test_too_small_a_disk_is_reported_before_anything_is_pruned(cell, target, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    with pytest.raises(UserError, match=r"GB are needed and 0\.0 GB are free"):
        run_with(*cell, f"save={target}", context=listening(on_start=fail))


@pytest.mark.thorough
def test_a_relative_folder_is_saved_and_scored_again(cell, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_with(*cell, "save=out")
    show_run(scored_again(cell, "out"), None, tmp_path, found=False)
    assert "pruned by dass_exp: dass alpha=0.5" in " ".join(capsys.readouterr().out.split())
