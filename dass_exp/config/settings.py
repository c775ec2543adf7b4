"""The typed settings of a run, and their validation. Building or validating settings loads no model and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dass_exp.config.components import OURS, build, check_targets, choice
from dass_exp.data import texts
from dass_exp.data import tokens as data
from dass_exp.engine.activation_cache import CACHES
from dass_exp.engine.prune import Options
from dass_exp.errors import UserError, one_of, whole_number
from dass_exp.masks import Pattern
from dass_exp.methods.base import Pruner
from dass_exp.paths import project_root
from dass_exp.runs.track import Tracker


def no_effect(default: Any = MISSING, **settings: Any) -> Any:
    """A field that changes no number: it enters no key, and does not tell one cell of a sweep from another."""
    settings = settings or {"default": default}
    return field(**settings, metadata={"no_effect": True})


@dataclass
class ModelConfig:
    """Which model: ``path`` is a hub id, a folder, ``offline:NAME`` or ``tiny:NAME``. ``bos`` is auto, never, stream or window.

    ``placement`` is resident, stream (block by block from the disk), or auto: as the memory at hand allows. ``training_seed`` picks a training of a tiny
    model, null the first; tables average over them. ``license``, ``parameters`` and ``context`` tell a user what to expect; no number depends on them.
    """

    name: str = no_effect(MISSING)
    path: str = MISSING
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    placement: str = no_effect("auto")
    bos: str = "auto"
    training_seed: int | None = None
    roles: Any = None  # a mapping; typed so, Hydra could not set it from the command line
    accept_license: bool = no_effect(False)
    trust_remote_code: bool = no_effect(False)
    license: str | None = no_effect(None)
    parameters: float | None = no_effect(None)
    context: int | None = no_effect(None)


@dataclass
class CalibrationConfig:
    """Which tokens a method sees. ``batch_size`` sequences pass through a block together; ``cache`` is where activations wait between two blocks: device,
    cpu or disk. Neither changes a number.
    """

    name: str = no_effect(MISSING)
    text: Any = MISSING
    sampling: str = "joined"
    separator: str = "\n\n"
    num_samples: int = 16
    seq_len: int = 512
    batch_size: int = no_effect(4)
    cache: str = no_effect("device")


@dataclass
class ExpertsConfig:
    """What counts as too few tokens for an expert of a mixture, and what is then done: ``level`` or ``refuse``."""

    min_tokens: int = 32
    starved: str = "level"


@dataclass
class PerplexityConfig:
    """Consecutive windows of ``context`` tokens of a text; ``max_windows`` null takes them all."""

    name: str = no_effect(MISSING)
    text: Any = MISSING
    context: int = 2048
    max_windows: int | None = None


@dataclass
class ZeroShotConfig:
    """Tasks of lm-eval; ``limit`` documents of each, null for all; ``data`` is ``offline`` (assets) or ``hub``."""

    tasks: list[str] = MISSING
    limit: int | None = None
    data: str = "hub"


@dataclass
class EvalConfig:
    """What to score. ``batch_size`` changes no number beyond rounding."""

    name: str = no_effect(MISSING)
    perplexity: PerplexityConfig | None = None
    zeroshot: ZeroShotConfig | None = None
    batch_size: int = no_effect(4)


@dataclass
class RunConfig:
    """Everything that defines one run. ``repeat`` numbers runs of one cell whose cost is measured more than once; ``save`` is a folder for its model;
    ``checkpoint`` keeps on disk what is needed to go on behind the last block after a kill (null: if the model is read block by block).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    method: Any = MISSING
    pattern: Any = MISSING
    scope: str = "mlp"
    seed: int = 0
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    protocol: Any = no_effect(MISSING)
    tracker: Any = no_effect(MISSING)
    sweep: Any = no_effect(None)
    threads: int | None = no_effect(None)
    rerun: bool = no_effect(False)
    plan: bool = no_effect(False)
    repeat: int = 0
    save_masks: bool = no_effect(False)
    save: str | None = no_effect(None)
    checkpoint: bool | None = no_effect(None)
    results_dir: str = no_effect("results")
    plugins: list[str] = no_effect(default_factory=list)


def settings_without_effect(schema: type = RunConfig, path: str = "") -> frozenset[str]:
    """Dotted names of all settings that change no number, as their fields say (:func:`no_effect`)."""
    found: set[str] = set()
    types = get_type_hints(schema)
    for entry in fields(schema):
        nested = next((kind for kind in (types[entry.name], *get_args(types[entry.name])) if is_dataclass(kind)), None)
        if entry.metadata.get("no_effect"):
            found.add(path + entry.name)
        elif nested is not None:
            found |= settings_without_effect(nested, f"{path}{entry.name}.")  # type: ignore[arg-type]
    return frozenset(found)


def register() -> None:
    """Make the schema known to Hydra under the name that conf/config.yaml refers to."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)


@dataclass(frozen=True)
class Settings:
    """A validated run: the typed settings and the parts they name."""

    config: RunConfig
    method: Pruner
    pattern: Pattern
    tracker: Tracker
    calibration_text: texts.Text
    cut: data.Cut
    evaluation_text: texts.Text | None


def validate(composed: DictConfig, packages: frozenset[str] = OURS) -> Settings:
    """Check every setting that can be checked without the model, and build the parts.

    Args:
        composed: what Hydra composed.
        packages: whose classes may be built (:func:`dass_exp.config.components.admitted_packages`).

    Raises:
        UserError: names the setting, its value and what is allowed.
    """
    try:
        _check_keys(composed, RunConfig, "")
        check_targets(composed, packages)
        config = OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key or error.key} has no value; set it on the command line") from error
    except OmegaConfBaseException as error:
        raise UserError(" ".join(str(error).split())) from error
    if not isinstance(config, RunConfig):
        raise TypeError(
            f"the composed config is a {type(config).__name__}; conf/config.yaml must list run_schema first"
        )
    _name_model(config.model)
    Options(
        config.scope,
        config.calibration.batch_size,
        min_tokens=config.experts.min_tokens,
        starved=config.experts.starved,
    )
    one_of("calibration.cache", config.calibration.cache, CACHES)
    cut = data.Cut(
        config.calibration.sampling,
        config.calibration.num_samples,
        config.calibration.seq_len,
        config.calibration.separator,
    )
    whole_number("seed", config.seed, least=0)
    whole_number("repeat", config.repeat, least=0)
    if config.threads is not None:
        whole_number("threads", config.threads, least=1)
    whole_number("eval.batch_size", config.eval.batch_size, least=1)
    _check_evaluation(config.eval)
    scored = config.eval.perplexity
    return Settings(
        config=config,
        method=build(config.method, Pruner, "method"),
        pattern=build(config.pattern, Pattern, "pattern"),
        tracker=build(config.tracker, Tracker, "tracker"),
        calibration_text=build(config.calibration.text, texts.Text, "calibration.text"),
        cut=cut,
        evaluation_text=build(scored.text, texts.Text, "eval.perplexity.text") if scored else None,
    )


def _check_keys(node: Any, schema: type, path: str) -> None:
    """Hydra adds whatever stands behind a ``+``: a misspelt setting would change nothing and tell nobody."""
    types = get_type_hints(schema)
    for key in node:
        if key not in types:
            raise UserError(
                f"{path}{key}: there is no such setting; {path.rstrip('.') or 'a run'} has {', '.join(types)}"
            )
        nested = next((kind for kind in (types[key], *get_args(types[key])) if is_dataclass(kind)), None)
        if nested is not None and not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            _check_keys(node[key], nested, f"{path}{key}.")  # type: ignore[arg-type]


def _check_evaluation(evaluation: EvalConfig) -> None:
    if (scored := evaluation.perplexity) is not None:
        whole_number("eval.perplexity.context", scored.context, least=2)
        if scored.max_windows is not None:
            whole_number("eval.perplexity.max_windows", scored.max_windows, least=1)
    if (asked := evaluation.zeroshot) is not None:
        from dass_exp.evaluate import zeroshot

        one_of("eval.zeroshot.data", asked.data, ("offline", "hub"))
        if asked.limit is not None:
            whole_number("eval.zeroshot.limit", asked.limit, least=1)
        zeroshot.check_tasks(asked.tasks, asked.data)


def _name_model(model: ModelConfig) -> None:
    """What a model file says holds only for the path in that file: with another path the name is made from it, and the rest is not known."""
    if (name := name_of(model.name, model.path)) != model.name:
        model.name = name
        model.license = model.parameters = model.context = None


def name_of(name: str, path: str) -> str:
    """The name of a model: that in its file, if the path is that file's too; else the end of the path."""
    known = {file.stem for file in (project_root() / "conf" / "model").glob("*.yaml")}
    return path.rstrip("/").rsplit("/", 1)[-1] if name in known and choice("model", name).get("path") != path else name
