"""A run whose model is read block by block leaves the record, the masks and the checkpoint of one whose model is in memory."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import contains, run_with, save_tiny, settings_of, tiny_config

import dass_exp
from dass_exp.errors import UserError
from dass_exp.models import save as checkpoint
from dass_exp.models.decoder import decoder_of
from dass_exp.models.load import load_model
from dass_exp.models.shards import Shards
from dass_exp.runs import memory
from dass_exp.runs.context import Bench, Shelf
from dass_exp.runs.memory import MemoryNeeds, choose_placement
from dass_exp.runs.plan import plan
from dass_exp.runs.run import SilentReporter

STREAM = "model.placement=stream"

pytestmark = pytest.mark.usefixtures("short_texts")


def other(cell, folder):
    """The same run into another results folder."""
    return [f"results_dir={folder}" if part.startswith("results_dir") else part for part in cell]


def weights_of(folder):
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("method", ["dass", "sparsegpt", "magnitude", "dense"])
def test_a_streamed_run_leaves_the_record_and_the_weights_of_a_resident_one(cell, tmp_path, method):
    resident = run_with(
        *cell, f"method={method}", "model.placement=resident", f"save={tmp_path}/one", "save_masks=true"
    )
    streamed = run_with(
        *other(cell, tmp_path / "other"), f"method={method}", STREAM, f"save={tmp_path}/two", "save_masks=true"
    )
    first, second = resident.record, streamed.record
    assert not streamed.found
    assert first["key"] == second["key"]
    assert first["identity"] == second["identity"]
    assert second["metrics"]["window_nll"]["wikipedia_mini"] == pytest.approx(
        first["metrics"]["window_nll"]["wikipedia_mini"], rel=1e-6
    )
    timeless = [
        [{name: value for name, value in layer.items() if name != "seconds"} for layer in record["sparsity"]["layers"]]
        for record in (first, second)
    ]
    assert timeless[0] == timeless[1]
    assert {name: value for name, value in first["sparsity"].items() if name != "layers"} == {
        name: value for name, value in second["sparsity"].items() if name != "layers"
    }
    ours, theirs = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    if method != "dense":
        masks = [dass_exp.load_masks(tmp_path / name / "masks.safetensors") for name in ("one", "two")]
        assert all(torch.equal(keep, masks[1][name]) for name, keep in masks[0].items())
        assert streamed.dense["key"] == resident.dense["key"]
        assert streamed.dense["metrics"]["perplexity"]["wikipedia_mini"] == pytest.approx(
            resident.dense["metrics"]["perplexity"]["wikipedia_mini"], rel=1e-6
        )


def test_the_saved_model_loads_and_scores_the_same(cell, tmp_path):
    record = run_with(*cell, STREAM, f"save={tmp_path}/saved").record
    assert len(list((tmp_path / "saved").glob("model-0000?-of-00003.safetensors"))) == 3
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert model.config.model_type == "llama"
    cell = [part for part in cell if not part.startswith("model.")]
    again = run_with(*cell, "method=dense", f"model.path={tmp_path}/saved").record
    assert again["metrics"]["perplexity"]["wikipedia_mini"] == pytest.approx(
        record["metrics"]["perplexity"]["wikipedia_mini"], rel=1e-6
    )
    assert "pruned by dass_exp: dass" in again["protocol"]["model_note"]
    assert run_with(*cell, "method=dense", STREAM, f"model.path={tmp_path}/saved").found


def test_the_model_is_read_once_and_never_loaded_whole(cell, monkeypatch):
    reads, inner = [], Shards.read
    monkeypatch.setattr(
        Shards, "read", lambda shards, names, dtype: reads.extend(names := list(names)) or inner(shards, names, dtype)
    )
    monkeypatch.setattr("dass_exp.models.load.load_model", lambda spec: pytest.fail("loaded whole"))
    outcome = run_with(*cell, STREAM)
    assert len(reads) == len(set(reads)) == 2 * 9 + 3
    assert outcome.dense["metrics"]["perplexity"]
    assert run_with(*cell, "method=dense").found


SMALL = ["eval=mini", "eval.perplexity.context=32", "eval.perplexity.max_windows=4", "eval.zeroshot.limit=3"]


def without_eval(cell):
    return [part for part in cell if not part.startswith("eval")]


def test_zero_shot_is_left_out_with_a_word(cell, caplog):
    record = run_with(*without_eval(cell), *SMALL, STREAM).record
    assert contains(caplog.text.strip(), ["zero-shot tasks are left out", "save=FOLDER keeps it"])
    assert set(record["metrics"]) == {"perplexity", "window_nll", "predicted_tokens_per_window"}
    assert record["key"] == run_with(*without_eval(cell), *SMALL, STREAM, "eval.zeroshot=null").record["key"]


def test_tasks_alone_cannot_be_left_out(cell):
    with pytest.raises(
        UserError, match=r"zero-shot tasks, which are all that is asked for, cannot be scored: save=FOLDER"
    ):
        run_with(*without_eval(cell), "eval=zeroshot_mini", "eval.zeroshot.limit=2", STREAM, "method=dense")


def test_zero_shot_runs_on_the_saved_model_where_it_fits(cell, tmp_path, caplog):
    cell = without_eval(cell)
    streamed = run_with(*cell, *SMALL, STREAM, f"save={tmp_path}/saved")
    assert "left out" not in caplog.text
    resident = run_with(*other(cell, tmp_path / "other"), *SMALL, "model.placement=resident")
    for ours, theirs in ((streamed.record, resident.record), (streamed.dense, resident.dense)):
        assert ours["key"] == theirs["key"]
        assert ours["metrics"]["tasks"] == theirs["metrics"]["tasks"]
        assert ours["metrics"]["perplexity"]["wikipedia_mini"] == pytest.approx(
            theirs["metrics"]["perplexity"]["wikipedia_mini"], rel=1e-6
        )
    assert run_with(*cell, *SMALL, STREAM, f"save={tmp_path}/saved").found


def test_zero_shot_is_left_out_where_the_saved_model_does_not_fit(cell, tmp_path, caplog, monkeypatch):
    cell = without_eval(cell)
    monkeypatch.setattr("dass_exp.runs.settled.available", lambda device: memory.BASE)
    record = run_with(*cell, *SMALL, STREAM, f"save={tmp_path}/saved").record
    assert contains(
        caplog.text.strip(),
        ["zero-shot tasks are left out", "the model alone needs 1.0 GB", f"score {tmp_path}/saved where it fits"],
    )
    assert "tasks" not in record["metrics"]


@pytest.mark.parametrize("placement", ["stream", "resident", "auto"])
@pytest.mark.parametrize("harm", ["missing", "damaged", "empty", "index", "shape"])
def test_a_bad_shard_is_one_line_and_leaves_no_record(cell, tiny, tmp_path, results, harm, placement):
    folder = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder, max_shard_size="30KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    victim = sorted(folder.glob("model-*.safetensors"))[-1]
    if harm == "missing":
        victim.unlink()
    elif harm in ("damaged", "empty"):
        victim.write_bytes(victim.read_bytes()[:-5] if harm == "damaged" else b"")
    elif harm == "index":
        victim = folder / "model.safetensors.index.json"
        victim.write_text('{"weight_map": []}')
    else:
        weights = load_file(victim)
        save_file(
            {name: tensor[:1].contiguous() for name, tensor in weights.items()}, victim, metadata={"format": "pt"}
        )
    with pytest.raises(UserError) as caught:
        run_with(
            *[part for part in cell if not part.startswith("model.p")],
            f"model.path={folder}",
            f"model.placement={placement}",
            f"save={tmp_path}/saved",
        )
    assert contains(str(caught.value), [victim.name if harm != "shape" else str(folder), "fetch it again"])
    assert not list(results.glob("runs/*/result.json"))
    assert not (tmp_path / "saved").exists()


def test_a_disk_that_fills_up_leaves_no_record_and_no_checkpoint_and_goes_on_when_there_is_room(
    cell, tmp_path, results, monkeypatch
):
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


def test_a_model_whose_logits_are_not_those_of_its_head_is_refused_here_too(tmp_path, tiny, cell):
    config = transformers.GraniteConfig(**{**tiny_config().to_dict(), "model_type": "granite", "logits_scaling": 8.0})
    folder, rest = save_tiny(tmp_path / "model", config), [part for part in cell if not part.startswith("model.path")]
    for placement in ("stream", "resident"):
        with pytest.raises(UserError, match="its logits are not what its head gives"):
            run_with(*rest, f"model.path={folder}", f"model.placement={placement}", "rerun=true")


def test_what_a_run_left_that_was_killed_before_its_first_block_is_not_taken_over(cell, tmp_path):
    made = tmp_path / ".saved.partial" / "made"
    made.mkdir(parents=True)
    (made / "model-00002-of-00099.safetensors").write_bytes(b"of another model")
    run_with(*cell, STREAM, f"save={tmp_path}/saved")
    assert not list((tmp_path / "saved").glob("*-of-00099.safetensors"))


def test_two_runs_do_not_save_into_one_folder(cell, tmp_path):
    for placement in ("stream", "resident"):
        with checkpoint.writing(tmp_path / "saved"):
            for _ in range(2):  # one that is turned away does not let the next one in
                with pytest.raises(UserError, match=r"save=.*another run is writing to it"):
                    run_with(*cell, f"model.placement={placement}", f"save={tmp_path}/saved")
    run_with(*cell, STREAM, f"save={tmp_path}/saved")
    assert sorted(path.name for path in tmp_path.iterdir() if "saved" in path.name) == ["saved"]


@pytest.mark.parametrize("harm", ["tied", "quantised", "missing"])
def test_what_only_transformers_can_read_is_refused(cell, tiny, tmp_path, harm):
    folder, rest = tmp_path / "model", [part for part in cell if not part.startswith("model.path")]
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
    word = {"tied": "with other values than those of", "quantised": "is quantised", "missing": "has no tensor"}[harm]
    with pytest.raises(UserError, match=word):
        run_with(*rest, f"model.path={folder}", STREAM)
    if harm == "missing":  # transformers would make it up
        with pytest.raises(UserError, match=r"its checkpoint has no model\.layers\.1\.mlp\.up_proj\.weight"):
            run_with(*rest, f"model.path={folder}", "model.placement=resident")


def test_a_tied_head_that_is_stored_too_is_no_other_model(cell, tiny, tmp_path):
    config = tiny_config(tie_word_embeddings=True)
    folder, rest = save_tiny(tmp_path / "model", config), [part for part in cell if not part.startswith("model.path")]
    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    resident = run_with(*rest, f"model.path={folder}", "model.placement=resident", f"save={tmp_path}/one").record
    streamed = run_with(*rest, f"model.path={folder}", STREAM, f"save={tmp_path}/two", "rerun=true").record
    assert streamed["metrics"]["window_nll"]["wikipedia_mini"] == pytest.approx(
        resident["metrics"]["window_nll"]["wikipedia_mini"], rel=1e-6
    )
    assert weights_of(tmp_path / "one").keys() == weights_of(tmp_path / "two").keys() == weights.keys()


# --- where a model goes


NEEDS = MemoryNeeds(
    model=10_000_000_000,
    block=500_000_000,
    ahead=500_000_000,
    outside=300_000_000,
    activations=100,
    windows=100,
    solver=100,
    batch=100,
)


def test_sizes_add_up():
    assert NEEDS.resident == memory.BASE + 10_000_000_300
    assert NEEDS.streamed == memory.BASE + 1_300_000_400
    assert "model 10.00, block 0.50, ahead 0.50" in NEEDS.told()


@pytest.mark.parametrize(
    ("asked", "free", "expected"),
    [
        ("auto", 20e9, "resident"),
        ("auto", 11e9, "stream"),
        ("auto", 3e9, "stream"),
        ("resident", 11e9, "resident"),
        ("stream", 1e12, "stream"),
    ],
)
def test_a_model_goes_where_it_fits(asked, free, expected):
    placement, why = choose_placement(asked, NEEDS, int(free))
    assert placement == expected
    assert contains(why, ["10.7 GB with the whole model in memory, 2.0 GB block by block"])
    assert ("the model is read block by block: " in why and "block 0.50" in why) == (expected == "stream")


def test_what_fits_whole_and_not_block_by_block_is_loaded():
    many = dataclasses.replace(NEEDS, windows=20_000_000_000)
    assert choose_placement("auto", many, many.resident + 10)[0] == "resident"


@pytest.mark.parametrize(("asked", "free"), [("auto", 1e9), ("resident", 5e9), ("stream", 1.5e9)])
def test_what_cannot_fit_is_told_with_the_numbers(asked, free):
    with pytest.raises(UserError) as caught:
        choose_placement(asked, NEEDS, int(free))
    assert contains(
        str(caught.value),
        [
            f"model.placement={asked}",
            "10.7 GB with the whole model",
            "2.0 GB block by block",
            f"{free / 1e9:.1f} GB are free",
        ],
    )


def test_auto_streams_where_memory_is_short(cell, monkeypatch, caplog):
    cell = [*without_eval(cell), "eval=none"]  # whose windows take more than this model
    whole = Bench(settings_of(*cell), SilentReporter()).needs
    monkeypatch.setattr("dass_exp.runs.context.available", lambda device: whole.resident + 10)
    assert Bench(settings_of(*cell), SilentReporter()).streams
    assert contains(
        caplog.records[-1].getMessage(), ["model.placement=auto: the model is read block by block", "GB are free"]
    )


def test_sizes_are_those_of_the_model(cell, tiny):
    bench = Bench(settings_of(*cell, "method=sparsegpt"), SilentReporter())
    model = load_model(bench.spec)
    found = bench.needs
    assert found.model == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert found.model == found.outside + 2 * found.block
    assert found.activations == 3 * 4 * 32 * 32 * 4
    assert found.windows == 2 * 4 * 32 * 32 * 4
    assert found.solver >= 4 * (32**2 + 64**2) + 8 * 64**2
    assert Bench(settings_of(*cell, "method=dense"), SilentReporter()).needs.solver == 0
    aside = Bench(settings_of(*cell, "calibration.cache=disk"), SilentReporter()).needs
    assert (aside.activations, aside.windows) == (0, 0)
    assert (
        Bench(settings_of(*cell, "calibration.cache=cpu"), SilentReporter()).needs
        == Bench(settings_of(*cell), SilentReporter()).needs
    )  # the model is there too
    assert (
        Bench(settings_of(*cell, "eval.batch_size=16"), SilentReporter()).needs.batch
        > Bench(settings_of(*cell), SilentReporter()).needs.batch
    )
    scope = sum(parameter.numel() for name, parameter in model.named_parameters() if ".mlp." in name)
    assert (
        Bench(settings_of(*cell), SilentReporter(), Shelf()).needs.copy,
        Bench(settings_of(*cell), SilentReporter()).needs.copy,
    ) == (4 * scope, 0)


def test_a_mixture_is_there_twice_while_its_experts_are_joined(cell, mixture):
    found = Bench(
        settings_of(*[part for part in cell if not part.startswith("model.path")], f"model.path={mixture}"),
        SilentReporter(),
    ).needs
    assert found.ahead == 2 * found.block


FILES = {
    "": ("max", "current", "inactive_file"),
    "memory": ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
    "cpu,memory": ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
}


def system(folder, free, groups, version):
    """A machine with so many bytes free and control groups with limit, use and cache; the last is that of this process."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {free // 1024} kB\n")
    root = place = folder / "sys/fs/cgroup" / version
    limit, usage, cache = FILES[version]
    for name, most, taken, cached in groups:
        place = place / name
        place.mkdir(parents=True, exist_ok=True)
        content = f"anon 5\n{cache} {cached - cached // 3}\n{cache.replace('inactive', 'active')} {cached // 3}\n"
        for file, text in (
            (limit, most),
            (usage, taken),
            ("stat", content),
            *([("high", "max")] if not version else []),
        ):
            (place / f"memory.{file}").write_text(f"{text}\n")
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
    groups = [(name, "max" if most == 1 << 62 and not version else most, *rest) for name, most, *rest in groups]
    assert memory.available(torch.device("cpu"), system(tmp_path, 1 << 30, groups, version)) == expected


def test_a_limit_that_throttles_counts_too(tmp_path):
    folder = system(tmp_path, 1 << 30, [("job", "max", 300, 0)], "")
    (folder / "sys/fs/cgroup/job/memory.high").write_text("800\n")
    assert memory.available(torch.device("cpu"), folder) == 500


def test_where_nobody_says_how_much_is_free_the_user_decides(tmp_path):
    assert memory.available(torch.device("cpu"), tmp_path) == 1 << 62
    assert 0 < memory.available(torch.device("cpu")) < 1 << 60


@pytest.mark.parametrize("placement", ["auto", "resident", "stream"])
def test_what_cannot_fit_is_not_begun(cell, results, placement, monkeypatch):
    monkeypatch.setattr("dass_exp.runs.context.available", lambda device: 1000)
    with pytest.raises(UserError, match=f"model.placement={placement}: this run needs"):
        run_with(*cell, f"model.placement={placement}")
    assert not list(results.glob("runs/*/result.json"))


def test_a_model_that_a_sweep_holds_counts_as_memory_at_hand_and_goes_where_another_is_wanted(cell, monkeypatch):
    shelf, cell = Shelf(), [*without_eval(cell), "eval=none"]
    first = Bench(settings_of(*cell), SilentReporter(), shelf)
    assert first.model is not None
    settings = settings_of(*cell, "method=sparsegpt")
    wanted = Bench(settings, SilentReporter(), shelf).needs
    monkeypatch.setattr("dass_exp.runs.memory._SHARE", 1.0)
    monkeypatch.setattr("dass_exp.runs.context.available", lambda device: wanted.resident - wanted.model)
    assert not Bench(settings, SilentReporter(), shelf).streams
    monkeypatch.setattr("dass_exp.runs.context.available", lambda device: wanted.resident - wanted.model - 1)
    assert Bench(settings, SilentReporter(), shelf).streams
    assert shelf.model(first.spec) is None
    shelf.put(first.spec, first.model)
    monkeypatch.setattr("dass_exp.runs.context.available", lambda device: wanted.resident)
    assert Bench(settings_of(*cell, STREAM), SilentReporter(), shelf).streams
    assert shelf.model(first.spec) is None


def test_attention_by_plain_products_keeps_scores(cell, tmp_path):
    config = tiny_config(hidden_size=32)
    sizes = {}
    for implementation in ("eager", "sdpa"):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        work = memory.Work(None, None, 1, 2, torch.bfloat16, torch.device("cpu"))
        sizes[implementation] = memory.needs(decoder_of(model), model, (0, 0), (4, 100), work).batch
    assert sizes["eager"] - sizes["sdpa"] == 2 * 4 * 100 * 100 * (4 + 3 * 2)


def test_the_sizes_are_printed_before_a_streamed_run(cell, caplog):
    caplog.set_level("INFO")
    run_with(*cell, STREAM)
    messages = [record.getMessage() for record in caplog.records]
    assert contains(
        next(text for text in messages if "read block by block" in text),
        ["model.placement=stream", "GB are free", "solver", "activations"],
    )


def test_a_plan_says_where_the_model_goes_and_that_a_saved_one_is_missing(cell, tmp_path, monkeypatch):
    assert "it is loaded whole" in plan(settings_of(*cell)).needs
    assert "it is read block by block" in plan(settings_of(*cell, STREAM)).needs
    run_with(*cell)
    assert plan(settings_of(*cell)).done
    assert not plan(settings_of(*cell, f"save={tmp_path}/saved")).done
    assert not plan(settings_of(*cell, "save_masks=true")).done
    monkeypatch.setattr("dass_exp.runs.context.available", lambda device: 1000)
    with pytest.raises(UserError, match=r"model\.placement=stream: this run needs"):
        plan(settings_of(*cell, STREAM, "rerun=true"))


def test_an_unknown_placement_is_refused(cell):
    with pytest.raises(UserError, match=r"model\.placement='gpu': expected one of auto, resident, stream"):
        run_with(*cell, "model.placement=gpu")


@pytest.fixture(params=["mixtral", "qwen3_moe"], name="mixture")
def mixture_fixture(request, tmp_path, tiny_model, tiny):
    """A folder with a mixture, whose experts transformers stores one by one."""
    tiny_model(request.param, vocab_size=512).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, tmp_path / "model")
    assert any(".experts.0." in name for name in load_file(tmp_path / "model" / "model.safetensors"))
    return tmp_path / "model"


@pytest.mark.parametrize("method", ["dass", "sparsegpt"])
def test_a_streamed_mixture_is_saved_as_a_resident_one(cell, mixture, tmp_path, method):
    rest = [
        *[part for part in cell if not part.startswith("model.path")],
        f"model.path={mixture}",
        f"method={method}",
        "save_masks=true",
    ]
    resident = run_with(*rest, "model.placement=resident", f"save={tmp_path}/one").record
    streamed = run_with(*other(rest, tmp_path / "other"), STREAM, f"save={tmp_path}/two").record
    assert streamed["key"] == resident["key"]
    assert streamed["metrics"]["window_nll"]["wikipedia_mini"] == pytest.approx(
        resident["metrics"]["window_nll"]["wikipedia_mini"], rel=1e-6
    )
    ours, theirs = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert ours.keys() == theirs.keys() == weights_of(mixture).keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    masks = [dass_exp.load_masks(tmp_path / name / "masks.safetensors") for name in ("one", "two")]
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(keep, masks[1][name]) for name, keep in masks[0].items())
    again = run_with(*rest[:-2], "method=dense", f"model.path={tmp_path}/two").record
    assert again["metrics"]["perplexity"]["wikipedia_mini"] == pytest.approx(
        streamed["metrics"]["perplexity"]["wikipedia_mini"], rel=1e-6
    )


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_mixture_with_a_bad_expert_is_one_line(cell, mixture, harm):
    weights = load_file(mixture / "model.safetensors")
    name = next(name for name in sorted(weights) if ".experts.2." in name)
    piece = weights.pop(name)
    if harm == "cut":
        weights[name] = piece[:-1].contiguous()
    save_file(weights, mixture / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        run_with(*[part for part in cell if not part.startswith("model.path")], f"model.path={mixture}", STREAM)
    assert contains(str(caught.value), ["model.placement=stream", ".mlp.experts."])
    assert "\n" not in str(caught.value)
