"""Runs that retrain their pruned model: the record, what became of the masks, kills, sweeps, what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from family_configs import OWN, SHAPE
from safetensors.torch import load_file
from support import (
    CONF,
    HIDDEN,
    FixedMemory,
    Killed,
    Phases,
    contains,
    environment,
    run_with,
    save_tiny,
    settings_of,
    without,
)
from transformers import AutoConfig

import dass_exp
from dass_exp.engine.callbacks import Callback, SeedEachBlock
from dass_exp.engine.prune import EngineOptions, prune_model
from dass_exp.errors import UserError
from dass_exp.masks import NM
from dass_exp.methods.base import ScorePruner
from dass_exp.models.decoder import decoder_of
from dass_exp.report.console import sizes_line
from dass_exp.retrain import train
from dass_exp.retrain.relevance import mask_overlap
from dass_exp.runs.context import ModelCache, RunContext
from dass_exp.runs.plan import plan
from dass_exp.runs.resolve import resolve

pytestmark = pytest.mark.usefixtures("short_texts")
SHORT = ["retrain.steps=6", "retrain.seq_len=32", "retrain.batch_size=2", "eval=ppl_mini"]
WINDOWS = ["eval.perplexity.context=32", "eval.perplexity.max_windows=4"]
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml") if path.stem != "dense")


@pytest.fixture(name="retrained")
def retrained_fixture(cell):
    """The overrides of a run that retrains."""
    return [*cell, *SHORT, *WINDOWS, "method=wanda", "retrain=lora"]


@pytest.fixture(name="untrained")
def untrained_fixture(retrained):
    """The overrides of the same run without retraining."""
    return [override for override in retrained if not override.startswith("retrain")]


def of(record):
    return record["metrics"]["retrain"]


@pytest.mark.thorough
def test_the_record_holds_the_course_and_what_became_of_the_masks(retrained, untrained):
    record = run_with(*retrained, "retrain.curve=[2,4]").record
    course, final = of(record), record["metrics"]["perplexity"]["wikipedia_mini"]
    assert [entry["step"] for entry in course["curve"]] == [0, 2, 4, 6]
    assert course["curve"][-1]["perplexity"]["wikipedia_mini"] == final
    pruned = run_with(*untrained).record
    assert course["curve"][0]["perplexity"] == pruned["metrics"]["perplexity"]
    assert course["curve"][0]["kl"]["wikipedia_mini"] == pruned["metrics"]["divergence"]["wikipedia_mini"]["kl"]
    assert set(course["mask_overlap"]) == {"gate", "up", "down"}
    assert all(0.5 < overlap < 1 for overlap in course["mask_overlap"].values())
    assert ["mask_overlap" in entry for entry in course["curve"]] == [False, True, True, True]
    assert course["curve"][-1]["mask_overlap"] == course["mask_overlap"] != course["curve"][1]["mask_overlap"]
    assert len(course["activation_rank_correlation"]) == 2
    assert record["cost"]["retrain_s"] > 0 and record["sparsity"]["scope"] == pruned["sparsity"]["scope"]
    assert record["config"]["retrain"]["name"] == "lora" and record["config"]["seed"] == 0


@pytest.mark.thorough
def test_the_share_of_the_gap_that_was_closed(retrained, untrained):
    course = of(run_with(*retrained, "retrain=full", "retrain.lr=1e-3").record)
    dense = run_with(*untrained).dense["metrics"]["window_nll"]["wikipedia_mini"]
    first, last = (
        torch.tensor(entry["perplexity"]["wikipedia_mini"]).double().log()
        for entry in (course["curve"][0], course["curve"][-1])
    )
    expected = (first - last) / (first - torch.tensor(dense).double().mean())
    assert course["gap_closed"]["wikipedia_mini"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_without_a_step_the_same_method_chooses_the_same_masks(retrained, method):
    stages = ["permute=neurons", "repair=least_squares"]
    course = of(
        run_with(*retrained, f"method={method}", *stages, "retrain.steps=0", "calibration.num_samples=4").record
    )
    assert set(course["mask_overlap"].values()) == {1.0}
    assert course["activation_rank_correlation"] == [pytest.approx(1.0)] * 2
    assert [entry["step"] for entry in course["curve"]] == [0]


@pytest.mark.thorough
def test_the_dense_model_is_trained_by_a_pattern_that_removes_nothing(retrained, untrained):
    with pytest.raises(UserError) as refusal:
        run_with(*retrained, "method=dense")
    assert contains(str(refusal.value), ["retrain=lora", "method=dense", "pattern.sparsity=0"])
    everything = ["method=magnitude", "pattern=unstructured", "pattern.sparsity=0"]
    record = run_with(*retrained, *everything).record
    assert record["sparsity"]["scope"] == 0 and set(of(record)["mask_overlap"].values()) == {1.0}
    dense = run_with(*untrained, "method=dense").record["metrics"]["perplexity"]
    assert of(record)["curve"][0]["perplexity"]["wikipedia_mini"] == pytest.approx(dense["wikipedia_mini"], rel=1e-6)
    assert record["metrics"]["perplexity"] != dense


@pytest.mark.thorough
def test_the_saved_model_is_the_retrained_one(retrained, untrained, tmp_path):
    record = run_with(*retrained, "retrain=norms", f"save={tmp_path}/saved").record
    model, _ = dass_exp.load(str(tmp_path / "saved"))
    masks = dass_exp.load_masks(tmp_path / "saved" / "masks.safetensors")
    assert all(bool((model.get_submodule(name).weight[~keep] == 0).all()) for name, keep in masks.items())
    again = run_with(*untrained, "method=dense", f"model.path={tmp_path}/saved").record
    assert again["metrics"]["perplexity"] == record["metrics"]["perplexity"]
    assert again["sparsity"]["zero_weights"] == pytest.approx(record["sparsity"]["decoder"], abs=1e-3)
    shown = f"{100 * again['sparsity']['zero_weights']:.1f} % of the linears of all blocks, as the model was loaded"
    assert shown in sizes_line(again)
    manifest = json.loads((tmp_path / "saved" / "dass_exp.json").read_text())
    assert manifest["config"]["retrain"]["name"] == "norms"


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["full", "lora", "norms"])
def test_a_killed_run_continues_to_the_same_record(retrained, tmp_path, monkeypatch, caplog, kind):
    monkeypatch.setattr(train, "SAVED_EVERY", 0.0)
    own = [*retrained, f"retrain={kind}", "retrain.curve=[2]"]
    whole = run_with(*own, f"results_dir={tmp_path}/whole", f"save={tmp_path}/first").record

    class Kills(Phases):
        def phase(self, name, steps=None):
            if not name.startswith("retraining"):
                return super().phase(name, steps)
            remaining = iter(range(4))
            super().phase(name, steps)

            def advance():
                if next(remaining, None) is None:
                    raise Killed

            return nullcontext(advance)

    with pytest.raises(Killed):
        run_with(*own, f"save={tmp_path}/second", context=RunContext(Kills()))
    with caplog.at_level("INFO"):
        record = run_with(*own, f"save={tmp_path}/second").record
    assert "continuing after step 4 of an interrupted training" in caplog.text
    assert record["key"] == whole["key"]
    assert without_seconds(of(record)) == without_seconds(of(whole))
    assert record["metrics"]["window_nll"] == whole["metrics"]["window_nll"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert {path.name for path in tmp_path.iterdir()} - {".first.lock", ".second.lock"} >= {"first", "second"}
    assert not list(tmp_path.rglob("checkpoint-*"))


_KILLED = """
import os, signal, sys
from dass_exp.data.texts import OfflineText
from dass_exp.retrain import train

documents, step = OfflineText.documents, train._Course.on_step_end
OfflineText.documents = lambda text: documents(text)[:20]
train.SAVED_EVERY = 0.0

def on_step_end(course, args, state, control, **more):
    step(course, args, state, control, **more)
    if str(state.global_step) == os.environ.get("KILLED_IN"):
        os.kill(os.getpid(), signal.SIGKILL)

train._Course.on_step_end = on_step_end
from dass_exp.__main__ import main
main()
"""


@pytest.mark.thorough
def test_a_process_that_is_killed_in_training_loses_nothing(retrained, tmp_path):
    def start(results, **changes):
        call = [sys.executable, "-c", _KILLED, *without(retrained, "results_dir"), f"results_dir={tmp_path}/{results}"]
        return subprocess.run(call, cwd=tmp_path, env=environment(**changes), capture_output=True, check=False)

    assert start("killed", KILLED_IN="3").returncode == start("killed", KILLED_IN="5").returncode == -signal.SIGKILL
    done, whole = start("killed"), start("whole")
    assert done.returncode == whole.returncode == 0, done.stderr
    assert b"continuing after step 4 of an interrupted training" in done.stderr
    killed, clean = (
        json.loads(path.read_text())
        for name in ("killed", "whole")
        for path in (tmp_path / name / "runs").glob("*/result.json")
        if json.loads(path.read_text())["config"]["pattern"]
    )
    assert killed["key"] == clean["key"] and killed["metrics"]["window_nll"] == clean["metrics"]["window_nll"]
    assert without_seconds(of(killed)) == without_seconds(of(clean))


@pytest.mark.thorough
def test_zeros_are_counted_again_after_training(retrained, tiny, tmp_path):
    model, tokenizer = dass_exp.load(str(tiny))
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[:, :8] = 0  # two zeros of each group of four are kept
    dass_exp.save(model, tokenizer, tmp_path / "zeros")
    own = [*retrained, f"model.path={tmp_path}/zeros", "method=magnitude", "pattern=nm", "pattern.n=3", "pattern.m=4"]
    before, after = (
        run_with(*own, "retrain=full", f"retrain.steps={steps}").record["sparsity"]["layers"][0] for steps in (0, 2)
    )
    assert before["name"].endswith("gate_proj") and before["excess"] > 0 and before["underfull"] > 0
    assert (after["excess"], after["underfull"]) == (0, 0) and after["zeros"] == before["zeros"]


def without_seconds(course):
    return {name: value for name, value in course.items() if name != "seconds"}


@pytest.mark.thorough
def test_cells_of_a_sweep_share_a_model_that_is_dense_again(retrained, untrained):
    cells = [[*retrained, f"retrain={kind}"] for kind in ("full", "norms", "lora")]
    cells.append(untrained)
    context = RunContext(shared=ModelCache())
    shared = [run_with(*each, context=context).record["metrics"]["window_nll"] for each in cells]
    shutil.rmtree(settings_of(*retrained).results_dir)
    assert shared == [run_with(*each).record["metrics"]["window_nll"] for each in cells[::-1]][::-1]


@pytest.mark.thorough
def test_other_settings_are_other_keys_and_none_is_the_key_without(retrained, untrained):
    changes = ["", "retrain.steps=7", "retrain.lr=0.5", "retrain.loss=kl", "seed=1"]
    changes += [
        "retrain.rank=2",
        "retrain.curve=[1]",
        "retrain.text={_target_: dass_exp.data.texts.OfflineText, asset: c4, part: odd}",
    ]
    cells = [[*retrained, *filter(None, [change])] for change in changes]
    keys = [resolve(settings_of(*each), RunContext()).key for each in (*cells, untrained)]
    assert len(set(keys)) == len(keys)
    assert keys[-1] == resolve(settings_of(*untrained, "retrain=none"), RunContext()).key


def test_a_streamed_model_is_refused_before_anything_is_loaded(retrained):
    phases = Phases()
    with pytest.raises(UserError) as refusal:
        run_with(*retrained, "model.placement=stream", context=RunContext(phases))
    assert contains(str(refusal.value), ["retrain=lora", "block by block", "trained as a whole", "GB", "retrain=none"])
    assert phases.count("loading") == [0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("retrain.seq_len=4097", ["retrain.seq_len=4097", "4096 positions"]),
        ("retrain.text={_target_: dass_exp.data.texts.OfflineText, asset: wrong}", ["text.asset='wrong'"]),
        ("retrain.steps=1.5", ["retrain.steps=1.5"]),
        ("retrain.rate=1", ["rate"]),
    ],
)
def test_what_cannot_be_trained_is_refused(retrained, change, words):
    with pytest.raises(Exception) as refusal:
        run_with(*retrained, *([f"+{change}"] if "rate" in change else [change]))
    assert contains(str(refusal.value), words), refusal.value


@pytest.mark.thorough
def test_a_plan_counts_the_memory_of_training(retrained, untrained):
    cells = untrained, [*retrained, "retrain=norms"], [*retrained, "retrain=full"]
    needs = [plan(settings_of(*each)).needs for each in cells]
    assert [", training " in each for each in needs] == [False, True, True]
    run = resolve(settings_of(*retrained), RunContext())
    assert run.needs.training > 0
    other = resolve(settings_of(*retrained, "retrain.loss=kl"), RunContext()).needs
    width = run.spec.dtype.itemsize * 6 * 2 * 32  # of 6 steps x 2 windows x 32 tokens
    assert other.before - run.needs.before == width * HIDDEN
    assert other.resident - run.needs.resident == other.before - run.needs.before
    again = resolve(settings_of(*retrained, "retrain.curve=[2]"), RunContext()).needs
    copies = 3 * run.needs.before  # weights pruned, trained and moved, beside the dense ones
    assert again.training == run.needs.training + again.activations + again.solver + again.batch + copies
    with pytest.raises(UserError, match="training"):
        resolve(settings_of(*retrained, "model.placement=resident"), FixedMemory(run.needs.resident - 1))


@pytest.mark.thorough
def test_a_plan_counts_the_time_of_training(retrained):
    record = run_with(*retrained).record
    own = [*retrained, "retrain.lr=0.002"]
    short, long = (plan(settings_of(*own, f"retrain.steps={steps}")).seconds for steps in (6, 60))
    assert long - short == pytest.approx(9 * record["cost"]["retrain_s"])
    assert plan(settings_of(*own, "retrain=norms")).seconds is None


@pytest.mark.thorough
def test_experts_that_the_probe_does_not_reach_stop_nothing(retrained, tmp_path):
    changes = {"vocab_size": 512, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model("mixtral", **{**SHAPE, **OWN["mixtral"], **changes, "pad_token_id": 2})
    folder = save_tiny(tmp_path / "experts", config)
    own = [*without(retrained, "model.path"), f"model.path={folder}", "experts.starved=raise", "experts.min_tokens=10"]
    record = run_with(*own, "calibration.num_samples=16", "calibration.seq_len=64").record
    assert of(record)["mask_overlap"]


def test_masks_that_are_drawn_at_random_are_drawn_again(tiny_model, tokens):
    class Drawn(ScorePruner):
        def score(self, linear, block):
            return torch.rand_like(linear.weight)

    model, how = tiny_model("llama"), (Drawn(), NM(2, 4), EngineOptions(scope="mlp"), tokens)
    decoder = decoder_of(model)
    dense = {site.name: site.matrix.weight.clone() for index in range(2) for site in decoder.sites(index, "mlp")}
    kept: dict[str, torch.Tensor] = {}

    class Keeps(Callback):
        def on_block_end(self, report):
            kept.update({name: result.keep for name, result in report.results.items()})

    prune_model(model, tokens, *how[:3], [SeedEachBlock(3), Keeps()])
    for seed, equal in ((3, True), (4, False)):
        overlap = mask_overlap(model, dense, decoder, how, kept.__getitem__, seed)
        assert (set(overlap.values()) == {1.0}) is equal
