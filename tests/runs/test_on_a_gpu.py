"""Whole runs on a pretended GPU: loading, pruning, scoring, streaming and the record give what the CPU gives."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from pandas import json_normalize
from pandas.testing import assert_frame_equal
from support import run_with, settings_of, tiny_overrides

from dass_exp.errors import UserError
from dass_exp.runs.plan import plan

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


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_retraining_stays_on_its_card(kind, tiny, tmp_path, accelerator, monkeypatch):
    """transformers' Trainer would take the first of the two, and copies of the model on both."""
    steps = [f"retrain={kind}", "retrain.steps=3", "retrain.batch_size=2", "retrain.seq_len=16", "retrain.loss=kl"]
    # Adam makes whole steps of gradients that differ by rounding: both take the same attention
    real = transformers.AutoModelForCausalLM.from_pretrained
    eager = functools.partial(real, attn_implementation="eager")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", eager)
    cpu = run_with(*tiny_overrides(tiny, tmp_path / "cpu"), *steps, "model.device=cpu").record["metrics"]["retrain"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = run_with(*tiny_overrides(tiny, tmp_path / "gpu"), *steps, "model.device=cuda:1").record
    assert gpu["environment"]["gpu_index"] == 1
    assert torch.cuda.current_device() == 0
    found, expected = (json_normalize(course["curve"]) for course in (gpu["metrics"]["retrain"], cpu))
    assert_frame_equal(found, expected, rtol=1e-6)


def test_the_time_of_a_plan_is_that_of_its_own_kind_of_device(tiny, tmp_path, accelerator):
    settings = tiny_overrides(tiny, tmp_path)
    run_with(*settings, "model.device=cpu")
    of_cpu, of_gpu = (plan(settings_of(*settings, f"model.device={device}", "seed=1")) for device in ("cpu", "cuda"))
    assert of_cpu.seconds is not None and of_gpu.seconds is None
