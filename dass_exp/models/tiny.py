"""Tiny models that differ in their MLP only: their recipes, and where a trained one lies.

They ask one question under control: does a method depend on the activation, or on there being a GLU? Same text, same tokenizer, same size,
same number of steps; the MLP and the seed of the training are all that differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dass_exp.data import assets
from dass_exp.errors import UserError, one_of, whole_number
from dass_exp.paths import cache_dir

TRAINING_VERSION = 1  # raised when the same recipe would train another model
TRAINING_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Mlp:
    """What a variant's MLP is.

    Args:
        activation: its name in transformers' table.
        gated: act(gate x) * (up x), three matrices (arXiv 2002.05202); else act(W x), two.
        model_type: of transformers: LLaMA, or Arcee, which is LLaMA with a plain MLP.
    """

    activation: str
    gated: bool
    model_type: str


VARIANTS = {
    "swiglu": Mlp("silu", gated=True, model_type="llama"),
    "geglu": Mlp("gelu", gated=True, model_type="llama"),
    "reglu": Mlp("relu", gated=True, model_type="llama"),
    "gelu": Mlp("gelu", gated=False, model_type="arcee"),
}


@dataclass(frozen=True)
class Recipe:
    """All that decides what a tiny model becomes, but for the rounding of the machine that trains it.

    Args:
        variant: key of :data:`VARIANTS`.
        training_seed: of its first weights and of the order of its text.
        glu_size: intermediate features of a GLU; a plain MLP has half as many again, so that both have the same number of weights.
        context: tokens of a training sequence, and the most that the model takes.
        learning_rate: at its peak; it rises over ``warmup`` steps and falls along a cosine to nothing.
        perplexity: that the trained model must reach on the held-out articles, or it is not kept.
    """

    variant: str
    training_seed: int
    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    glu_size: int = 384
    context: int = 128
    steps: int = 1500
    batch: int = 32
    learning_rate: float = 5e-3
    warmup: int = 100
    weight_decay: float = 0.1
    perplexity: float = 70.0

    def __post_init__(self) -> None:
        one_of("variant", self.variant, tuple(VARIANTS))
        whole_number("model.training_seed", self.training_seed, least=0)

    @property
    def mlp(self) -> Mlp:
        """What its MLP is."""
        return VARIANTS[self.variant]

    @property
    def name(self) -> str:
        """For tables and messages."""
        return f"tiny_{self.variant}"

    @property
    def digest(self) -> str:
        """12 hex digits over what is trained, its training seed apart, and the texts."""
        settings = {
            key: value for key, value in dataclasses.asdict(self).items() if key not in ("training_seed", "perplexity")
        }
        told = {
            "version": TRAINING_VERSION,
            "recipe": settings,
            "texts": {name: assets.TEXTS[name].sha256 for name in ("c4", "wikipedia")},
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """Where the trained model lies or will lie."""
        return cache_dir() / "models" / f"{self.name}-{self.digest}-{self.training_seed}"

    def config(self) -> dict[str, Any]:
        """The settings of its transformers config."""
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


def trained(variant: str, training_seed: int | None) -> Recipe:
    """The recipe of a model that was trained before.

    Raises:
        UserError: there is no such variant, or it was not trained on this machine yet.
    """
    if variant not in VARIANTS:
        raise UserError(f"model.path=tiny:{variant}: the tiny models are {', '.join(VARIANTS)}")
    recipe = Recipe(variant, TRAINING_SEEDS[0] if training_seed is None else training_seed)
    if not assets.complete(recipe.folder):
        command = (
            "`make tiny-models`"
            if recipe.training_seed in TRAINING_SEEDS
            else f"`python -m dass_exp.train {variant} --training-seeds {training_seed}`"
        )
        raise UserError(
            f"model.path=tiny:{variant}, model.training_seed={recipe.training_seed}: it is not trained yet; run {command} once (minutes a model)"
        )
    return recipe
