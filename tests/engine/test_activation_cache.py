"""Activations stored in CPU memory or on disk change no number and leave no file behind."""

from __future__ import annotations

import gc

import pytest
import torch
from engine_support import assert_same_state, prune_blocks
from support import run_with

from dass_exp.config.choices import ACTIVATION_CACHES
from dass_exp.engine import activation_cache
from dass_exp.engine.activation_cache import ActivationCache
from dass_exp.engine.capture import Batch, restore_hidden
from dass_exp.errors import UserError
from dass_exp.methods.dass import Dass
from dass_exp.models.families import FAMILIES

pytestmark = pytest.mark.usefixtures("short_texts")


@pytest.mark.parametrize("kind", ACTIVATION_CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_comes_back_as_it_went(kind, dtype, tmp_path):
    tensor = torch.randn(3, 5, 8).to(dtype)[:, :, ::2]
    cached = ActivationCache(kind, tmp_path).store(tensor)
    assert torch.equal(cached.load(), tensor)
    assert torch.equal(cached.stored(), tensor)


def test_on_disk_a_tensors_file_goes_with_its_last_reference(tmp_path):
    cache = ActivationCache("disk", tmp_path / "cache")
    first, second = cache.store(torch.ones(4)), cache.store(torch.zeros(4))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    del first
    gc.collect()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert torch.equal(second.load(), torch.zeros(4))


def test_an_unknown_kind_is_refused(cell):
    with pytest.raises(UserError, match=r"calibration\.cache='ram': expected one of device, cpu, disk"):
        run_with(*cell, "calibration.cache=ram")


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_engine_prunes_the_same_weights(kind, family, tiny_model, tokens, tmp_path):
    model, plain = tiny_model(family), tiny_model(family)
    cache = ActivationCache(kind, tmp_path)
    hidden = prune_blocks(model, tokens, Dass(), batch_size=2, return_hidden=True, cache=cache).hidden
    expected = prune_blocks(plain, tokens, Dass(), batch_size=2, return_hidden=True).hidden
    assert all(torch.equal(one, other) for one, other in zip(hidden, expected, strict=True))
    assert_same_state(model, plain.state_dict())
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
@pytest.mark.parametrize("placement", ["resident", "stream"])
def test_a_run_leaves_the_same_record_and_no_file(cell, results, placement, monkeypatch):
    files, write = [], activation_cache.write_tensors

    def spy(tensors, path, durable):
        files.append(path)
        write(tensors, path, durable=durable)

    monkeypatch.setattr(activation_cache, "write_tensors", spy)
    cell = [*cell, f"model.placement={placement}", "calibration.batch_size=2"]
    first = run_with(*cell, "calibration.cache=disk").record
    assert len(files) >= 2 * 2 * 2  # two batches, two blocks, what goes in and what comes out
    assert all(path.is_relative_to(results / "runs" / first["key"] / "work") for path in files)
    assert not list(results.glob("runs/*/work"))
    second = run_with(*cell, "rerun=true").record
    assert first["metrics"] == second["metrics"]
    layers = zip(first["sparsity"]["layers"], second["sparsity"]["layers"], strict=True)
    assert all(one["zeros"] == other["zeros"] for one, other in layers)


def test_a_full_disk_stops_the_run(cell, results, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activation_cache, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        run_with(*cell, "calibration.cache=disk", "model.placement=stream", "method=wanda")
    assert not list(results.glob("runs/*/result.json"))


@pytest.mark.parametrize(
    ("before", "now"), [((2, 2, 1), (5,)), ((5,), (2, 2, 1)), ((3, 2), (2, 3)), ((1,) * 5, (4, 1))]
)
def test_hidden_states_are_restored_into_batches_of_another_size(before, now):
    whole = torch.arange(5.0).view(5, 1, 1)
    batches = [Batch(torch.zeros(size, 1, 1), []) for size in now]
    restore_hidden(batches, whole.split(before))
    assert torch.equal(torch.cat([batch.hidden for batch in batches]), whole)
    assert [len(batch.hidden) for batch in batches] == list(now)
