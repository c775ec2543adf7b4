"""Activations that wait in the memory of the processor or on the disk change no number, and leave no file behind."""

from __future__ import annotations

import gc

import pytest
import torch
from support import run_with

from dass_exp.api import method_of
from dass_exp.engine import activation_cache as held
from dass_exp.engine.activation_cache import CACHES, Cache
from dass_exp.engine.capture import Batch, put
from dass_exp.engine.prune import Options, prune_model
from dass_exp.errors import UserError
from dass_exp.masks import NM
from dass_exp.models.families import FAMILIES

pytestmark = pytest.mark.usefixtures("short_texts")


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_comes_back_as_it_went(kind, dtype, tmp_path):
    tensor = torch.randn(3, 5, 8).to(dtype)
    waiting = Cache(kind, tmp_path).hold(tensor[:, :, ::2])
    assert torch.equal(waiting.get(), tensor[:, :, ::2])
    assert torch.equal(waiting.at_rest(), tensor[:, :, ::2])


def test_on_the_disk_a_tensor_takes_no_memory_and_its_file_goes_with_it(tmp_path):
    cache = Cache("disk", tmp_path / "waiting")
    first, second = cache.hold(torch.ones(4)), cache.hold(torch.zeros(4))
    assert len(list((tmp_path / "waiting").iterdir())) == 2
    del first
    gc.collect()
    assert len(list((tmp_path / "waiting").iterdir())) == 1
    assert torch.equal(second.get(), torch.zeros(4))


def test_a_kind_that_is_none_is_refused(cell):
    with pytest.raises(UserError, match=r"calibration\.cache='ram': expected one of device, cpu, disk"):
        run_with(*cell, "calibration.cache=ram")


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_engine_prunes_the_same_weights(kind, family, tiny_model, tokens, tmp_path):
    ours, theirs = tiny_model(family), tiny_model(family)
    outputs = prune_model(
        ours, tokens, method_of("dass"), NM(2, 4), Options("mlp", 2, outputs=True, cache=Cache(kind, tmp_path))
    )
    expected = prune_model(theirs, tokens, method_of("dass"), NM(2, 4), Options("mlp", 2, outputs=True))
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("placement", ["resident", "stream"])
def test_a_run_leaves_the_same_record_and_no_file(cell, results, placement, monkeypatch):
    files, write = [], held.write_tensors
    monkeypatch.setattr(
        held,
        "write_tensors",
        lambda tensors, path, durable: files.append(path) or write(tensors, path, durable=durable),
    )
    first = run_with(*cell, f"model.placement={placement}", "calibration.cache=disk", "calibration.batch_size=2").record
    assert len(files) >= 2 * 2 * 2  # two batches, two blocks, what goes in and what comes out
    assert all(path.is_relative_to(results / "runs" / first["key"] / "work") for path in files)
    assert not list(results.glob("runs/*/work"))
    second = run_with(*cell, f"model.placement={placement}", "calibration.batch_size=2", "rerun=true").record
    assert first["metrics"] == second["metrics"]
    assert [layer["zeros"] for layer in first["sparsity"]["layers"]] == [
        layer["zeros"] for layer in second["sparsity"]["layers"]
    ]


def test_a_full_disk_is_told(cell, results, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(held, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        run_with(*cell, "calibration.cache=disk", "model.placement=stream", "method=wanda")
    assert not list(results.glob("runs/*/result.json"))


@pytest.mark.parametrize(
    ("before", "now"), [((2, 2, 1), (5,)), ((5,), (2, 2, 1)), ((3, 2), (2, 3)), ((1,) * 5, (4, 1))]
)
def test_batches_are_cut_anew(before, now):
    whole = torch.arange(5.0).view(5, 1, 1)
    batches = [Batch(torch.zeros(size, 1, 1), []) for size in now]
    put(batches, whole.split(before))
    assert torch.equal(torch.cat([batch.hidden for batch in batches]), whole)
    assert [len(batch.hidden) for batch in batches] == list(now)
