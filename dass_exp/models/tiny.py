"""Recipes of tiny models that differ in their MLP and training seed only, and the folders of the trained ones.

A controlled experiment: does a method depend on the activation, or on the MLP being a GLU? Text, tokenizer, size and
number of steps are the same.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dass_exp.data import assets
from dass_exp.errors import UserError, one_of, whole_number
from dass_exp.paths import cache_dir

TRAINING_VERSION = 1  # raise it when a change of the code changes the model that a recipe trains
TRAINING_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Mlp:
    """The MLP of a variant."""

    activation: str  # its name in transformers
    gated: bool  # act(gate x) * (up x), three matrices (arXiv 2002.05202); else act(W x), two
    model_type: str  # of transformers; Arcee is LLaMA with a plain MLP


VARIANTS = {
    "swiglu": Mlp("silu", gated=True, model_type="llama"),
    "geglu": Mlp("gelu", gated=True, model_type="llama"),
    "reglu": Mlp("relu", gated=True, model_type="llama"),
    "gelu": Mlp("gelu", gated=False, model_type="arcee"),
}


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a trained tiny model, except the rounding of the machine that trains it."""

    variant: str  # key of VARIANTS
    training_seed: int  # of the initial weights and of the order of the training sequences
    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    glu_size: int = 384  # intermediate size of a GLU; of a plain MLP it is 1.5 times that, for as many weights
    context: int = 128  # tokens of a training sequence; the model's maximum
    steps: int = 1500
    batch: int = 32
    learning_rate: float = 5e-3  # peak value, after a linear warmup and before cosine decay to zero
    warmup: int = 100
    weight_decay: float = 0.1
    perplexity: float = 70.0  # a trained model is accepted up to this perplexity on the held-out articles

    def __post_init__(self) -> None:
        one_of("variant", self.variant, tuple(VARIANTS))
        whole_number("model.training_seed", self.training_seed, least=0)

    @property
    def mlp(self) -> Mlp:
        """The MLP of its variant."""
        return VARIANTS[self.variant]

    @property
    def name(self) -> str:
        """For tables and messages."""
        return f"tiny_{self.variant}"

    @property
    def digest(self) -> str:
        """12 hex digits of a SHA-256 over the recipe, without its training seed, and the texts."""
        settings = dataclasses.asdict(self)
        del settings["training_seed"], settings["perplexity"]
        texts = {name: assets.TEXTS[name].sha256 for name in ("c4", "wikipedia")}
        identity = {"version": TRAINING_VERSION, "recipe": settings, "texts": texts}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """The folder of the trained model, whether it exists or not."""
        return cache_dir() / "models" / f"{self.name}-{self.digest}-{self.training_seed}"

    def config(self) -> dict[str, Any]:
        """Return the arguments of its transformers config."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "intermediate_size": self.glu_size if self.mlp.gated else self.glu_size * 3 // 2,
            "hidden_act": self.mlp.activation,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
            "use_cache": False,
        }


def trained_recipe(variant: str, training_seed: int | None) -> Recipe:
    """Return the recipe of a model that is already trained on this machine; by default of the first training seed.

    Raises:
        UserError: there is no such variant, or it is not trained yet.
    """
    if variant not in VARIANTS:
        raise UserError(f"model.path=tiny:{variant}: the tiny models are {', '.join(VARIANTS)}")
    recipe = Recipe(variant, TRAINING_SEEDS[0] if training_seed is None else training_seed)
    if not assets.is_complete(recipe.folder):
        seed, command = recipe.training_seed, "make tiny-models"
        if seed not in TRAINING_SEEDS:
            command = f"python -m dass_exp.train {variant} --training-seeds {seed}"
        missing = assets.damage_in(recipe.folder) or "it is not trained yet"
        problem = f"{missing}; run `{command}` once (minutes a model)"
        raise UserError(f"model.path=tiny:{variant}, model.training_seed={seed}: {problem}")
    return recipe
