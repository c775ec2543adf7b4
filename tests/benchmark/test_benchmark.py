"""The benchmark: its floor is what it claims, it leaves the model dense, and its page says which target is missed."""

import copy
import functools
import json
import time

import pytest
import torch
import transformers
from support import ROOT, tiny_overrides

from dass_exp.api import method_of
from dass_exp.benchmark import __main__ as command
from dass_exp.benchmark import large, measure, report, scale, scoring, sweep
from dass_exp.benchmark.measure import PruningJob
from dass_exp.models.decoder import decoder_of

COMMITTED = max((ROOT / "results" / "bench").glob("20*.json"))
METHODS = ("dass", "wanda", "sparsegpt", "magnitude")


@pytest.fixture
def measured():
    """What the command measured when the committed page was made."""
    return json.loads(COMMITTED.read_text(encoding="utf-8"))


def count_calls(module):
    calls, forward = [], module.forward
    module.forward = lambda *args, **kwargs: calls.append(None) or forward(*args, **kwargs)
    return calls


@pytest.mark.parametrize(("scope", "attention"), [("mlp", [2, 1]), ("attention", [3, 1]), ("all", [3, 1])])
def test_the_floor_and_a_method_make_the_same_passes(scope, attention, tiny_model, tokens):
    """The first block runs once more, for its return type; the last block and, with scope mlp, attention once less."""
    job = functools.partial(PruningJob, tokens=tokens, scope=scope, batch_size=len(tokens))
    for run in (measure.time_floor, lambda job: measure.time_pruning(job, method_of("dass"))):
        model = tiny_model("llama")
        state = copy.deepcopy(model.state_dict())
        calls = [[count_calls(block.self_attn), count_calls(block.mlp)] for block in model.model.layers]
        run(job(model))
        assert [[len(counted) for counted in block] for block in calls] == [[attention[0], 3], [attention[1], 1]]
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_comparison_has_every_method_and_part_and_leaves_the_model_dense(tiny_model, tokens):
    model, lines = tiny_model("llama"), []
    state = copy.deepcopy(model.state_dict())
    methods = [method_of(name) for name in METHODS]
    compared = measure.compare_methods(PruningJob(model, tokens), methods, 2, lines.append)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(compared["ratios_to_floor"]) == list(compared["methods"]) == list(METHODS)
    assert len(compared["floor_s"]["runs"]) == 2
    assert len(lines) == 2 * (1 + len(METHODS))
    for name, seconds in compared["methods"].items():
        assert len(seconds["runs"]) == 2
        assert (seconds["statistics"] > 0) == (name != "magnitude")
        assert min(seconds[part] for part in ("total", "solve", "write", "verify")) > 0
        assert seconds["peak_rss_bytes"] > 1e6
    assert compared["methods"]["magnitude"]["forward"] < compared["methods"]["dass"]["total"]  # it runs no block


def test_the_parts_of_a_run_add_up(tiny_model, tokens):
    seconds = measure.time_pruning(PruningJob(tiny_model("llama"), tokens), method_of("sparsegpt"))
    assert sum(seconds[part] for part in measure.PARTS) == pytest.approx(seconds["total"])


def test_the_time_of_a_call_is_measured():
    assert 0.02 < measure.time_call(lambda: time.sleep(0.02)) < 2


@pytest.mark.thorough
def test_scoring_is_timed_over_the_tokens_that_it_scores(tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    scored = scoring.perplexity_ratio(model, torch.randint(0, 512, (4, 16)), 2, 1)
    assert scored["tokens"] == 64
    assert scored["tokens_per_second"] == pytest.approx(64 / scored["seconds"])
    assert 0.1 < scoring.divergence_ratio(model, torch.randint(0, 512, (4, 16)), 2, 1) < 20
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    scored = scoring.zero_shot_ratio(model, tokenizer, ["piqa"], 3, 1)
    assert scored["tokens"] > 6 * 5
    assert scored["ratio"] == pytest.approx(scored["seconds"] / scored["plain_s"])
    assert not model.base_model._forward_pre_hooks


@pytest.mark.thorough
def test_a_sweep_is_compared_with_the_floors_of_its_records(tiny, tmp_path):
    lines, overrides = [], [part for part in tiny_overrides(tiny, tmp_path) if not part.startswith("results_dir")]
    timed = sweep.sweep_ratio(overrides, 2.0, 0.5, lines.append)
    assert (timed["cells"], timed["records"], len(lines)) == (15, 13, 15)
    assert timed["floors_s"] == pytest.approx(13 * 0.5 + 9 * 2.0)
    assert timed["ratio"] == pytest.approx(timed["seconds"] / timed["floors_s"])
    assert not list(tmp_path.iterdir())


def test_the_page_is_the_committed_one(measured):
    assert report.markdown(measured) == COMMITTED.with_suffix(".md").read_text(encoding="utf-8")


def test_the_page_says_which_target_is_missed(measured):
    measured["ratios_to_floor"] = {"dass": 1.10, "sparsegpt": 1.81, "magnitude": 0.03}
    measured["divergence"] = 1.26
    page = report.markdown(measured)
    assert "| divergence | 1.260 of perplexity alone | at most 1.25 | **no** |" in page
    assert "| dass | 1.100 of the floor | at most 1.1 | yes |" in page
    assert "| sparsegpt | 1.810 of the floor | at most 1.8 | **no** |" in page
    assert "| magnitude | 0.030 of the floor | none |  |" in page


@pytest.mark.thorough
def test_the_command_writes_what_it_measured(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "measure", lambda repeats: measured)
    assert command.main(["--threads", "1", "--output", str(tmp_path)]) == 0
    written = tmp_path / COMMITTED.name
    assert json.loads(written.read_text()) == measured
    assert written.with_suffix(".md").read_text() in capsys.readouterr().out
    assert {"floor", *METHODS} <= set((tmp_path / "speed.svg").read_text().replace("<", ">").split(">"))
    assert (tmp_path / "speed.png").stat().st_size > 5000


def test_large_models_are_counted_by_hand(tiny_model):
    decoder = decoder_of(tiny_model("llama", num_hidden_layers=1))
    config = decoder.config
    hidden, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    queries = config.num_attention_heads * config.head_dim
    mlp, attention = 3 * hidden * inner, 2 * hidden * queries + 2 * hidden * kv
    tokens, scored, once = 128 * 2048, 166 * 2048, 2 * (mlp + attention) + 4 * 2048 * queries
    forward = tokens * (once + 2 * mlp) + 2 * scored * once + 2 * scored * 2 * hidden * 100
    assert large.forward_operations(decoder, 100) == forward
    grams = tokens * (hidden**2 + inner**2) + hidden**3 / 3 + inner**3 / 3
    assert large.solver_operations(decoder) == pytest.approx(grams + 2 * inner * hidden**2 + hidden * inner**2)


def test_the_docs_show_what_the_code_prints():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert large.table() in page and large.card_table() in page


def test_the_shapes_are_those_of_the_published_models():
    published = [6.74e9, 13.02e9, 68.98e9, 405.85e9]  # parameters, as the hub counts them
    sizes = [sum(weight.numel() for weight in shape.empty_model().parameters()) for shape in large.MODELS]
    assert sizes == pytest.approx(published, rel=1e-3)


@pytest.mark.slow
def test_the_peak_of_a_streamed_run_does_not_grow_with_its_depth(tmp_path):
    peaks, size = [], (4, 128)
    for depth in (4, 24):
        shape = large.LlamaShape(str(depth), 1024, 2816, depth, 16)
        folder = scale.write_checkpoint(shape, tmp_path / str(depth))
        runs = [scale.measure_run(folder, "dass", tmp_path / f"{depth}-{number}", *size) for number in range(2)]
        peaks.append(min(run["peak_bytes"] for run in runs))
        assert peaks[-1] < large.planned_memory(shape.empty_model(), "dass", size, size).streamed
        assert len(list(folder.glob("model-*.safetensors"))) == depth + 1
    assert peaks[1] - peaks[0] < 120e6  # 20 more blocks; before freed memory was returned, each kept 13 MB
