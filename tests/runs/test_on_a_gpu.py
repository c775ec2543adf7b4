"""Whole runs on a pretended GPU: loading, pruning, scoring, streaming and the record give what the CPU gives."""

from __future__ import annotations

import pytest
from pandas import json_normalize
from pandas.testing import assert_frame_equal
from support import run_with, tiny_overrides

from dass_exp.errors import UserError

SCORES = ("perplexity", "window_nll", "divergence", "window_kl", "generation", "tasks")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        ["eval=[ppl_mini,generation_mini]", "eval.generation.prompts=2", "eval.generation.tokens=4"],
        ["method=sparsegpt", "calibration.cache=cpu", "eval.cache=disk"],
        ["model.placement=stream"],
        ["permute=neurons", "repair=block", "repair.epochs=1"],
        ["eval=mini", "eval.zeroshot.limit=2", "eval.zeroshot.tasks=[piqa]"],
    ],
    ids=" ".join,
)
def test_a_run_gives_what_the_cpu_gives(settings, tiny, tmp_path, accelerator):
    records = {}
    for device in ("cpu", "cuda"):
        overrides = [*tiny_overrides(tiny, tmp_path / device), *settings, f"model.device={device}"]
        records[device] = run_with(*overrides).record
    cpu, gpu = (records[device]["metrics"] for device in ("cpu", "cuda"))
    assert cpu.keys() == gpu.keys()
    found, expected = (json_normalize([device]).filter(regex="|".join(SCORES)) for device in (gpu, cpu))
    exact = "method=sparsegpt" not in settings  # which solves by other products there
    assert_frame_equal(found, expected, check_exact=exact, rtol=1e-5)
    assert records["cuda"]["identity"]["device"] == "cuda"
    assert records["cuda"]["environment"]["gpu"] == "Pretended GPU"
    assert records["cpu"]["environment"]["gpu"] is None
    assert records["cpu"]["key"] != records["cuda"]["key"]


@pytest.mark.thorough
def test_a_second_card_is_a_device(tiny, tmp_path, accelerator):
    record = run_with(*tiny_overrides(tiny, tmp_path), "model.device=cuda:1").record
    assert record["metrics"]["perplexity"]
    with pytest.raises(UserError, match=r"model\.device='cuda:2': this machine has"):
        run_with(*tiny_overrides(tiny, tmp_path), "model.device=cuda:2")
