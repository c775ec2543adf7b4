"""The tiny models: equal in all but their MLP, trained completely or not at all, and averaged over training seeds."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import CONF, Killed, compose, run_with
from torch.nn.functional import gelu, relu, silu

from dass_exp import train
from dass_exp.data import texts
from dass_exp.errors import UserError
from dass_exp.models import tiny
from dass_exp.models.tiny import VARIANTS, Recipe

SIZE = {"vocabulary": 300, "hidden": 16, "layers": 1, "heads": 2, "glu_size": 32, "context": 16}
SMALL = {**SIZE, "steps": 6, "batch": 2, "warmup": 1, "perplexity": 1e4}


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


@pytest.mark.thorough
def test_every_variant_has_its_model_file():
    assert sorted(path.stem for path in (CONF / "model").glob("tiny_*.yaml")) == sorted(
        f"tiny_{name}" for name in VARIANTS
    )
    for variant in VARIANTS:
        assert Recipe(variant, 0).name == f"tiny_{variant}"
        assert compose(f"model=tiny_{variant}").model.path == f"tiny:{variant}"


@pytest.mark.thorough
def test_a_training_that_was_killed_ends_in_the_same_weights(cache, monkeypatch):
    recipe = Recipe("gelu", 1, **SMALL)
    whole = load_file(train.train(recipe) / "model.safetensors")
    recipe.folder.rename(cache / "elsewhere")
    step, steps = transformers.Trainer.training_step, []

    def killed_in_the_fourth(*arguments, **settings):
        steps.append(None)
        if len(steps) == 4:
            raise Killed
        return step(*arguments, **settings)

    monkeypatch.setattr(transformers.Trainer, "training_step", killed_in_the_fourth)
    with pytest.raises(Killed):
        train.train(recipe)
    assert not recipe.folder.exists()
    scratch = recipe.folder.with_name(f".training-{recipe.folder.name}")
    (scratch / "checkpoint-4").mkdir()  # what is left by a kill while the second checkpoint is written
    (scratch / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    again = load_file(train.train(recipe) / "model.safetensors")
    assert len(steps) == 4 + 4  # the second training resumes from the checkpoint after step 2
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not scratch.exists()


@pytest.mark.thorough
def test_a_trained_model_is_not_trained_again(cache, monkeypatch):
    recipe = Recipe("swiglu", 0, **SMALL)
    folder = train.train(recipe)
    summary = json.loads((folder / "training.json").read_text())
    assert (summary["variant"], summary["training_seed"], summary["tokens_seen"]) == ("swiglu", 0, 6 * 2 * 16)
    assert summary["parameters"] == model_of(recipe).num_parameters()
    monkeypatch.setattr(transformers, "Trainer", lambda **settings: pytest.fail("trained twice"))
    assert train.train(recipe) == folder


@pytest.mark.thorough
def test_a_model_that_is_not_good_enough_is_not_kept(cache):
    recipe, message = (
        Recipe("reglu", 0, **{**SMALL, "perplexity": 2.0}),
        r"held-out perplexity .*, above the 2.0 of its",
    )
    with pytest.raises(UserError, match=f"tiny_reglu, training seed 0: {message} recipe"):
        train.train(recipe)
    assert not recipe.folder.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=tiny_reglu"], "make tiny-models"),
        (["model=tiny_reglu", "model.training_seed=7"], "dass_exp.train reglu --training-seeds 7"),
        (["model=tiny_gelu", "model.path=tiny:relu2"], "swiglu, geglu, reglu, gelu"),
        (["model=tiny_gelu", "model.training_seed=-1"], "training_seed=-1"),
        (["model.training_seed=1"], "leave it null"),
    ],
)
def test_the_error_for_an_untrained_model_says_how_to_train_it(cache, overrides, message):
    with pytest.raises(UserError, match=message):
        run_with(*overrides, "tracker=none", f"results_dir={cache}/results")


def test_a_wrong_command_is_a_one_line_error(caplog):
    assert train.main(["relu2"]) == 1
    assert "swiglu, geglu, reglu, gelu" in caplog.text


@pytest.mark.thorough
def test_trainings_of_one_recipe_differ_in_their_weights_and_are_repetitions(cache, monkeypatch):
    recipes = {seed: Recipe("geglu", seed, **SMALL) for seed in (0, 1)}
    monkeypatch.setattr(tiny, "trained_recipe", lambda variant, seed: recipes[seed or 0])
    identities = []
    for seed, recipe in recipes.items():
        train.train(recipe)
        overrides = ["model=tiny_geglu", f"model.training_seed={seed}", "method=dense", "eval=ppl_mini", "tracker=none"]
        limits = ["eval.perplexity.context=16", "eval.perplexity.max_windows=1", f"results_dir={cache}/results"]
        record = run_with(*overrides, *limits).record
        assert record["protocol"]["bos"] == "never"
        identities.append(record["identity"])
    assert identities[0]["model"] != identities[1]["model"]
    digest = recipes[0].digest
    assert [one["trained"] for one in identities] == [
        {"recipe": f"tiny:geglu@{digest}", "seed": seed} for seed in (0, 1)
    ]


def test_the_digest_depends_on_everything_but_the_training_seed_and_the_required_perplexity():
    digest = Recipe("swiglu", 0).digest
    assert Recipe("swiglu", 1).digest == digest == Recipe("swiglu", 0, perplexity=3.0).digest
    others = {Recipe(variant, 0).digest for variant in VARIANTS} | {Recipe("swiglu", 0, steps=3).digest}
    assert len(others) == len(VARIANTS) + 1
