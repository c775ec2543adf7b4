"""The tiny models: equal in all but their MLP, trained whole or not at all, and averaged over like seeds."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import CONF, compose, run_with, settings_of
from torch.nn.functional import gelu, relu, silu

from dass_exp import train
from dass_exp.data import texts
from dass_exp.errors import UserError
from dass_exp.models import tiny
from dass_exp.models.tiny import VARIANTS, Recipe
from dass_exp.runs.identity import identity_of
from dass_exp.runs.run import Bench, SilentReporter

SMALL = {
    "vocabulary": 300,
    "hidden": 16,
    "layers": 1,
    "heads": 2,
    "glu_size": 32,
    "context": 16,
    "steps": 6,
    "batch": 2,
    "warmup": 1,
    "perplexity": 1e4,
}


def model_of(recipe):
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(recipe.mlp.model_type, **recipe.config())
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(train, "_SAVED_EVERY", 2)
    whole = texts.OfflineText.documents
    monkeypatch.setattr(texts.OfflineText, "documents", lambda text: [document[:2000] for document in whole(text)[:20]])
    return tmp_path


def test_the_variants_are_of_equal_size():
    sizes = {variant: model_of(Recipe(variant, 0)).num_parameters() for variant in VARIANTS}
    assert len(set(sizes.values())) == 1
    assert 0.9e6 < sizes["swiglu"] < 1.3e6


def test_every_size_can_be_pruned_in_groups_of_eight():
    for variant in VARIANTS:
        for name, parameter in model_of(Recipe(variant, 0)).named_parameters():
            assert all(size % 8 == 0 for size in parameter.shape), name


@pytest.mark.parametrize(("variant", "act"), {"swiglu": silu, "geglu": gelu, "reglu": relu, "gelu": gelu}.items())
def test_a_variant_computes_what_it_is_called(variant, act):
    mlp = model_of(Recipe(variant, 0)).model.layers[0].mlp
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    up = x @ mlp.up_proj.weight.T
    hidden = act(up) if variant == "gelu" else act(x @ mlp.gate_proj.weight.T) * up
    torch.testing.assert_close(mlp(x), hidden @ mlp.down_proj.weight.T)


def test_every_variant_has_its_model_file():
    assert {path.stem for path in (CONF / "model").glob("tiny_*.yaml")} == {
        Recipe(variant, 0).name for variant in VARIANTS
    }
    assert {compose(f"model=tiny_{variant}").model.path for variant in VARIANTS} == {
        f"tiny:{variant}" for variant in VARIANTS
    }


class Killed(Exception):
    pass


def test_a_training_that_was_killed_ends_in_the_same_weights(cache, monkeypatch):
    recipe = Recipe("gelu", 1, **SMALL)
    whole = load_file(train.train(recipe) / "model.safetensors")
    recipe.folder.rename(cache / "elsewhere")
    step, taken = transformers.Trainer.training_step, []

    def fragile(*arguments, **settings):
        taken.append(None)
        if len(taken) == 4:
            raise Killed
        return step(*arguments, **settings)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(transformers.Trainer, "training_step", fragile)
        train.train(recipe)
    assert not recipe.folder.exists()
    scratch = recipe.folder.with_name(f".training-{recipe.folder.name}")
    (scratch / "checkpoint-4").mkdir()  # what a kill leaves that comes while the second checkpoint is written
    (scratch / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(
        transformers.Trainer,
        "training_step",
        lambda *arguments, **settings: taken.append(None) or step(*arguments, **settings),
    )
    again = load_file(train.train(recipe) / "model.safetensors")
    assert len(taken) == 4 + 4  # the steps from the checkpoint at 2 on, not all six
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not scratch.exists()


def test_a_trained_model_is_not_trained_again(cache, monkeypatch):
    recipe = Recipe("swiglu", 0, **SMALL)
    folder = train.train(recipe)
    told = json.loads((folder / "training.json").read_text())
    assert (told["variant"], told["training_seed"], told["tokens_seen"]) == ("swiglu", 0, 6 * 2 * 16)
    assert told["parameters"] == model_of(recipe).num_parameters()
    monkeypatch.setattr(transformers, "Trainer", lambda **settings: pytest.fail("trained twice"))
    assert train.train(recipe) == folder


def test_a_model_that_is_not_good_enough_is_not_kept(cache):
    recipe = Recipe("reglu", 0, **{**SMALL, "perplexity": 2.0})
    with pytest.raises(
        UserError, match=r"tiny_reglu, training seed 0: held-out perplexity .*, above the 2.0 of its recipe"
    ):
        train.train(recipe)
    assert not recipe.folder.exists()


def test_what_is_not_trained_says_how(cache):
    for overrides, word in (
        (["model=tiny_reglu"], "make tiny-models"),
        (["model=tiny_reglu", "model.training_seed=7"], "dass_exp.train reglu --training-seeds 7"),
    ):
        with pytest.raises(UserError, match=word):
            run_with(*overrides, "tracker=none", f"results_dir={cache}/results")
    with pytest.raises(UserError, match="swiglu, geglu, reglu, gelu"):
        run_with("model=tiny_gelu", "model.path=tiny:relu2", "tracker=none", f"results_dir={cache}/results")
    with pytest.raises(UserError, match="training_seed=-1"):
        run_with("model=tiny_gelu", "model.training_seed=-1", "tracker=none", f"results_dir={cache}/results")
    with pytest.raises(UserError, match="leave it null"):
        run_with("model.training_seed=1", "tracker=none", f"results_dir={cache}/results")


def test_a_wrong_command_is_told_in_a_line(caplog):
    assert train.main(["relu2"]) == 1
    assert "swiglu, geglu, reglu, gelu" in caplog.text


def test_trainings_of_one_recipe_differ_in_their_weights_and_are_repetitions(cache, monkeypatch):
    known = {seed: Recipe("geglu", seed, **SMALL) for seed in (0, 1)}
    monkeypatch.setattr(tiny, "trained", lambda variant, seed: known[seed or 0])
    found = []
    for seed, recipe in known.items():
        train.train(recipe)
        settings = settings_of("model=tiny_geglu", f"model.training_seed={seed}")
        bench = Bench(settings, SilentReporter())
        found.append(identity_of(settings, bench.spec, bench.bos))
    assert bench.bos == "never"
    assert found[0]["model"] != found[1]["model"]
    assert [one["trained"] for one in found] == [
        {"recipe": f"tiny:geglu@{known[0].digest}", "seed": seed} for seed in known
    ]


def test_the_digest_is_of_what_is_trained():
    digest = Recipe("swiglu", 0).digest
    assert Recipe("swiglu", 1).digest == digest == Recipe("swiglu", 0, perplexity=3.0).digest
    assert (
        len({Recipe(variant, 0).digest for variant in VARIANTS} | {Recipe("swiglu", 0, steps=3).digest})
        == len(VARIANTS) + 1
    )
