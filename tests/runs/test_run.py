"""A run from its settings to its record, on a tiny model: what is written, found again, refused, and left after a failure."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from hydra.errors import HydraException
from support import (
    DECODER_SIZE,
    MLP_SIZE,
    MODEL_SIZE,
    contains,
    run_with,
    save_tiny,
    settings_of,
    tiny_config,
    tiny_overrides,
)

from dass_exp.errors import NumericalError, UserError
from dass_exp.models import load as models
from dass_exp.runs import making
from dass_exp.runs import pruning as pruning_module
from dass_exp.runs import run as run_module
from dass_exp.runs.run import run
from dass_exp.storage.mask_file import load_masks
from dass_exp.storage.records import RecordStore

pytestmark = pytest.mark.usefixtures("short_texts")


class Calls:
    """Stands before a function where a run calls it: counts its calls, keeps the last model, may be slow, may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, home: object, name: str) -> None:
        self.count, self.delay, self.error, self.first = 0, 0.0, None, None
        self._real = getattr(home, name)
        monkeypatch.setattr(home, name, self)

    def __call__(self, *args, **kwargs):
        self.count += 1
        self.first = args[0]
        time.sleep(self.delay)
        if self.error is not None:
            raise self.error
        return self._real(*args, **kwargs)


@pytest.fixture
def pruning(monkeypatch):
    return Calls(monkeypatch, pruning_module, "prune_model")


@pytest.fixture
def scoring(monkeypatch):
    return Calls(monkeypatch, making, "perplexity")


def keys_in(results: Path) -> set[str]:
    return {path.parent.name for path in results.glob("runs/*/result.json")}


def folder_of(outcome) -> Path:
    return outcome.path.parent


# What is written


def test_a_record_has_the_documented_fields(cell, results):
    outcome = run_with(*cell)
    record = json.loads(outcome.path.read_text())
    assert record == outcome.record
    assert outcome.path == results / "runs" / record["key"] / "result.json"
    assert set(record) >= {
        "schema",
        "key",
        "created",
        "config",
        "protocol",
        "calibration",
        "sparsity",
        "metrics",
        "cost",
        "solver",
        "environment",
    }
    assert record["schema"] == 1
    created = datetime.fromisoformat(record["created"])
    assert created.tzinfo is not None
    assert abs((datetime.now(UTC) - created).total_seconds()) < 600


def test_a_record_says_how_it_was_made(cell):
    record = run_with(*cell).record
    config, protocol = record["config"], record["protocol"]
    assert config["model"]["name"] == "tiny"
    assert (config["model"]["dtype"], config["model"]["device"]) == (protocol["dtype"], protocol["device"])
    assert "auto" not in (protocol["dtype"], protocol["device"], protocol["bos"])
    assert config["method"] == {"name": "dass", "alpha": 0.5, "granularity": "input"}
    assert config["pattern"]["name"] == "2:4"
    assert (config["scope"], config["seed"], config["protocol"]) == ("mlp", 0, "demo")
    assert config["calibration"]["text"]["asset"] == "c4"
    assert (protocol["context"], protocol["bos"], protocol["dataset"], protocol["split"], protocol["windows"]) == (
        32,
        "never",
        "wikipedia_mini",
        "even",
        4,
    )
    assert (record["calibration"]["num_samples"], record["calibration"]["seq_len"]) == (4, 32)
    assert len(record["calibration"]["tokens_sha256"]) == len(protocol["windows_sha256"]) == 64


def test_the_perplexity_is_that_of_its_windows(cell):
    metrics = run_with(*cell).record["metrics"]
    windows = metrics["window_nll"]["wikipedia_mini"]
    assert len(windows) == 4
    assert metrics["perplexity"]["wikipedia_mini"] == pytest.approx(math.exp(sum(windows) / 4))
    assert metrics["predicted_tokens_per_window"]["wikipedia_mini"] == 31


def test_the_three_denominators_of_sparsity(cell):
    sparsity = run_with(*cell).record["sparsity"]
    assert sparsity["scope"] == 0.5
    assert sparsity["decoder"] == MLP_SIZE / 2 / DECODER_SIZE
    assert sparsity["model"] == MLP_SIZE / 2 / MODEL_SIZE
    assert sparsity["excess_zeros"] == 0
    assert sum(layer["size"] for layer in sparsity["layers"]) == MLP_SIZE


def test_sparsity_of_all_linears_equals_that_of_the_decoder(cell):
    sparsity = run_with(*cell, "scope=all", "method=wanda").record["sparsity"]
    assert sparsity["scope"] == sparsity["decoder"] == 0.5
    assert len(sparsity["layers"]) == 14


def test_shared_embeddings_count_once(tmp_path, results):
    folder = save_tiny(tmp_path / "shared", tiny_config(tie_word_embeddings=True))
    sparsity = run_with(*tiny_overrides(folder, results), "method=magnitude").record["sparsity"]
    assert sparsity["model"] == MLP_SIZE / 2 / (MODEL_SIZE - 512 * 32)


def test_each_layer_says_what_was_done_to_it(cell):
    layers = run_with(*cell).record["sparsity"]["layers"]
    assert [layer["role"] for layer in layers] == ["gate", "up", "down"] * 2
    assert all(layer["name"].startswith(f"model.layers.{index // 3}.") for index, layer in enumerate(layers))
    assert all((layer["zeros"], layer["size"]) == (1024, 2048) for layer in layers)
    assert {(layer["role"], layer["axis"], layer["kernel_ready"]) for layer in layers} == {
        ("gate", "output", False),
        ("up", "output", False),
        ("down", "input", True),
    }
    assert all(0 <= layer["score_low"] < layer["score_high"] for layer in layers)
    assert [layer["block_error"] is None for layer in layers] == [False] * 3 + [
        True
    ] * 3  # nobody reads what the last block gives
    assert all(layer["block_error"] > 0 for layer in layers[:3])


def test_a_4_of_8_mask_is_not_said_to_run_on_a_2_of_4_kernel(cell):
    layers = run_with(*cell, "pattern=4of8", "method=wanda").record["sparsity"]["layers"]
    assert {(layer["axis"], layer["kernel_ready"]) for layer in layers} == {("input", False)}


def test_the_cost_is_measured(cell):
    cost = run_with(*cell).record["cost"]
    assert set(cost) >= {"load_s", "prune_s", "eval_s", "peak_rss_bytes", "peak_gpu_bytes"}
    assert cost["load_s"] > 0
    assert cost["prune_s"] > 0
    assert cost["eval_s"] > 0
    assert cost["peak_rss_bytes"] > 50_000_000


def test_the_solver_of_sparsegpt_is_reported(cell):
    solver = run_with(*cell, "method=sparsegpt").record["solver"]
    assert solver == {"damping_retries": 0, "underfull_tiles": solver["underfull_tiles"]}
    assert solver["underfull_tiles"] >= 0


def test_dense_records_nothing_about_pruning(cell, pruning):
    record = run_with(*cell, "method=dense").record
    assert [record["config"][name] for name in ("pattern", "scope", "calibration", "seed")] == [None] * 4
    assert record["calibration"] is None
    assert record["sparsity"]["layers"] == []
    assert [record["sparsity"][name] for name in ("scope", "decoder", "model")] == [0, 0, 0]
    assert pruning.count == 0


def test_magnitude_records_no_calibration(cell):
    record = run_with(*cell, "method=magnitude").record
    assert record["calibration"] is None
    assert record["config"]["calibration"] is None
    assert record["config"]["seed"] is None
    assert record["config"]["scope"] == "mlp"
    assert {layer["block_error"] for layer in record["sparsity"]["layers"]} == {None}


def test_a_run_may_score_nothing(cell):
    outcome = run_with(*cell[:4], "eval=none", "calibration.num_samples=2", "calibration.seq_len=16")
    assert outcome.record["metrics"] == {}
    assert outcome.dense is None  # there is nothing to compare
    assert outcome.record["sparsity"]["scope"] == 0.5


def test_no_secret_of_the_environment_reaches_the_results(cell, results, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "secret123" * 5)
    run_with(*cell)
    monkeypatch.setattr(making, "perplexity", lambda *args: (_ for _ in ()).throw(NumericalError("no")))
    with pytest.raises(NumericalError):
        run_with(*cell, "seed=1")
    files = [path for path in results.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"result.json", "failed.json"}
    for path in files:
        assert b"secret123" not in path.read_bytes(), path


def test_equal_runs_give_equal_numbers(cell, tmp_path):
    one = run_with(*cell).record
    other = run_with(*cell, f"results_dir={tmp_path}/again", "calibration.batch_size=3", "eval.batch_size=1").record
    assert one["key"] == other["key"]
    assert one["calibration"] == other["calibration"]
    assert one["metrics"]["perplexity"]["wikipedia_mini"] == pytest.approx(
        other["metrics"]["perplexity"]["wikipedia_mini"], rel=1e-5
    )


def test_a_seed_draws_other_tokens(cell):
    one, other = run_with(*cell).record, run_with(*cell, "seed=1").record
    assert one["calibration"]["tokens_sha256"] != other["calibration"]["tokens_sha256"]
    assert one["protocol"]["windows_sha256"] == other["protocol"]["windows_sha256"]


def test_threads_are_set(cell):
    before = torch.get_num_threads()
    try:
        assert run_with(*cell, "threads=1").record["environment"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


# What is found again


def test_a_second_run_finds_the_record(cell, pruning, scoring, monkeypatch):
    first = run_with(*cell)
    assert (first.found, pruning.count, scoring.count) == (False, 1, 2)
    monkeypatch.setattr(models, "load_model", lambda spec: pytest.fail("a model was loaded"))
    second = run_with(*cell)
    assert (second.found, pruning.count, scoring.count) == (True, 1, 2)
    assert second.record == first.record
    assert second.dense == first.dense


def test_rerun_does_it_again_and_keeps_dense(cell, results, pruning, scoring):
    first = run_with(*cell)
    dense = results / "runs" / first.dense["key"] / "result.json"
    stamp = dense.stat().st_mtime_ns
    again = run_with(*cell, "rerun=true")
    assert (again.found, pruning.count, scoring.count) == (False, 2, 3)
    assert again.record["key"] == first.record["key"]
    assert dense.stat().st_mtime_ns == stamp


def test_dense_is_made_once_for_all_methods(cell, results, scoring):
    outcomes = [run_with(*cell, f"method={method}") for method in ("wanda", "magnitude")]
    assert outcomes[0].dense == outcomes[1].dense
    assert outcomes[0].dense["config"]["method"] == {"name": "dense"}
    assert keys_in(results) == {outcomes[0].dense["key"], *(outcome.record["key"] for outcome in outcomes)}
    assert scoring.count == 3
    assert run_with(*cell, "method=dense").found


def test_dense_is_scored_on_weights_that_nothing_has_pruned(cell, tmp_path):
    beside = run_with(*cell, "method=magnitude").dense
    alone = run_with(*cell, "method=dense", f"results_dir={tmp_path}/alone").record
    assert beside["metrics"] == alone["metrics"]


def test_a_missing_dense_record_is_made_again(cell, results):
    first = run_with(*cell)
    shutil.rmtree(results / "runs" / first.dense["key"])
    second = run_with(*cell)
    assert second.found
    assert second.dense["metrics"] == first.dense["metrics"]
    assert first.dense["key"] in keys_in(results)


def test_a_broken_record_is_made_again(cell, pruning):
    first = run_with(*cell)
    first.path.write_text('{"key": ')
    again = run_with(*cell)
    assert (again.found, pruning.count) == (False, 2)
    assert again.record["metrics"] == first.record["metrics"]


def test_masks_are_saved_where_they_are_asked_for(cell, pruning):
    outcome = run_with(*cell, "save_masks=true")
    masks = load_masks(folder_of(outcome) / "masks.safetensors")
    linears = {
        name: module.weight for name, module in pruning.first.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert set(masks) == {layer["name"] for layer in outcome.record["sparsity"]["layers"]}
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert torch.equal(mask, linears[name] != 0), name


def test_missing_masks_are_a_reason_to_run_again(cell, pruning):
    first = run_with(*cell)
    assert not (folder_of(first) / "masks.safetensors").exists()
    second = run_with(*cell, "save_masks=true")
    assert (second.found, pruning.count) == (False, 2)
    assert second.path == first.path
    assert (folder_of(second) / "masks.safetensors").is_file()
    assert run_with(*cell, "save_masks=true").found
    assert run_with(*cell).found
    assert pruning.count == 2


def test_dense_has_no_masks_to_wait_for(cell):
    run_with(*cell, "method=dense")
    assert run_with(*cell, "method=dense", "save_masks=true").found


def test_two_at_once_make_one_record(cell, pruning, scoring):
    settings = settings_of(*cell)
    run_with(*cell[:4], "eval=none", "method=magnitude")  # the libraries have been imported
    pruning.count, pruning.delay = 0, 0.5
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.append(run(settings))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(outcome.found for outcome in outcomes) == [False, True]
    assert (pruning.count, scoring.count) == (1, 2)
    assert outcomes[0].record == outcomes[1].record


# What is left after a failure


def test_a_failure_leaves_a_note_and_no_record(cell, results, pruning):
    pruning.error = NumericalError("model.layers.1.mlp: not finite")
    with pytest.raises(NumericalError, match=r"model\.layers\.1"):
        run_with(*cell)
    (noted,) = results.glob("runs/*/failed.json")
    content = json.loads(noted.read_text())
    assert content["error"] == "model.layers.1.mlp: not finite"
    assert content["config"]["method"]["name"] == "dass"
    assert not (noted.parent / "result.json").exists()
    assert not list(results.rglob("*.partial"))


def test_a_later_success_removes_the_note(cell, results, pruning):
    pruning.error = NumericalError("once")
    with pytest.raises(NumericalError):
        run_with(*cell)
    pruning.error = None
    outcome = run_with(*cell)
    assert not outcome.found
    assert not list(results.glob("runs/*/failed.json"))


def test_a_failed_rerun_keeps_the_record(cell, pruning):
    first = run_with(*cell)
    pruning.error = NumericalError("no")
    with pytest.raises(NumericalError):
        run_with(*cell, "rerun=true")
    assert RecordStore(first.path.parents[2]).find(first.record["key"]) == first.record


def test_weights_that_are_not_finite_stop_the_run_with_the_layer(tiny, tmp_path, results):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    shutil.copytree(tiny, tmp_path / "broken")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp"):
        run_with(
            *tiny_overrides(tmp_path / "broken", results)[:4],
            "eval=none",
            "calibration.num_samples=2",
            "calibration.seq_len=16",
        )
    assert keys_in(results) == set()


# What is refused, before weights are loaded and before anything is written


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda spec: pytest.fail("weights were loaded"))


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        run_with(*overrides)
    return str(caught.value)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["calibration.seq_len=4097"], ["calibration.seq_len=4097:", "tiny has 4096 positions"]),
        (["eval.perplexity.context=4097"], ["eval.perplexity.context=4097:", "tiny has 4096 positions"]),
        (
            ["pattern=nm", "pattern.n=1", "pattern.m=3"],
            ["model.layers.0.mlp.gate_proj", "1:3", "output axis", "[64, 32]", "divides 64"],
        ),
        (
            ["scope=all", "pattern=nm", "pattern.n=1", "pattern.m=64"],
            ["model.layers.0.self_attn.q_proj", "input axis", "divides 32"],
        ),
        (
            ["method=wanda", "pattern=nm", "pattern.n=1", "pattern.m=64"],
            ["model.layers.0.mlp.gate_proj", "input axis", "divides 32"],
        ),
        (["model.bos=foo"], ["model.bos='foo':", "auto, never, stream, window"]),
        (["model.dtype=foo"], ["model.dtype='foo':", "auto, float32, bfloat16, float16"]),
        (["model.device=foo"], ["model.device='foo':", "auto, cpu, cuda"]),
        (["model.device=meta"], ["model.device='meta':"]),
        (["model.path=offline:gpt5"], ["model.path=offline:gpt5:", "smollm2_135m, gemma3_270m"]),
        (["model=gemma3_270m", "model.path=offline:gemma3_270m"], ["gemma3_270m", "model.accept_license=true"]),
    ],
    ids=lambda value: value[0],
)
def test_what_does_not_fit_the_model_is_refused_before_its_weights_are_loaded(cell, results, overrides, words):
    message = refused(*cell, *overrides)
    assert contains(message, words), message
    assert keys_in(results) == set()


@pytest.mark.usefixtures("no_weights")
def test_an_accelerator_that_is_not_there_is_refused(cell, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    message = refused(*cell, "model.device=cuda")
    assert contains(message, ["model.device='cuda':", "no accelerator", "model.device=auto"]), message


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("method", ["dense", "magnitude"])
def test_a_setting_that_the_method_ignores_is_not_held_against_it(tiny, results, method):
    settings = settings_of(*tiny_overrides(tiny, results), f"method={method}", "calibration.seq_len=1000000")
    bench = run_module.Bench(settings, run_module.Silent())
    bench.check(settings)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("sampling", ["joined", "document"])
def test_a_sequence_longer_than_the_text_is_refused(tmp_path, results, sampling, short_texts):
    folder = save_tiny(tmp_path / "long", tiny_config(max_position_embeddings=10_000_000))
    message = refused(
        *tiny_overrides(folder, results), "calibration.seq_len=5000000", f"calibration.sampling={sampling}"
    )
    assert contains(message, ["calibration.seq_len=5000000:", "smaller"]), message


@pytest.mark.usefixtures("no_weights")
def test_a_context_longer_than_the_text_is_refused(tmp_path, results):
    folder = save_tiny(tmp_path / "long", tiny_config(max_position_embeddings=10_000_000))
    message = refused(*tiny_overrides(folder, results), "eval.perplexity.context=5000000")
    assert contains(message, ["eval.perplexity.context=5000000:", "tokens", "smaller"]), message


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("bos", ["stream", "window"])
def test_a_token_that_the_tokenizer_does_not_have_is_refused(tmp_path, results, bos):
    folder = save_tiny(tmp_path / "bare", bos=None)
    message = refused(*tiny_overrides(folder, results), f"model.bos={bos}")
    assert contains(message, [f"model.bos={bos}:", "model.bos=never"]), message


GPTJ = {
    "vocab_size": 512,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 64,
    "n_positions": 4096,
    "rotary_dim": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.mark.usefixtures("no_weights")
def test_an_unknown_family_lists_the_known_ones(tmp_path, results):
    folder = save_tiny(tmp_path / "gptj", transformers.GPTJConfig(**GPTJ))
    message = refused(*tiny_overrides(folder, results))
    assert contains(
        message, ["'gptj'", "gemma, gemma2, gemma3_text, gpt2, gpt_neox, llama, mistral", "roles: {blocks: PATH"]
    ), message


def test_a_folder_that_is_not_there_gives_one_clear_line(tmp_path, results):
    message = refused(*tiny_overrides(tmp_path / "nowhere", results))
    assert contains(message, [f"model.path={tmp_path}/nowhere:", "there is no such folder"]), message
    assert len(message) < 700
    assert not results.exists()


def test_an_empty_folder_gives_one_clear_line(tmp_path, results):
    (tmp_path / "empty").mkdir()
    message = refused(*tiny_overrides(tmp_path / "empty", results))
    assert contains(message, [f"model.path={tmp_path}/empty"]), message


def test_a_hub_model_without_a_network_gives_one_clear_line(results, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refused(*tiny_overrides(Path("no-such-owner/no-such-model"), results))
    assert contains(message, ["model.path=no-such-owner/no-such-model:", "hf auth login", "network", "smollm2_135m"]), (
        message
    )
    assert not results.exists()


@pytest.mark.usefixtures("no_weights")
def test_weights_in_a_pickle_are_not_read(tiny, tmp_path, results):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    message = refused(*tiny_overrides(folder, results))
    assert contains(message, [f"model.path={folder}:", ".safetensors"]), message


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("roles", ["mlp", "[mlp.gate_proj]", "5", "{gate: 5}", "{door: mlp.gate_proj}"])
def test_roles_that_are_no_paths_by_role_are_refused(cell, roles):
    with pytest.raises((UserError, HydraException), match="roles"):  # Hydra may refuse them first
        run_with(*cell, f"model.roles={roles}")


@pytest.mark.usefixtures("no_weights")
def test_roles_that_are_incomplete_are_refused(cell, tiny):
    settings = settings_of(*cell)
    with pytest.raises(UserError) as caught:
        models.identify(dataclasses.replace(settings.config.model, roles={"gate": "mlp.gate_proj"}))
    assert contains(str(caught.value), ["model.roles", "missing q, k, v, o, up, down"])


def test_a_family_that_is_called_like_llama_runs_with_a_warning(tmp_path, results, caplog):
    config = transformers.OlmoConfig(**{**tiny_config().to_dict(), "model_type": "olmo"})
    outcome = run_with(*tiny_overrides(save_tiny(tmp_path / "olmo", config), results))
    assert outcome.record["sparsity"]["scope"] == 0.5
    assert "model family 'olmo' is in no table: it is taken for a LLaMA" in caplog.text


ROLES = "q: q_proj,k: k_proj,v: v_proj,o: out_proj"


def test_a_model_of_an_unknown_family_runs_with_its_roles_on_the_command_line(tmp_path, results):
    config = transformers.GPTJConfig(**GPTJ)
    cell = tiny_overrides(save_tiny(tmp_path / "gptj", config), results)
    assert "'gptj' is not known" in refused(*cell)
    roles = {role: f"attn.{path}" for role, path in (pair.split(": ") for pair in ROLES.split(","))}
    spelt = ",".join(
        f"{role}: {path}"
        for role, path in {**roles, "fc1": "mlp.fc_in", "fc2": "mlp.fc_out", "blocks": "transformer.h"}.items()
    )
    outcome = run_with(*cell, f"model.roles={{{spelt}}}")
    assert outcome.record["sparsity"]["scope"] == 0.5
    assert outcome.record["config"]["model"]["roles"]["blocks"] == "transformer.h"
    assert outcome.record["protocol"]["method_note"].startswith("DaSS on an MLP without a GLU is an extension")
