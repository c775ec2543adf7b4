"""The benchmark: its floor is what it says, it leaves the model dense, and its table says where a target is missed."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
import transformers
from support import tiny_overrides

from dass_exp.api import method_of
from dass_exp.benchmark import __main__ as command
from dass_exp.benchmark import large, measure, scale, scoring, sweep, table
from dass_exp.benchmark.floor import passes
from dass_exp.benchmark.measure import Workload
from dass_exp.benchmark.picture import draw
from dass_exp.models.decoder import decoder_of
from dass_exp.paths import project_root

METHODS = ("dass", "wanda", "sparsegpt", "magnitude")


def counted(module):
    calls, inner = [], module.forward
    module.forward = lambda *args, **kwargs: calls.append(None) or inner(*args, **kwargs)
    return calls


@pytest.mark.parametrize(("scope", "attention"), [("mlp", [2, 1]), ("attention", [3, 1]), ("all", [3, 1])])
def test_the_floor_is_two_passes_but_for_what_need_not_run_again(scope, attention, tiny_model, tokens):
    """The first block runs once more while its return type is looked up."""
    model = tiny_model("llama")
    state = copy.deepcopy(model.state_dict())
    blocks = model.model.layers
    mixing, mlps = [counted(block.self_attn) for block in blocks], [counted(block.mlp) for block in blocks]
    passes(model, tokens, scope, len(tokens))
    assert [len(calls) for calls in mixing] == attention
    assert [len(calls) for calls in mlps] == [3, 1]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_method_passes_no_more_often_than_its_floor(tiny_model, tokens):
    for scope in ("mlp", "attention", "all"):
        counts = []
        for run in (
            lambda work: passes(work.model, work.tokens, work.scope, work.batch_size),
            lambda work: measure.prune_seconds(work, method_of("dass")),
        ):
            model = tiny_model("llama")
            calls = [counted(part) for block in model.model.layers for part in (block.self_attn, block.mlp)]
            run(Workload(model, tokens, scope=scope, batch_size=2))
            counts.append([len(found) for found in calls])
        assert counts[0] == counts[1]


def test_rounds_name_every_part_and_leave_the_model_dense(tiny_model, tokens):
    model = tiny_model("llama")
    state, told = copy.deepcopy(model.state_dict()), []
    found = measure.rounds(Workload(model, tokens), [method_of(name) for name in METHODS], 2, told.append)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(found["ratios_to_floor"]) == list(found["methods"]) == list(METHODS)
    assert len(found["floor_s"]["runs"]) == 2
    assert len(told) == 2 * (1 + len(METHODS))
    for name, spent in found["methods"].items():
        assert spent["total"] > 0
        assert len(spent["runs"]) == 2
        assert (spent["forward"] > 0) == (spent["statistics"] > 0) == (name != "magnitude")
        assert min(spent[part] for part in ("solve", "write", "verify")) > 0
        assert spent["peak_rss_bytes"] > 1e6


def test_the_parts_of_a_run_add_up(tiny_model, tokens):
    spent = measure.prune_seconds(Workload(tiny_model("llama"), tokens), method_of("sparsegpt"))
    assert sum(spent[part] for part in table.PARTS) == pytest.approx(spent["total"])


def test_seconds_are_those_of_the_task(monkeypatch):
    clock = itertools.count(10.0, 2.5)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert measure.seconds(lambda: None) == 2.5


def test_scoring_is_timed_over_the_tokens_that_it_scores(tiny, monkeypatch):
    model, tokenizer = (
        transformers.AutoModelForCausalLM.from_pretrained(tiny).eval(),
        transformers.AutoTokenizer.from_pretrained(tiny),
    )
    found = scoring.perplexity_ratio(model, torch.randint(0, 512, (4, 16)), 2, 1)
    assert found["tokens"] == 64
    assert found["tokens_per_second"] == pytest.approx(64 / found["seconds"])
    found = scoring.zero_shot_ratio(model, tokenizer, ["piqa"], 3, 1)
    assert found["tokens"] > 6 * 5
    assert found["ratio"] == pytest.approx(found["seconds"] / found["plain_s"])
    assert not model.base_model._forward_pre_hooks


def test_a_sweep_is_compared_with_the_floors_of_its_records(tiny, tmp_path):
    told = []
    overrides = [part for part in tiny_overrides(tiny, tmp_path) if not part.startswith(("results_dir", "tracker"))]
    found = sweep.sweep_ratio(overrides, 2.0, 0.5, told.append)
    assert (found["cells"], found["records"], len(told)) == (15, 13, 15)
    assert found["floors_s"] == pytest.approx(13 * 0.5 + 9 * 2.0)
    assert found["ratio"] == pytest.approx(found["seconds"] / found["floors_s"])
    assert not tmp_path.joinpath("results").exists()


@pytest.fixture
def found(tiny_model, tokens):
    """As the command gathers it, on a tiny model."""
    made = measure.rounds(
        Workload(tiny_model("llama"), tokens), [method_of(name) for name in METHODS], 1, lambda line: None
    )
    scored = {"tokens": 100, "plain_s": 1.0, "seconds": 1.05, "ratio": 1.05, "tokens_per_second": 95.2}
    return {
        "created": "2026-01-02T00:00:00+00:00",
        "machine": command.environment(),
        **made,
        "masks": {"mask_s": 0.1, "passes_s": 9.9, "share": 0.01},
        "settings": {
            "model": "tiny",
            "samples": 5,
            "length": 12,
            "scope": "mlp",
            "pattern": "2:4",
            "batch_size": 4,
            "dtype": "float32",
            "repeats": 1,
        },
        "growth": [{"samples": 4, "length": 512, "blocks": 2, "floor_s": 1.0, "dass_s": 1.1, "ratio": 1.1}],
        "perplexity": scored,
        "zero_shot": {**scored, "ratio": 1.6},
        "sweep": {"cells": 15, "records": 13, "seconds": 30.0, "floors_s": 28.0, "ratio": 30 / 28},
    }


def test_the_table_says_which_target_is_missed(found):
    found["ratios_to_floor"] = {"dass": 1.05, "wanda": 1.10, "sparsegpt": 1.81, "magnitude": 0.03}
    shown = {
        line.split(" | ")[0].lstrip("| "): line
        for line in table.markdown(found).splitlines()
        if "at most" in line or "none" in line
    }
    missed = {name for name, line in shown.items() if "**no**" in line}
    assert {"sparsegpt", "zero-shot"} <= missed
    assert not {"dass", "wanda", "sweep", "perplexity"} & missed
    assert "1.810 of the floor | at most 1.8 | **no**" in shown["sparsegpt"]
    assert "0.030 of the floor | none |" in shown["magnitude"]


def test_the_picture_is_drawn(found, tmp_path):
    svg, png = draw(found, tmp_path)
    assert {"floor", *METHODS} <= set(svg.read_text().replace("<", ">").split(">"))
    assert png.stat().st_size > 5000


def test_the_command_writes_what_it_measured(found, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "measure", lambda repeats: found)
    monkeypatch.setattr(command.torch, "set_num_threads", lambda threads: None)
    assert command.main(["--output", str(tmp_path / "bench")]) == 0
    written = tmp_path / "bench" / "2026-01-02.json"
    assert json.loads(written.read_text())["ratios_to_floor"] == found["ratios_to_floor"]
    assert written.with_suffix(".md").read_text() in capsys.readouterr().out
    assert (tmp_path / "bench" / "speed.svg").is_file()


# --- large models


def test_large_models_are_counted_by_hand(tiny_model):
    decoder = decoder_of(tiny_model("llama", num_hidden_layers=1))
    config = decoder.config
    hidden, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    mlp, mixing = 3 * hidden * inner, 2 * hidden * config.num_attention_heads * config.head_dim + 2 * hidden * kv
    tokens, scored = 128 * 2048, 166 * 2048
    once = 2 * (mlp + mixing) + 4 * 2048 * config.num_attention_heads * config.head_dim
    assert large.passes(decoder, 100) == tokens * (once + 2 * mlp) + 2 * scored * once + 2 * scored * 2 * hidden * 100
    grams = tokens * (hidden**2 + inner**2) + hidden**3 / 3 + inner**3 / 3
    assert large.solved(decoder) == pytest.approx(grams + 2 * inner * hidden**2 + hidden * inner**2)


def test_the_docs_show_what_the_code_prints():
    assert large.table() in (project_root() / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_shapes_are_those_of_the_published_models():
    sizes = {
        "LLaMA2-7B": 6.74e9,
        "LLaMA2-13B": 13.02e9,
        "LLaMA2-70B": 68.98e9,
        "Llama-3.1-405B": 405.85e9,
    }  # parameters, as the hub counts them
    for shape in large.MODELS:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(shape.config)
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(sizes[shape.name], rel=1e-3)


@pytest.mark.slow
def test_the_peak_of_a_streamed_run_does_not_grow_with_its_depth(tmp_path):
    peaks = []
    for depth in (4, 24):
        shape = scale.Shape(str(depth), 1024, 2816, depth, 16)
        folder = scale.make(shape, tmp_path / str(depth))
        peaks.append(
            min(scale.measure(folder, "dass", tmp_path / f"{depth}-{time}", 4, 128)["peak_bytes"] for time in range(2))
        )
        assert peaks[-1] < scale.planned(shape.config, "dass").streamed
        assert len(list(folder.glob("model-*.safetensors"))) == depth + 1
    assert (
        peaks[1] - peaks[0] < 120e6
    )  # of 20 blocks more, of which 13 MB each were kept before freed memory was given back
