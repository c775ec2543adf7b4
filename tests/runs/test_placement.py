"""A streamed run leaves the record, masks and checkpoint of one whose model is in memory; where a model goes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import (
    CONF,
    FixedMemory,
    Phases,
    contains,
    killed_after_block,
    run_with,
    save_tiny,
    settings_of,
    tiny_config,
)

from dass_exp import load_masks
from dass_exp.config.settings import STAGE_GROUPS
from dass_exp.errors import UserError
from dass_exp.models import save as checkpoint
from dass_exp.models.decoder import decoder_of
from dass_exp.models.load import load_model
from dass_exp.models.shards import Shards
from dass_exp.runs import memory
from dass_exp.runs.context import ModelCache, RunContext
from dass_exp.runs.memory import MemoryNeeds, choose_placement
from dass_exp.runs.plan import plan
from dass_exp.runs.resolve import resolve
from dass_exp.storage.durable import read_json

STREAM, RESIDENT = "model.placement=stream", "model.placement=resident"

pytestmark = pytest.mark.usefixtures("short_texts")


def weights_of(folder):
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def same_scores(ours, theirs):
    for name in ("perplexity", "window_nll"):
        (first,), (second,) = ours["metrics"][name].values(), theirs["metrics"][name].values()
        assert first == pytest.approx(second, rel=1e-6)


def both_ways(folder, *overrides):
    """The outcomes of a resident and of a streamed run, whose models and masks are compared, as are their scores."""
    resident = run_with(*overrides, RESIDENT, f"save={folder}/one")
    streamed = run_with(*overrides, STREAM, f"save={folder}/two", f"results_dir={folder}/other")
    assert not streamed.found
    assert resident.record["key"] == streamed.record["key"]
    assert resident.record["identity"] == streamed.record["identity"]
    same_scores(resident.record, streamed.record)
    same_tensors(weights_of(folder / "one"), weights_of(folder / "two"))
    if resident.record["config"]["method"]["name"] != "dense":
        same_tensors(*[load_masks(folder / name / "masks.safetensors") for name in ("one", "two")])
        assert resident.dense["key"] == streamed.dense["key"]
        same_scores(resident.dense, streamed.dense)
        for part in ("identity", "protocol", "calibration", "sparsity", "solver"):
            assert resident.dense[part] == streamed.dense[part]
    return resident, streamed


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["dass", "sparsegpt", "magnitude", "dense"])
def test_a_streamed_run_leaves_the_record_and_the_weights_of_a_resident_one(cell, tmp_path, method):
    outcomes = both_ways(tmp_path, *cell, f"method={method}")
    resident, streamed = (outcome.record["sparsity"] for outcome in outcomes)
    for layer in (*resident["layers"], *streamed["layers"]):
        del layer["seconds"]
    assert resident == streamed


STAGES = [f"{group}={path.stem}" for group in STAGE_GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.thorough
@pytest.mark.parametrize("stage", [stage for stage in STAGES if not stage.endswith(("=none", "=uniform"))])
def test_a_streamed_run_with_a_stage_leaves_the_weights_of_a_resident_one(cell, tmp_path, stage):
    if stage.startswith("allocation"):
        cell = [*cell, "pattern=unstructured"]
    if stage == "refine=dsnot":
        cell = [*cell, "method=wanda"]  # dass is refused
    plain = run_with(*cell, RESIDENT).record
    resident, _ = both_ways(tmp_path, *cell, stage)
    assert resident.record["key"] != plain["key"]
    assert resident.record["metrics"]["perplexity"] != plain["metrics"]["perplexity"]
    again = run_with(*cell, "method=dense", f"model.path={tmp_path}/one").record
    same_scores(again, resident.record)


@pytest.mark.thorough
def test_the_saved_model_loads_and_scores_the_same(cell, tmp_path):
    record = run_with(*cell, STREAM, f"save={tmp_path}/saved").record
    assert len(list((tmp_path / "saved").glob("model-0000?-of-00003.safetensors"))) == 3
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.model_type == "llama"
    again = run_with(*cell, "method=dense", f"model.path={tmp_path}/saved").record
    same_scores(again, record)
    assert "pruned by dass_exp: dass" in again["protocol"]["model_note"]
    assert run_with(*cell, "method=dense", STREAM, f"model.path={tmp_path}/saved").found


@pytest.mark.thorough
@pytest.mark.parametrize("interrupted", [False, True], ids=["at once", "after a kill"])
def test_a_pruned_model_that_is_scored_again_shows_its_zeros(cell, tmp_path, interrupted):
    saved = f"model.path={tmp_path}/saved"
    record = run_with(*cell, f"save={tmp_path}/saved").record
    again = [*cell, saved, "method=dense"]
    resident = run_with(*again, "model.placement=resident").record["sparsity"]
    if interrupted:
        killed_after_block(0, *again, "model.placement=stream", "rerun=true")
    streamed = run_with(*again, "model.placement=stream", "rerun=true").record["sparsity"]
    assert resident == streamed
    assert resident["zero_weights"] == pytest.approx(record["sparsity"]["decoder"], abs=1e-3)
    for size in ("dense_bytes", "packed_bytes"):
        assert resident[size] == pytest.approx(record["sparsity"][size], rel=1e-3)
    first = run_with(*cell, "method=dense", "rerun=true").record["sparsity"]
    assert "zero_weights" not in first and first["packed_bytes"] == first["dense_bytes"]


@pytest.mark.thorough
def test_the_model_is_read_once_and_never_loaded_whole(cell, monkeypatch):
    reads, inner, phases = [], Shards.read, Phases()

    def read(shards, names, dtype):
        reads.extend(names := list(names))
        return inner(shards, names, dtype)

    monkeypatch.setattr(Shards, "read", read)
    outcome = run_with(*cell, STREAM, context=RunContext(phases))
    assert len(reads) == len(set(reads)) == 2 * 9 + 3
    assert phases.count("loading") == [0]
    assert outcome.dense["metrics"]["perplexity"]
    assert run_with(*cell, "method=dense").found


# --- zero-shot tasks of a streamed run

TASKS = ["eval=mini", "eval.zeroshot.limit=3"]


@pytest.mark.thorough
def test_zero_shot_is_left_out_with_a_word(cell, caplog):
    record = run_with(*cell, *TASKS, STREAM).record
    assert contains(caplog.text.strip(), ["zero-shot tasks are left out", "save=FOLDER keeps it"])
    assert {"perplexity", "window_nll", "divergence"} < record["metrics"].keys()
    assert not {"tasks", "mean_acc"} & record["metrics"].keys()
    assert record["key"] == run_with(*cell, *TASKS, STREAM, "eval.zeroshot=null").record["key"]


@pytest.mark.thorough
def test_a_record_with_tasks_is_not_replaced_by_one_without(cell):
    scored = run_with(*cell, *TASKS, RESIDENT)
    again = run_with(*cell, *TASKS, STREAM, "save_masks=true")  # its masks are missing, so it is not finished
    assert again.record["key"] != scored.record["key"]
    assert read_json(scored.path) == scored.record


def test_tasks_alone_cannot_be_left_out(cell):
    with pytest.raises(UserError, match=r"zero-shot tasks, which are all that is asked for, cannot be scored: save="):
        run_with(*cell[:4], "eval=zeroshot_mini", "eval.zeroshot.limit=2", STREAM, "method=dense")


@pytest.mark.thorough
def test_zero_shot_runs_on_the_saved_model_where_it_fits(cell, results, tmp_path, caplog):
    streamed = run_with(*cell, *TASKS, STREAM, f"save={tmp_path}/saved")
    assert "left out" not in caplog.text
    resident = run_with(*cell, *TASKS, RESIDENT, f"results_dir={tmp_path}/other")
    for ours, theirs in ((streamed.record, resident.record), (streamed.dense, resident.dense)):
        assert ours["key"] == theirs["key"]
        assert ours["metrics"]["tasks"] == theirs["metrics"]["tasks"]
        same_scores(ours, theirs)
    shutil.rmtree(results / "runs" / streamed.dense["key"])  # made again, its tasks in memory too
    again = run_with(*cell, *TASKS, STREAM, f"save={tmp_path}/saved")
    assert again.found
    assert again.dense["metrics"] == streamed.dense["metrics"]


@pytest.mark.thorough
def test_zero_shot_is_left_out_where_the_saved_model_does_not_fit(cell, tmp_path, caplog):
    folder = save_tiny(tmp_path / "deep", tiny_config(num_hidden_layers=12))  # two blocks take much less than all
    overrides = [*cell, *TASKS, STREAM, f"model.path={folder}", f"save={tmp_path}/saved"]
    needs = resolve(settings_of(*overrides), RunContext()).needs
    record = run_with(*overrides, context=FixedMemory(needs.scored - 1)).record
    missing = ["zero-shot tasks are left out", "the model alone needs 1.2 GB", f"score {tmp_path}/saved where it fits"]
    assert contains(caplog.text.strip(), missing)
    assert "tasks" not in record["metrics"]


# --- models and folders that are refused


@pytest.mark.thorough
@pytest.mark.parametrize("placement", ["stream", "resident", "auto"])
@pytest.mark.parametrize("harm", ["missing", "damaged", "empty", "index", "shape"])
def test_a_bad_shard_is_one_line_and_leaves_no_record(cell, tiny, tmp_path, results, harm, placement):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    transformers.AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder, max_shard_size="30KB")
    victim = sorted(folder.glob("model-*.safetensors"))[-1]
    if harm == "missing":
        victim.unlink()
    elif harm == "damaged":
        victim.write_bytes(victim.read_bytes()[:-5])
    elif harm == "empty":
        victim.write_bytes(b"")
    elif harm == "index":
        victim = folder / "model.safetensors.index.json"
        victim.write_text('{"weight_map": []}')
    else:
        weights = {name: tensor[:1].contiguous() for name, tensor in load_file(victim).items()}
        save_file(weights, victim, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        run_with(*cell, f"model.path={folder}", f"model.placement={placement}", f"save={tmp_path}/saved")
    assert contains(str(caught.value), [victim.name if harm != "shape" else str(folder), "fetch it again"])
    assert not list(results.glob("runs/*/result.json"))
    assert not (tmp_path / "saved").exists()


@pytest.mark.thorough
def test_after_a_full_disk_a_run_goes_on_when_there_is_room(cell, tmp_path, results, monkeypatch):
    real, written = checkpoint.write_tensors, []

    def full(tensors, path, about):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        real(tensors, path, about)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(checkpoint, "write_tensors", full)
        run_with(*cell, STREAM, f"save={tmp_path}/deep/saved")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [".saved.partial"]
    assert not list(results.glob("runs/*/result.json"))
    run_with(*cell, STREAM, f"save={tmp_path}/deep/saved")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["saved"]


@pytest.mark.parametrize("placement", [STREAM, RESIDENT])
def test_a_model_whose_logits_are_not_those_of_its_head_is_refused(tmp_path, cell, placement):
    config = transformers.GraniteConfig(**{**tiny_config().to_dict(), "model_type": "granite", "logits_scaling": 8.0})
    with pytest.raises(UserError, match="its logits are not what its head gives"):
        run_with(*cell, f"model.path={save_tiny(tmp_path / 'model', config)}", placement)


def test_what_a_run_left_that_was_killed_before_its_first_block_is_not_taken_over(cell, tmp_path):
    growing = tmp_path / ".saved.partial" / "made"
    growing.mkdir(parents=True)
    (growing / "model-00002-of-00099.safetensors").write_bytes(b"of another model")
    run_with(*cell, STREAM, f"save={tmp_path}/saved")
    assert not list((tmp_path / "saved").glob("*-of-00099.safetensors"))


@pytest.mark.thorough
def test_two_runs_do_not_save_into_one_folder(cell, tmp_path):
    with checkpoint.locked(tmp_path / "saved"):
        for placement in 2 * (STREAM, RESIDENT):  # one that is turned away does not let the next one in
            with pytest.raises(UserError, match=r"save=.*another run is writing to it"):
                run_with(*cell, placement, f"save={tmp_path}/saved")
    run_with(*cell, STREAM, f"save={tmp_path}/saved")
    assert sorted(path.name for path in tmp_path.iterdir() if "saved" in path.name) == ["saved"]


@pytest.mark.parametrize(
    ("harm", "words"),
    [("tied", "with other values than those of"), ("quantised", "is quantised"), ("missing", "has no tensor")],
)
def test_what_only_transformers_can_read_is_refused(cell, tiny, tmp_path, harm, words):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    if harm == "tied":
        config["tie_word_embeddings"] = True  # and another head is stored all the same
    elif harm == "quantised":
        config["quantization_config"] = {"quant_method": "fp8"}
    else:
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        run_with(*cell, f"model.path={folder}", STREAM)
    if harm == "missing":  # transformers would make it up
        with pytest.raises(UserError, match=r"its checkpoint has no model\.layers\.1\.mlp\.up_proj\.weight"):
            run_with(*cell, f"model.path={folder}", RESIDENT)


@pytest.mark.thorough
def test_a_tied_head_that_is_stored_too_is_no_other_model(cell, tmp_path):
    folder = save_tiny(tmp_path / "model", tiny_config(tie_word_embeddings=True))
    weights = load_file(folder / "model.safetensors")
    stored = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    both_ways(tmp_path, *cell, f"model.path={folder}")
    assert weights_of(tmp_path / "one").keys() == weights.keys()


# --- mixtures of experts


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def mixture(request, tmp_path, tiny_model, tiny):
    """A folder with a mixture, whose experts transformers stores one by one."""
    shutil.copytree(tiny, tmp_path / "model")
    tiny_model(request.param, vocab_size=512).save_pretrained(tmp_path / "model")
    assert any(".experts.0." in name for name in load_file(tmp_path / "model" / "model.safetensors"))
    return tmp_path / "model"


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["dass", "sparsegpt"])
def test_a_streamed_mixture_is_saved_as_a_resident_one(cell, mixture, tmp_path, method):
    _, streamed = both_ways(tmp_path, *cell, f"model.path={mixture}", f"method={method}")
    assert weights_of(tmp_path / "two").keys() == weights_of(mixture).keys()
    same_scores(run_with(*cell, "method=dense", f"model.path={tmp_path}/two").record, streamed.record)


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_mixture_with_a_bad_expert_is_one_line(cell, mixture, harm):
    weights = load_file(mixture / "model.safetensors")
    name = next(name for name in sorted(weights) if ".experts.2." in name)
    piece = weights.pop(name)
    if harm == "cut":
        weights[name] = piece[:-1].contiguous()
    save_file(weights, mixture / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        run_with(*cell, f"model.path={mixture}", STREAM)
    assert contains(str(caught.value), [STREAM, ".mlp.experts."])


# --- where a model goes

GB = 10**9
WEIGHTS = {"model": 10 * GB, "block": GB // 2, "ahead": GB // 2, "outside": 3 * GB // 10}
NEEDS = MemoryNeeds(**WEIGHTS, activations=100, windows=100, solver=100, batch=100)


def test_sizes_add_up():
    assert NEEDS.resident == memory.BASE + 10_000_000_350  # half of the windows are those of the dense model
    assert NEEDS.streamed == memory.BASE + 1_300_000_400
    assert "model 10.00, block 0.50, ahead 0.50" in NEEDS.parts()


@pytest.mark.parametrize(
    ("requested", "free", "expected"),
    [
        ("auto", 20e9, "resident"),
        ("auto", 11e9, "stream"),
        ("auto", 3e9, "stream"),
        ("resident", 11e9, "resident"),
        ("stream", 1e12, "stream"),
    ],
)
def test_a_model_goes_where_it_fits(requested, free, expected):
    placement, reason = choose_placement(requested, NEEDS, int(free))
    assert placement == expected
    assert contains(reason, ["10.7 GB with the whole model in memory, 2.0 GB block by block"])
    assert ("the model is read block by block: " in reason and "block 0.50" in reason) == (expected == "stream")


def test_what_fits_whole_and_not_block_by_block_is_loaded():
    many = dataclasses.replace(NEEDS, windows=20 * GB)
    assert choose_placement("auto", many, many.resident + 10)[0] == "resident"


@pytest.mark.parametrize(("requested", "free"), [("auto", 1e9), ("resident", 5e9), ("stream", 1.5e9)])
def test_what_cannot_fit_is_refused_with_the_numbers(requested, free):
    with pytest.raises(UserError) as caught:
        choose_placement(requested, NEEDS, int(free))
    sizes = ["10.7 GB with the whole model", "2.0 GB block by block", f"{free / 1e9:.1f} GB are free"]
    assert contains(str(caught.value), [f"model.placement={requested}", *sizes])


@pytest.mark.parametrize("placement", ["auto", "resident", "stream"])
def test_what_cannot_fit_is_not_begun(cell, results, placement):
    with pytest.raises(UserError, match=f"model.placement={placement}: this run needs"):
        run_with(*cell, f"model.placement={placement}", context=FixedMemory(1000))
    assert not list(results.glob("runs/*/result.json"))


def resolved(*overrides, context=None):
    return resolve(settings_of(*overrides), context or RunContext())


@pytest.mark.thorough
def test_auto_streams_where_memory_is_short_and_says_the_sizes(cell, caplog):
    cell = [*cell[:4], "eval=none"]  # the windows would take more than this model
    assert resolved(*cell, context=FixedMemory(resolved(*cell).needs.resident + 10)).streams
    caplog.set_level("INFO")
    assert resolved(*cell, STREAM).streams
    assert [message.partition(":")[0] for message in caplog.messages] == ["model.placement=auto", STREAM]
    words = ["the model is read block by block", "GB are free", "solver", "activations"]
    assert all(contains(message, words) for message in caplog.messages)


@pytest.mark.thorough
def test_sizes_are_those_of_the_model(cell):
    run = resolved(*cell, "method=sparsegpt")
    needs, model = run.needs, load_model(run.spec)
    assert needs.model == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert needs.model == needs.outside + 2 * needs.block
    assert needs.activations == 3 * 4 * 32 * 32 * 4
    assert needs.windows == 2 * 4 * 32 * 32 * 4
    assert needs.solver >= 4 * (32**2 + 64**2) + 8 * 64**2
    assert resolved(*cell, "method=dense").needs.solver == 0
    assert resolved(*cell, "method=alps").needs.solver > needs.solver  # its solver holds more matrices at once
    on_disk = resolved(*cell, "calibration.cache=disk").needs
    assert (on_disk.activations, on_disk.windows) == (0, 0)
    default = resolved(*cell).needs
    assert resolved(*cell, "calibration.cache=cpu").needs == default  # the model is there too
    assert resolved(*cell, "eval.batch_size=16").needs.batch > default.batch
    scope = sum(parameter.numel() for name, parameter in model.named_parameters() if ".mlp." in name)
    shared = resolved(*cell, context=RunContext(shared=ModelCache())).needs
    assert (shared.copy, default.copy) == (4 * scope, 0)


def test_what_waits_on_the_host_of_an_accelerator_must_fit_there(cell, accelerator):
    on_gpu = [*cell, "model.device=cuda", "calibration.batch_size=3", "model.dtype=float32"]
    cpu, plain, waiting = (
        resolved(*overrides).needs
        for overrides in (
            [*cell, "model.device=cpu", "calibration.cache=cpu"],
            on_gpu,
            [*on_gpu, "calibration.cache=cpu"],
        )
    )
    sequences = 4 * 32 * 32 * 4
    assert (cpu.host, cpu.host_windows, cpu.host_dense, plain.host, plain.host_windows) == (0, 0, 0, 0, 0)
    assert plain.host_dense == sequences  # the last states of the dense model
    # page-locked memory comes in powers of two: a batch of three sequences takes that of four, and so does the last
    assert (waiting.host, waiting.host_windows) == (4 * 2 * sequences, 4 * sequences)
    assert waiting.activations == 0

    class Host(RunContext):
        def __init__(self, free):
            super().__init__()
            self.free = free

        def available_memory(self, device):
            return 1 << 40 if device.type == "cuda" else self.free

    for placement, needed in (("resident", 9 * sequences), ("stream", 12 * sequences)):
        settings = [*on_gpu, "calibration.cache=cpu", f"model.placement={placement}"]
        resolved(*settings, context=Host(needed))
        with pytest.raises(UserError, match=r"wait in the memory of the host .* take calibration\.cache=disk"):
            resolved(*settings, context=Host(needed - 1))
    for cache in ("device", "disk"):
        resolved(*on_gpu, f"calibration.cache={cache}", "eval.divergence=false", context=Host(0))


def test_ranking_on_an_accelerator_is_planned(cell, accelerator):
    """It takes the indices of a sort beside the scores; on a CPU a pattern is ranked in place, a part at a time."""
    cpu, gpu = (resolved(*cell, f"model.device={device}").needs.solver for device in ("cpu", "cuda"))
    assert gpu - cpu >= 16 * 64 * 32  # of the largest matrix


def test_what_reconstruction_loads_at_once_is_planned(cell):
    on_disk = [*cell, "calibration.cache=disk"]
    block, least_squares = (resolved(*on_disk, f"repair={name}").needs for name in ("block", "least_squares"))
    assert block.activations - least_squares.activations == 2 * 4 * 32 * 32 * 4  # inputs and outputs of the MLP


def test_a_mixture_is_there_twice_while_its_experts_are_joined(cell, mixture):
    needs = resolved(*cell, f"model.path={mixture}").needs
    assert needs.ahead == 2 * needs.block


@pytest.mark.thorough
def test_a_model_in_the_cache_of_a_sweep_counts_as_free_memory_and_is_dropped_where_it_must_go(cell):
    cell, cache = [*cell[:4], "eval=none"], ModelCache()
    context = FixedMemory(1 << 40, shared=cache)
    dense = resolved(*cell, "method=dense", context=context)
    with context.resident_model(dense) as model:
        pass
    needs = resolved(*cell, "method=sparsegpt", context=context).needs
    assert cache.model(dense.spec) is model
    context.free = needs.resident - needs.model
    assert not resolved(*cell, "method=sparsegpt", RESIDENT, context=context).streams
    context.free -= 1
    with pytest.raises(UserError, match="this run needs"):
        resolved(*cell, "method=sparsegpt", RESIDENT, context=context)
    assert resolved(*cell, "method=sparsegpt", context=context).streams
    assert cache.model(dense.spec) is None
    cache.put(dense.spec, model)
    context.free = needs.resident
    assert resolved(*cell, STREAM, context=context).streams
    assert cache.model(dense.spec) is None


def test_attention_by_plain_products_keeps_scores():
    sizes = {}
    workload = memory.Workload(None, lambda role: (), 1, 2, torch.bfloat16, torch.device("cpu"))
    for implementation in ("eager", "sdpa"):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(tiny_config(), attn_implementation=implementation)
        sizes[implementation] = memory.memory_needs(decoder_of(model), model, (0, 0), (4, 100), workload).batch
    assert sizes["eager"] - sizes["sdpa"] == 2 * 4 * 100 * 100 * (4 + 3 * 2)


@pytest.mark.thorough
def test_a_plan_says_where_the_model_goes_and_that_a_saved_one_is_missing(cell, tmp_path):
    assert "it is loaded whole" in plan(settings_of(*cell)).needs
    assert "it is read block by block" in plan(settings_of(*cell, STREAM)).needs
    run_with(*cell)
    assert plan(settings_of(*cell)).done
    assert not plan(settings_of(*cell, f"save={tmp_path}/saved")).done
    assert not plan(settings_of(*cell, "save_masks=true")).done
    with pytest.raises(UserError, match=r"model\.placement=stream: this run needs"):
        plan(settings_of(*cell, STREAM, "rerun=true"), FixedMemory(1000))


# --- how much memory is free

FIRST_VERSION = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
FILES = {"": ("max", "current", "inactive_file"), "memory": FIRST_VERSION, "cpu,memory": FIRST_VERSION}


def system(folder, free, groups, version):
    """A machine with ``free`` bytes and nested control groups (name, limit, usage, cache), the last being ours."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {free // 1024} kB\n")
    root = place = folder / "sys/fs/cgroup" / version
    limit_file, usage_file, inactive = FILES[version]
    for name, limit, usage, cached in groups:
        place = place / name
        place.mkdir(parents=True, exist_ok=True)
        stat = f"anon 5\n{inactive} {cached - cached // 3}\n{inactive.replace('inactive', 'active')} {cached // 3}\n"
        files = {limit_file: limit, usage_file: usage, "stat": stat, **({} if version else {"high": "max"})}
        for file, content in files.items():
            (place / f"memory.{file}").write_text(f"{content}\n")
    (folder / "proc/self/cgroup").write_text(f"9:cpuset:/elsewhere\n4:{version}:/{place.relative_to(root)}\n")
    return folder


@pytest.mark.parametrize("version", FILES)
@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([], 1 << 30),
        ([("", 1 << 62, 7, 0)], 1 << 30),
        ([("job", 1000, 300, 50)], 750),
        ([("job", 1000, 300, 50), ("step", 1 << 62, 200, 0)], 750),
        ([("job", 1 << 62, 300, 50), ("step", 500, 200, 10)], 310),
        ([("job", 1 << 40, 300, 50)], 1 << 30),
    ],
)
def test_a_batch_system_may_leave_less_than_the_machine_has(tmp_path, groups, expected, version):
    groups = [(name, "max" if limit == 1 << 62 and not version else limit, *rest) for name, limit, *rest in groups]
    assert memory.available_memory(torch.device("cpu"), system(tmp_path, 1 << 30, groups, version)) == expected


def test_a_limit_that_throttles_counts_too(tmp_path):
    folder = system(tmp_path, 1 << 30, [("job", "max", 300, 0)], "")
    (folder / "sys/fs/cgroup/job/memory.high").write_text("800\n")
    assert memory.available_memory(torch.device("cpu"), folder) == 500


@pytest.mark.parametrize(
    ("addresses", "data", "expected"),
    [
        ("unlimited", "unlimited", 1 << 40),
        ("9000000", "unlimited", (9_000_000 - 4_096_000) // 2),
        ("unlimited", "9000000", 9_000_000 - 1_024_000),
        ("9000000", "2000000", 2_000_000 - 1_024_000),
    ],
)
def test_the_limits_of_the_process_count(tmp_path, addresses, data, expected):
    folder = system(tmp_path, 1 << 40, {}, "")
    (folder / "proc/self/status").write_text("Name:\tpython\nVmSize:\t    4000 kB\nVmData:\t    1000 kB\n")
    row = "{:<26}{:<21}{:<21}{}\n".format
    lines = [row("Limit", "Soft Limit", "Hard Limit", "Units"), row("Max data size", data, "unlimited", "bytes")]
    lines.append(row("Max address space", addresses, "unlimited", "bytes"))
    (folder / "proc/self/limits").write_text("".join(lines))
    assert memory.available_memory(torch.device("cpu"), folder) == expected


class NothingDrawn(RunContext):
    """A context of a run that must be refused before its calibration tokens are drawn."""

    def calibration(self, run):
        pytest.fail("tokens were drawn")


@pytest.mark.thorough
def test_a_run_that_cannot_fit_is_refused_before_its_tokens_are_drawn(cell):
    with pytest.raises(UserError, match=r"^model.placement=auto: this run needs .* tokens 512"):
        resolve(settings_of(*cell, "calibration.num_samples=1000000000"), NothingDrawn())
    with pytest.raises(UserError, match=r"^model.placement=auto: this run needs .* tokens 512"):
        resolve(settings_of(*cell, "calibration.num_samples=1000000000", "calibration.cache=disk"), NothingDrawn())


def test_where_nothing_says_how_much_is_free_the_user_decides(tmp_path):
    assert memory.available_memory(torch.device("cpu"), tmp_path) == 1 << 62
    assert 0 < memory.available_memory(torch.device("cpu")) < 1 << 60
