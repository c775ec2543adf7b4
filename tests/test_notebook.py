"""The Python interface: what there is, that it gives the numbers of the command, and that records come back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support import contains, environment, run_with

import dass_exp
from dass_exp.errors import UserError
from dass_exp.methods.base import ScorePruner
from dass_exp.statistics import InputNorm

pytestmark = pytest.mark.usefixtures("short_texts")


def test_what_there_is_can_be_listed_before_anything_is_imported():
    code = "import sys, dass_exp; print(*dir(dass_exp)); sys.exit('torch' in sys.modules)"
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(dass_exp.__all__) <= set(done.stdout.split())
    assert all(getattr(dass_exp, name).__doc__ for name in dass_exp.__all__)


@pytest.mark.thorough
def test_threads_wait_without_spinning_as_in_the_command():
    code = "import os, dass_exp; dass_exp.prune; print(os.environ['OMP_WAIT_POLICY'])"
    env = {name: value for name, value in environment().items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "PASSIVE"


@pytest.mark.thorough
def test_a_run_from_python_is_the_run_of_the_command(cell):
    record = dass_exp.run(*cell, "method=wanda", "name=mine", "tags=[first]", "notes=a sentence")
    assert (record["name"], record["tags"], record["notes"]) == ("mine", ["first"], "a sentence")
    found = run_with(*cell, "method=wanda")
    assert found.found and found.record["key"] == record["key"]
    with pytest.raises(UserError) as refusal:
        dass_exp.run("method=nothing")
    assert contains(str(refusal.value), ["method/nothing", "dass"])


@pytest.mark.thorough
def test_evaluating_in_memory_gives_the_numbers_of_a_run(tiny):
    model, tokenizer = dass_exp.load(str(tiny))
    evaluation = "[ppl_mini,generation_mini]"
    dense = dass_exp.dense_states(model, tokenizer, evaluation)
    tokens = dass_exp.calibration_tokens(tokenizer, 4, 32)
    pruned = dass_exp.prune(model, tokens, "wanda")
    scores = dass_exp.evaluate(model, tokenizer, evaluation, dense)
    record = dass_exp.run(
        f"model.path={tiny}",
        "model.name=tiny",
        "method=wanda",
        "calibration.num_samples=4",
        "calibration.seq_len=32",
        f"eval={evaluation}",
        "tracker=none",
        f"results_dir={tiny}-results",
    )
    metrics = record["metrics"]
    assert scores["perplexity/wikipedia_mini"] == pytest.approx(metrics["perplexity"]["wikipedia_mini"], rel=1e-6)
    assert scores["kl/wikipedia_mini"] == pytest.approx(metrics["divergence"]["wikipedia_mini"]["kl"], rel=1e-5)
    assert {name: scores[f"generation/{name}"] for name in ("equal", "distinct_4")} == {
        name: metrics["generation"][name] for name in ("equal", "distinct_4")
    }
    assert repr(pruned) == "<Pruned: 6 linears, 50.0 % zeros>"


@pytest.mark.thorough
def test_tasks_are_scored_too(tiny, cell):
    model, tokenizer = dass_exp.load(str(tiny))
    scores = dass_exp.evaluate(model, tokenizer, "zeroshot_mini")
    own = [override for override in cell if not override.startswith("eval")]
    record = dass_exp.run(*own, "method=dense", "eval=zeroshot_mini")
    assert scores["mean_acc"] == record["metrics"]["mean_acc"]
    assert scores["piqa/acc_norm"] == record["metrics"]["tasks"]["piqa"]["acc_norm"]


def test_a_saved_model_comes_back_with_its_masks_and_a_card(tiny, tmp_path):
    model, tokenizer = dass_exp.load(str(tiny))
    pruned = dass_exp.prune(model, None, "magnitude", 0.5)
    folder = dass_exp.save(model, tokenizer, tmp_path / "saved", pruned)
    again, _ = dass_exp.load(str(folder))
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    masks = dass_exp.load_masks(folder / "masks.safetensors")
    assert masks.keys() == pruned.masks.keys() and all(torch.equal(masks[name], pruned.masks[name]) for name in masks)
    card = (folder / "README.md").read_text()
    words = "library_name:", "50.0 % of the weights", "masks.safetensors", "from_pretrained"
    assert [word for word in words if word not in card] == []
    assert dass_exp.save(model, tokenizer, folder, pruned) == folder  # the same model
    other = dass_exp.prune(model, None, "magnitude", "1:4")
    with pytest.raises(UserError, match="saved"):
        dass_exp.save(model, tokenizer, folder, other)


class Largest(ScorePruner):
    """A method of a notebook."""

    stat = InputNorm

    def score(self, linear, block):
        return linear.weight.abs() * linear.stat.norm


def test_a_class_is_a_method_and_a_number_a_pattern(tiny):
    masks = []
    for method in (Largest, Largest(), "wanda"):
        model, tokenizer = dass_exp.load(str(tiny))
        tokens = dass_exp.calibration_tokens(tokenizer, 4, 32)
        masks.append(dass_exp.prune(model, tokens, method, 0.5).masks)
    assert all(torch.equal(masks[0][name], other[name]) for other in masks[1:] for name in masks[0])
    with pytest.raises(UserError, match="expected a subclass of dass_exp"):
        dass_exp.prune(model, tokens, int)


@pytest.mark.thorough
def test_records_come_back_as_a_frame(cell, results):
    for method in ("wanda", "dass"):
        run_with(*cell, f"method={method}", "eval=ppl_mini", f"tags=[{method},both]")
    frame = dass_exp.records(results)
    assert set(frame.method) == {"dense", "wanda", "dass"} and frame.perplexity.notna().all()
    assert frame.set_index("method").loc["dass", "method.alpha"] == 0.5
    assert frame["calibration.num_samples"].max() == 4
    assert list(dass_exp.records(results, "tag=both", "method=dass").method) == ["dass"]
    assert list(dass_exp.records(results, "calibration.num_samples=4").method) == ["wanda", "dass"]
    with pytest.raises(UserError, match="expected FIELD=VALUE"):
        dass_exp.records(results, "dass")
    with pytest.raises(UserError, match="no record has nothing"):
        dass_exp.records(results, "nothing=1")


@pytest.mark.thorough
def test_records_are_compared(cell):
    records = [dass_exp.run(*cell, f"method={method}", "eval=ppl_mini") for method in ("wanda", "magnitude")]
    frame = dass_exp.compare(*records)
    assert set(frame.method) == {"wanda", "magnitude"} and "perplexity" in frame


def test_what_python_is_given_wrongly_is_one_line(cell, tmp_path):
    with pytest.raises(UserError, match=r"plan=true: run\(\) returns a record"):
        dass_exp.run(*cell, "plan=true")
    with pytest.raises(UserError, match="expected overrides as texts"):
        dass_exp.run([*cell])
    with pytest.raises(UserError, match="pattern=2_4: Hydra reads 2_4 as a number"):
        dass_exp.run(*cell, "pattern=2_4")
    with pytest.raises(UserError, match="expected records, as run"):
        dass_exp.compare("6d4b", "ca27")
    assert not list(tmp_path.glob("results/runs/*/result.json"))


def test_a_found_record_says_that_it_keeps_its_name(cell, caplog):
    labels = ["name=first", "tags=[a,b]"]
    dass_exp.run(*cell, *labels, "method=magnitude")
    dass_exp.run(*cell, *labels, "method=magnitude")
    assert "keeps its own name" not in caplog.text
    record = dass_exp.run(*cell, "name=second", "method=magnitude")
    assert record["name"] == "first" and "keeps its own name" in caplog.text
