"""A run of a tiny model from settings to record: what is written, found again, refused, and left after a failure."""

from __future__ import annotations

import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
import transformers
from hydra.errors import HydraException
from safetensors.torch import load_file
from support import DECODER_SIZE, MLP_SIZE, MODEL_SIZE, Phases, contains, run_with, save_tiny, settings_of, tiny_config

from dass_exp.engine.callbacks import Callback
from dass_exp.errors import NumericalError, UserError
from dass_exp.runs.context import ModelCache, RunContext
from dass_exp.runs.plan import plan
from dass_exp.runs.resolve import resolve
from dass_exp.runs.run import run
from dass_exp.storage.durable import read_json
from dass_exp.storage.mask_file import load_masks
from dass_exp.storage.records import RecordStore

pytestmark = pytest.mark.usefixtures("short_texts")

PRUNED, SCORED, LOADED = "pruning with", "perplexity of", "loading the model"


class Fail(Callback):
    """Fails in the place of a method."""

    def on_block_end(self, report) -> None:
        raise NumericalError(f"{report.name}.mlp: not finite")


def fail(*overrides: str) -> None:
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.mlp"):
        run_with(*overrides, context=RunContext(callbacks=[Fail()]))


def keys_in(results: Path) -> set[str]:
    return {path.parent.name for path in results.glob("runs/*/result.json")}


# --- what is written


@pytest.mark.thorough
def test_a_record_has_the_documented_fields(cell, results):
    outcome = run_with(*cell)
    record = read_json(outcome.path)
    assert record == outcome.record
    assert outcome.path == results / "runs" / record["key"] / "result.json"
    documented = "schema key created config protocol calibration sparsity metrics cost solver environment"
    assert set(record) >= set(documented.split())
    assert record["schema"] == 1
    created = datetime.fromisoformat(record["created"])
    assert created.tzinfo is not None
    assert abs((datetime.now(UTC) - created).total_seconds()) < 600


@pytest.mark.thorough
def test_a_record_says_how_it_was_made(cell):
    record = run_with(*cell).record
    config, protocol = record["config"], record["protocol"]
    assert config["model"]["name"] == "tiny"
    assert (config["model"]["dtype"], config["model"]["device"]) == (protocol["dtype"], protocol["device"])
    assert "auto" not in (protocol["dtype"], protocol["device"])
    assert config["method"] == {"name": "dass", "alpha": 0.5, "granularity": "input"}
    assert config["pattern"]["name"] == "2:4"
    assert (config["scope"], config["seed"], config["protocol"]) == ("mlp", 0, "demo")
    assert config["calibration"]["text"]["asset"] == "c4"
    expected = {"context": 32, "bos": "never", "dataset": "wikipedia_mini", "split": "even", "windows": 4}
    assert protocol.items() >= expected.items()
    assert (record["calibration"]["num_samples"], record["calibration"]["seq_len"]) == (4, 32)
    assert len(record["calibration"]["tokens_sha256"]) == len(protocol["windows_sha256"]) == 64


@pytest.mark.thorough
def test_the_perplexity_is_that_of_its_windows(cell):
    metrics = run_with(*cell).record["metrics"]
    windows = metrics["window_nll"]["wikipedia_mini"]
    assert len(windows) == 4
    assert metrics["perplexity"]["wikipedia_mini"] == pytest.approx(math.exp(sum(windows) / 4))
    assert metrics["predicted_tokens_per_window"]["wikipedia_mini"] == 31


DENSE_PASS = "the dense model on the windows"


@pytest.mark.thorough
def test_divergence_is_recorded_beside_the_perplexity(cell):
    outcome = run_with(*cell)
    metrics, dense = outcome.record["metrics"], outcome.dense["metrics"]
    divergence, name = metrics["divergence"]["wikipedia_mini"], "wikipedia_mini"
    assert 0 < divergence["kl"] == pytest.approx(sum(metrics["window_kl"][name]) / 4)
    assert 1 > divergence["agreement"] == pytest.approx(sum(metrics["window_agreement"][name]) / 4)
    ratio = metrics["perplexity"][name] / dense["perplexity"][name]
    assert divergence["perplexity_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert len(metrics["position_nll"][name]) == 16
    assert "divergence" not in dense


@pytest.mark.thorough
def test_without_divergence_the_scores_are_the_same_and_the_key_is_another(cell):
    phases = Phases()
    record = run_with(*cell, "eval.divergence=false", context=RunContext(phases)).record
    assert phases.count(DENSE_PASS) == [0]
    with_divergence = run_with(*cell)
    metrics = with_divergence.record["metrics"]
    assert {name: metrics[name] for name in record["metrics"]} == record["metrics"]
    assert "divergence" not in record["metrics"]
    assert record["key"] != with_divergence.record["key"]
    assert run_with(*cell, "method=dense", "eval.divergence=false").found  # it is the dense model in either case


@pytest.mark.thorough
def test_the_dense_model_runs_once_on_the_windows_of_all_runs_of_a_process(cell):
    phases, shared = Phases(), ModelCache()
    for method in ("wanda", "magnitude", "dense"):
        run_with(*cell, f"method={method}", context=RunContext(phases, shared))
    assert phases.count(DENSE_PASS) == [1]


@pytest.mark.thorough
def test_the_dense_hidden_states_are_kept_on_the_disk(cell, results):
    expected = run_with(*cell, f"results_dir={results}/other").record["metrics"]
    phases, records = Phases(), []
    for method in ("magnitude", "dass"):
        context = RunContext(phases)
        records.append(run_with(*cell, f"method={method}", "eval.cache=disk", context=context).record)
    assert phases.count(DENSE_PASS) == [1]
    assert records[1]["metrics"] == expected
    (path,) = (results / "dense_hidden").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    again = run_with(*cell, "eval.cache=disk", "rerun=true", context=RunContext(phases)).record
    assert phases.count(DENSE_PASS) == [2]
    assert again["metrics"] == expected


@pytest.mark.thorough
def test_the_three_denominators_of_sparsity(cell):
    sparsity = run_with(*cell).record["sparsity"]
    assert sparsity["scope"] == 0.5
    assert sparsity["decoder"] == MLP_SIZE / 2 / DECODER_SIZE
    assert sparsity["model"] == MLP_SIZE / 2 / MODEL_SIZE
    assert sparsity["excess_zeros"] == 0
    # float32: the MLP at half its values and one bit a weight, the rest as it is
    assert sparsity["dense_bytes"] == 4 * MODEL_SIZE
    assert sparsity["packed_bytes"] == 4 * (MODEL_SIZE - MLP_SIZE) + 4 * MLP_SIZE // 2 + MLP_SIZE // 8
    dense = run_with(*cell).dense["sparsity"]
    assert dense["packed_bytes"] == dense["dense_bytes"] == 4 * MODEL_SIZE
    assert sum(layer["size"] for layer in sparsity["layers"]) == MLP_SIZE


@pytest.mark.thorough
def test_a_packed_model_has_values_of_its_own_dtype(cell):
    sparsity = run_with(*cell, "model.dtype=bfloat16", "pattern=4of8").record["sparsity"]
    assert sparsity["packed_bytes"] == 2 * MODEL_SIZE - 2 * MLP_SIZE // 2 + MLP_SIZE // 8


@pytest.mark.thorough
def test_all_linears_at_4_of_8_are_those_of_the_decoder_and_none_runs_on_a_2_of_4_kernel(cell):
    sparsity = run_with(*cell, "scope=all", "method=wanda", "pattern=4of8").record["sparsity"]
    assert sparsity["scope"] == sparsity["decoder"] == 0.5
    assert len(sparsity["layers"]) == 14
    assert {(layer["axis"], layer["kernel_ready"]) for layer in sparsity["layers"]} == {("input", False)}


def test_shared_embeddings_count_once(cell, tmp_path):
    folder = save_tiny(tmp_path / "tied", tiny_config(tie_word_embeddings=True))
    sparsity = run_with(*cell, f"model.path={folder}", "method=magnitude").record["sparsity"]
    assert sparsity["model"] == MLP_SIZE / 2 / (MODEL_SIZE - 512 * 32)


def test_each_layer_says_what_was_done_to_it(cell):
    layers = run_with(*cell).record["sparsity"]["layers"]
    assert [layer["role"] for layer in layers] == ["gate", "up", "down"] * 2
    assert all(layer["name"].startswith(f"model.layers.{index // 3}.") for index, layer in enumerate(layers))
    assert all((layer["zeros"], layer["size"]) == (1024, 2048) for layer in layers)
    axes = {(layer["role"], layer["axis"], layer["kernel_ready"]) for layer in layers}
    assert axes == {("gate", "output", False), ("up", "output", False), ("down", "input", True)}
    assert all(0 <= layer["score_low"] < layer["score_high"] for layer in layers)
    assert all(layer["block_error"] > 0 for layer in layers[:3])
    assert {layer["block_error"] for layer in layers[3:]} == {None}  # the last block is not run again


def test_the_cost_is_measured(cell):
    cost = run_with(*cell).record["cost"]
    assert min(cost[name] for name in ("load_s", "prune_s", "eval_s")) > 0
    assert cost["peak_rss_bytes"] > 50_000_000
    assert "peak_gpu_bytes" in cost


@pytest.mark.thorough
def test_the_solver_of_sparsegpt_is_reported(cell):
    solver = run_with(*cell, "method=sparsegpt").record["solver"]
    assert solver.keys() == {"damping_retries", "underfull_tiles"}
    assert solver["damping_retries"] == 0 <= solver["underfull_tiles"]


def test_dense_records_nothing_about_pruning(cell):
    phases = Phases()
    record = run_with(*cell, "method=dense", context=RunContext(phases)).record
    assert [record["config"][name] for name in ("pattern", "scope", "calibration", "seed")] == [None] * 4
    assert record["calibration"] is None
    assert record["sparsity"]["layers"] == []
    assert [record["sparsity"][name] for name in ("scope", "decoder", "model")] == [0, 0, 0]
    assert phases.count(PRUNED) == [0]


def test_magnitude_records_no_calibration(cell):
    record = run_with(*cell, "method=magnitude").record
    assert record["calibration"] is None
    assert [record["config"][name] for name in ("calibration", "seed", "scope")] == [None, None, "mlp"]
    assert {layer["block_error"] for layer in record["sparsity"]["layers"]} == {None}


def test_a_run_may_score_nothing(cell):
    outcome = run_with(*cell[:4], "eval=none", "calibration.num_samples=2", "calibration.seq_len=16")
    assert outcome.record["metrics"] == {}
    assert outcome.dense is None  # there is nothing to compare
    assert outcome.record["sparsity"]["scope"] == 0.5


@pytest.mark.thorough
def test_no_secret_of_the_environment_reaches_the_results(cell, results, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "secret123" * 5)
    run_with(*cell)
    fail(*cell, "seed=1")
    files = [path for path in results.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"result.json", "failed.json"}
    assert [path for path in files if b"secret123" in path.read_bytes()] == []


@pytest.mark.thorough
def test_equal_runs_give_equal_numbers(cell, tmp_path):
    one = run_with(*cell).record
    other = run_with(*cell, f"results_dir={tmp_path}/again", "calibration.batch_size=3", "eval.batch_size=1").record
    assert one["key"] == other["key"]
    assert one["calibration"] == other["calibration"]
    assert one["metrics"]["perplexity"] == pytest.approx(other["metrics"]["perplexity"], rel=1e-5)


@pytest.mark.thorough
def test_a_seed_draws_other_tokens(cell):
    one, other = run_with(*cell).record, run_with(*cell, "seed=1").record
    assert one["calibration"]["tokens_sha256"] != other["calibration"]["tokens_sha256"]
    assert one["protocol"]["windows_sha256"] == other["protocol"]["windows_sha256"]


@pytest.mark.thorough
def test_a_repeat_is_a_record_of_its_own(cell):
    assert len({run_with(*cell, "method=magnitude", f"repeat={number}").record["key"] for number in (0, 1, 2)}) == 3


def test_threads_are_set(cell):
    assert run_with(*cell, "threads=2").record["environment"]["threads"] == 2  # conftest sets them back to 1


# --- what is found again


@pytest.mark.thorough
def test_a_second_run_finds_the_record(cell):
    phases = Phases()
    first = run_with(*cell, context=RunContext(phases))
    assert not first.found
    assert phases.count(PRUNED, SCORED) == [1, 2]
    phases.names.clear()
    second = run_with(*cell, context=RunContext(phases))
    assert second.found
    assert phases.count(PRUNED, SCORED, LOADED) == [0, 0, 0]
    assert (second.record, second.dense) == (first.record, first.dense)


@pytest.mark.thorough
def test_rerun_does_it_again_and_keeps_dense(cell, results):
    phases = Phases()
    first = run_with(*cell)
    dense = results / "runs" / first.dense["key"] / "result.json"
    stamp = dense.stat().st_mtime_ns
    again = run_with(*cell, "rerun=true", context=RunContext(phases))
    assert not again.found
    assert phases.count(PRUNED, SCORED) == [1, 1]
    assert again.record["key"] == first.record["key"]
    assert dense.stat().st_mtime_ns == stamp


@pytest.mark.thorough
def test_dense_is_made_once_for_all_methods(cell, results):
    phases = Phases()
    outcomes = [run_with(*cell, f"method={method}", context=RunContext(phases)) for method in ("wanda", "magnitude")]
    assert outcomes[0].dense == outcomes[1].dense
    assert outcomes[0].dense["config"]["method"] == {"name": "dense"}
    assert keys_in(results) == {outcomes[0].dense["key"], *(outcome.record["key"] for outcome in outcomes)}
    assert phases.count(SCORED) == [3]
    assert run_with(*cell, "method=dense").found


@pytest.mark.thorough
def test_dense_is_scored_on_weights_that_nothing_has_pruned(cell, tmp_path):
    dense = run_with(*cell, "method=magnitude").dense
    alone = run_with(*cell, "method=dense", f"results_dir={tmp_path}/alone").record
    assert dense["metrics"] == alone["metrics"]


@pytest.mark.thorough
def test_a_missing_dense_record_is_made_again(cell, results):
    first = run_with(*cell)
    shutil.rmtree(results / "runs" / first.dense["key"])
    second = run_with(*cell)
    assert second.found
    assert first.dense["key"] in keys_in(results)
    assert second.dense["metrics"] == first.dense["metrics"]


@pytest.mark.thorough
def test_a_broken_record_is_made_again(cell):
    first = run_with(*cell)
    first.path.write_text('{"key": ')
    again = run_with(*cell)
    assert not again.found
    assert again.record["metrics"] == first.record["metrics"]


def test_masks_are_saved_where_they_are_asked_for(cell, tmp_path):
    outcome = run_with(*cell, "save_masks=true", f"save={tmp_path}/saved")
    masks = load_masks(outcome.path.with_name("masks.safetensors"))
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(masks) == {layer["name"] for layer in outcome.record["sparsity"]["layers"]}
    assert {mask.dtype for mask in masks.values()} == {torch.bool}
    assert all(torch.equal(mask, weights[f"{name}.weight"] != 0) for name, mask in masks.items())


@pytest.mark.thorough
def test_missing_masks_are_a_reason_to_run_again(cell):
    first = run_with(*cell)
    masks = first.path.with_name("masks.safetensors")
    assert not masks.exists()
    second = run_with(*cell, "save_masks=true")
    assert not second.found
    assert second.path == first.path
    assert masks.is_file()
    assert run_with(*cell, "save_masks=true").found
    assert run_with(*cell).found
    assert run_with(*cell, "method=dense", "save_masks=true").found  # it has none


@pytest.mark.thorough
def test_two_at_once_make_one_record(cell):
    phases = Phases()

    class Slow(Callback):
        def on_start(self, loop) -> None:
            time.sleep(0.5)

    run_with(*cell[:4], "eval=none", "method=magnitude")  # the libraries have been imported
    settings = settings_of(*cell)
    contexts = [RunContext(phases, callbacks=[Slow()]) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda context: run(settings, context), contexts))
    assert sorted(outcome.found for outcome in outcomes) == [False, True]
    assert phases.count(PRUNED, SCORED) == [1, 2]
    assert outcomes[0].record == outcomes[1].record


# --- what is left after a failure


@pytest.mark.thorough
def test_a_failure_leaves_a_note_and_no_record_until_a_later_success(cell, results):
    fail(*cell)
    (note,) = results.glob("runs/*/failed.json")
    content = json.loads(note.read_text())
    assert content["error"] == "model.layers.0.mlp: not finite"
    assert content["config"]["method"]["name"] == "dass"
    assert not note.with_name("result.json").exists()
    assert not list(results.rglob("*.partial"))
    assert not run_with(*cell).found
    assert not list(results.glob("runs/*/failed.json"))


@pytest.mark.thorough
def test_a_failed_rerun_keeps_the_record(cell, results):
    record = run_with(*cell).record
    fail(*cell, "rerun=true")
    assert RecordStore(results).find(record["key"]) == record


def test_weights_that_are_not_finite_stop_the_run_with_the_layer(cell, tiny, tmp_path, results):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    shutil.copytree(tiny, tmp_path / "broken")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp"):
        run_with(*cell[:4], f"model.path={tmp_path}/broken", "eval=none", "calibration.seq_len=16")
    assert keys_in(results) == set()


# --- what is refused, before weights are loaded and before anything is written


def refused(*overrides: str) -> str:
    """The message with which a run is refused before its weights are loaded."""
    phases = Phases()
    with pytest.raises(UserError) as caught:
        run_with(*overrides, context=RunContext(phases))
    assert phases.count(LOADED) == [0]
    return str(caught.value)


ONE_OF, MLP = ["pattern=nm", "pattern.n=1"], "model.layers.0.mlp."


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["calibration.seq_len=4097"], ["calibration.seq_len=4097:", "tiny has 4096 positions"]),
        (["eval.perplexity.context=4097"], ["eval.perplexity.context=4097:", "tiny has 4096 positions"]),
        ([*ONE_OF, "pattern.m=3"], [f"{MLP}gate_proj", "1:3", "output axis", "[64, 32]", "divides 64"]),
        ([*ONE_OF, "pattern.m=64", "scope=all"], ["layers.0.self_attn.q_proj", "input axis", "divides 32"]),
        ([*ONE_OF, "pattern.m=64", "method=wanda"], [f"{MLP}gate_proj", "input axis", "divides 32"]),
        (["model.bos=foo"], ["model.bos='foo':", "auto, never, stream, window"]),
        (["model.dtype=foo"], ["model.dtype='foo':", "auto, float32, bfloat16, float16"]),
        (["model.device=foo"], ["model.device='foo':", "auto, cpu, cuda"]),
        (["model.device=meta"], ["model.device='meta':"]),
        (["model.device=cuda"], ["model.device='cuda':", "no accelerator", "model.device=auto"]),
        (["model.placement=gpu"], ["model.placement='gpu': expected one of auto, resident, stream"]),
        (["model.path=offline:gpt5"], ["model.path=offline:gpt5:", "smollm2_135m, gemma3_270m"]),
        (["model=gemma3_270m", "model.path=offline:gemma3_270m"], ["gemma3_270m", "model.accept_license=true"]),
        (["model.roles={gate: mlp.gate_proj}"], ["model.roles", "missing q, k, v, o, up, down"]),
    ],
    ids=lambda value: value[-1],
)
def test_what_does_not_fit_the_model_is_refused_before_its_weights_are_loaded(
    cell, results, monkeypatch, overrides, words
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    message = refused(*cell, *overrides)
    assert contains(message, words), message
    assert keys_in(results) == set()


def test_a_gpu_that_is_not_there_is_refused(cell, results, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    message = refused(*cell, "model.device=cuda:5")
    assert contains(message, ["model.device='cuda:5':", "cuda:0, cuda:1", "model.device=auto"]), message


@pytest.mark.thorough
def test_a_gpu_that_is_not_there_may_be_planned_with(cell, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    planned = plan(settings_of(*cell, "model.device=cuda", "plan=true"))
    assert (planned.done, planned.needs.count("this machine has no cuda")) == (False, 1)
    assert planned.key != plan(settings_of(*cell, "plan=true")).key
    assert contains(refused(*cell, "model.device=cuda"), ["model.device='cuda':", "no accelerator"])


@pytest.mark.thorough
def test_a_device_without_float64_is_neither_chosen_nor_accepted(cell, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert resolve(settings_of(*cell, "model.device=auto"), RunContext()).spec.device.type == "cpu"
    assert contains(refused(*cell, "model.device=mps"), ["model.device='mps':", "float64", "set it to cpu"])


@pytest.mark.parametrize("method", ["dense", "magnitude"])
def test_a_setting_that_the_method_ignores_is_not_held_against_it(cell, method):
    phases = Phases()
    resolve(settings_of(*cell, f"method={method}", "calibration.seq_len=1000000"), RunContext(phases))
    assert phases.count(LOADED) == [0]


@pytest.mark.parametrize(
    ("setting", "more", "word"),
    [
        ("calibration.seq_len=5000000", "calibration.sampling=joined", "tokens"),
        ("calibration.seq_len=5000000", "calibration.sampling=document", "documents"),
        ("eval.perplexity.context=5000000", "method=dense", "tokens"),
    ],
)
def test_a_sequence_longer_than_the_text_is_refused(cell, tmp_path, setting, more, word):
    folder = save_tiny(tmp_path / "long", tiny_config(max_position_embeddings=10_000_000))
    message = refused(*cell, f"model.path={folder}", setting, more)
    assert contains(message, [f"{setting}:", word, "smaller"]), message


@pytest.mark.parametrize("bos", ["stream", "window"])
def test_a_token_that_the_tokenizer_does_not_have_is_refused(cell, tmp_path, bos):
    folder = save_tiny(tmp_path / "bare", bos=None)
    message = refused(*cell, f"model.path={folder}", f"model.bos={bos}")
    assert contains(message, [f"model.bos={bos}:", "model.bos=never"]), message


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("{folder}/nowhere", ["there is no such folder"]),
        ("{folder}/empty", []),
        ("no-such-owner/no-such-model", ["hf auth login", "network", "smollm2_135m"]),
    ],
)
def test_a_model_that_is_not_there_gives_one_clear_line(cell, tmp_path, results, path, words):
    (tmp_path / "empty").mkdir()
    path = path.format(folder=tmp_path)
    message = refused(*cell, f"model.path={path}")
    assert contains(message, [f"model.path={path}:", *words]), message
    assert len(message) < 700
    assert not results.exists()


def test_weights_in_a_pickle_are_not_read(cell, tiny, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    message = refused(*cell, f"model.path={folder}")
    assert contains(message, [f"model.path={folder}:", ".safetensors"]), message


@pytest.mark.parametrize("roles", ["mlp", "[mlp.gate_proj]", "5", "{gate: 5}", "{door: mlp.gate_proj}"])
def test_roles_that_are_no_paths_by_role_are_refused(cell, roles):
    with pytest.raises((UserError, HydraException), match="roles"):  # Hydra may refuse them first
        run_with(*cell, f"model.roles={roles}")


@pytest.mark.thorough
def test_a_family_that_is_called_like_llama_runs_with_a_warning(cell, tmp_path, caplog):
    config = transformers.OlmoConfig(**{**tiny_config().to_dict(), "model_type": "olmo"})
    outcome = run_with(*cell, f"model.path={save_tiny(tmp_path / 'olmo', config)}")
    assert outcome.record["sparsity"]["scope"] == 0.5
    assert "model family 'olmo' is in no table: it is taken for a LLaMA" in caplog.text


@pytest.mark.thorough
def test_a_model_of_an_unknown_family_runs_with_its_roles_on_the_command_line(cell, tmp_path):
    config = transformers.GPTJConfig(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=4096, rotary_dim=4)
    cell = [*cell, f"model.path={save_tiny(tmp_path / 'gptj', config)}"]
    known = "gemma, gemma2, gemma3_text, gpt2, gpt_neox, llama, mistral"
    message = refused(*cell)
    assert contains(message, ["'gptj' is not known", known, "roles: {blocks: PATH"]), message
    roles = {role: f"attn.{name}_proj" for role, name in zip("qkvo", ("q", "k", "v", "out"), strict=True)}
    roles |= {"fc1": "mlp.fc_in", "fc2": "mlp.fc_out", "blocks": "transformer.h"}
    outcome = run_with(*cell, f"model.roles={{{','.join(f'{role}: {path}' for role, path in roles.items())}}}")
    assert outcome.record["sparsity"]["scope"] == 0.5
    assert outcome.record["config"]["model"]["roles"]["blocks"] == "transformer.h"
    assert outcome.record["protocol"]["method_note"].startswith("DaSS on an MLP without a GLU is an extension")
