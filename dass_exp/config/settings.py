"""The typed settings of a run, with the checks of each field. Validating them loads no model and writes nothing."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dass_exp.config.choices import check_choice
from dass_exp.config.components import OURS, check_targets, choice
from dass_exp.errors import UserError, one_line, one_of, whole_number
from dass_exp.paths import project_root

log = logging.getLogger(__name__)

# what is done around a method; each is a config group and a folder
STAGE_GROUPS = ("allocation", "permute", "refine", "repair")
# all groups that do nothing by default; the label of a method names those that do something
OPTIONAL_GROUPS = (*STAGE_GROUPS, "retrain")

MAX_SEED = 2**64 - 1  # of torch's generators
MAX_THREADS = 1024

NO_EFFECT = {"no_effect": True}  # marks a field that changes no number: it is not part of a run's key


@dataclass
class ModelConfig:
    """Which model to prune: ``path`` is a hub id, a folder, ``offline:NAME`` or ``tiny:NAME``.

    ``placement`` is ``resident`` (in memory), ``stream`` (block by block from disk) or ``auto``. ``training_seed``
    picks one of several trainings of a tiny model; tables average over them. docs/settings.md describes every field.
    """

    name: str = field(default=MISSING, metadata=NO_EFFECT)
    path: str = MISSING
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    placement: str = field(default="auto", metadata=NO_EFFECT)
    bos: str = "auto"
    training_seed: int | None = None
    roles: Any = None  # a mapping; if it were typed so, Hydra could not set it from the command line
    accept_license: bool = field(default=False, metadata=NO_EFFECT)
    trust_remote_code: bool = field(default=False, metadata=NO_EFFECT)
    license: str | None = field(default=None, metadata=NO_EFFECT)
    parameters: float | None = field(default=None, metadata=NO_EFFECT)
    context: int | None = field(default=None, metadata=NO_EFFECT)

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype)
        check_choice("model.placement", self.placement)
        check_choice("model.bos", self.bos)


@dataclass
class CalibrationConfig:
    """Which token sequences a method calibrates on.

    ``sampling`` is ``joined``, random windows of all documents joined by ``separator``, or ``document``, a random
    window of a random document that is longer than it; both draw as the Wanda code does. ``seq_len`` includes a
    beginning-of-sequence token. ``cache`` is where activations wait between two blocks: ``device``, ``cpu``, ``disk``.
    """

    name: str = field(default=MISSING, metadata=NO_EFFECT)
    text: Any = MISSING
    sampling: str = "joined"
    separator: str = "\n\n"
    num_samples: int = 16
    seq_len: int = 512
    batch_size: int = field(default=4, metadata=NO_EFFECT)
    cache: str = field(default="device", metadata=NO_EFFECT)

    def __post_init__(self) -> None:
        check_choice("calibration.sampling", self.sampling)
        whole_number("calibration.num_samples", self.num_samples, least=1)
        whole_number("calibration.seq_len", self.seq_len, least=2)
        whole_number("calibration.batch_size", self.batch_size, least=1)
        check_choice("calibration.cache", self.cache)


@dataclass
class ExpertsConfig:
    """What to do with an expert to which fewer than ``min_tokens`` calibration tokens were routed.

    ``starved`` is ``uniform``, treat all its inputs as equally important, or ``raise``, stop the run.
    """

    min_tokens: int = 32
    starved: str = "uniform"

    def __post_init__(self) -> None:
        whole_number("experts.min_tokens", self.min_tokens, least=0)
        former = {"level": "uniform", "refuse": "raise"}
        if self.starved in former:
            log.warning("experts.starved=%s is now called %s", self.starved, former[self.starved])
            self.starved = former[self.starved]
        check_choice("experts.starved", self.starved)


@dataclass
class PerplexityConfig:
    """Perplexity over consecutive windows of ``context`` tokens of a text; ``max_windows`` null takes all of them."""

    name: str = field(default=MISSING, metadata=NO_EFFECT)
    text: Any = MISSING
    context: int = 2048
    max_windows: int | None = None

    def __post_init__(self) -> None:
        self.check("eval.perplexity")

    def check(self, setting: str) -> None:
        """Raise a UserError, which names the fields of ``setting``, unless both numbers are allowed."""
        whole_number(f"{setting}.context", self.context, least=2)
        if self.max_windows is not None:
            whole_number(f"{setting}.max_windows", self.max_windows, least=1)


@dataclass
class ZeroShotConfig:
    """Tasks of lm-eval; the first ``limit`` documents of each, null for all; ``data`` is ``offline`` or ``hub``.

    ``num_fewshot`` examples stand before each question. ``include_path`` is a folder of your own tasks, which only the
    command line may name.
    """

    tasks: list[str] = MISSING
    limit: int | None = None
    data: str = "hub"
    num_fewshot: int = 0
    include_path: str | None = None

    def __post_init__(self) -> None:
        check_choice("eval.zeroshot.data", self.data)
        whole_number("eval.zeroshot.num_fewshot", self.num_fewshot, least=0)
        if self.limit is not None:
            whole_number("eval.zeroshot.limit", self.limit, least=1)


@dataclass
class GenerationConfig:
    """Greedy generation of ``tokens`` tokens after the starts of the first ``prompts`` windows of ``perplexity``."""

    prompts: int = 16
    tokens: int = 32

    def __post_init__(self) -> None:
        whole_number("eval.generation.prompts", self.prompts, least=1)
        whole_number("eval.generation.tokens", self.tokens, least=4)  # repetition is counted in sequences of four


def _generation(settings: Any) -> GenerationConfig | None:
    if settings is None or isinstance(settings, GenerationConfig):
        return settings
    if not isinstance(settings, dict):
        raise UserError(f"eval.generation={settings!r}: expected {{prompts: 16, tokens: 32}}, or null")
    for key in settings:
        one_of("eval.generation: its setting", key, ("prompts", "tokens"))
    return GenerationConfig(**settings)


@dataclass
class EvalConfig:
    """What to score. ``batch_size`` changes no number beyond rounding.

    ``extra_perplexity`` holds further sets by name, beside ``perplexity``, which is that of the tables.

    ``divergence`` measures on the windows of the perplexity how far the pruned model is from the dense one, whose last
    hidden states are kept in ``cache``: ``memory``, for one process, or ``disk``, in the results folder.
    """

    name: str = field(default=MISSING, metadata=NO_EFFECT)
    perplexity: PerplexityConfig | None = None
    extra_perplexity: Any = None  # PerplexityConfig by name; if it were typed so, the command line could not set it
    divergence: bool = True
    cache: str = field(default="memory", metadata=NO_EFFECT)
    zeroshot: ZeroShotConfig | None = None
    generation: Any = None  # a GenerationConfig, which the command line could not set either
    batch_size: int = field(default=4, metadata=NO_EFFECT)

    def __post_init__(self) -> None:
        whole_number("eval.batch_size", self.batch_size, least=1)
        check_choice("eval.cache", self.cache)
        self.generation = _generation(self.generation)
        if self.generation is not None and self.perplexity is None:
            problem = "its prompts are windows of eval.perplexity, which is null"
            raise UserError(
                f"eval.generation: {problem}; choose another file beside it: eval=[ppl_mini,generation_mini]"
            )
        extra = {} if self.extra_perplexity is None else self.extra_perplexity
        if not isinstance(extra, dict):
            raise UserError(
                f"eval.extra_perplexity={extra!r}: expected a mapping, {{NAME: {{text: ..., context: ...}}}}"
            )
        if extra and self.perplexity is None:
            raise UserError(
                "eval.extra_perplexity: expected only beside eval.perplexity, which is null; set that first"
            )
        self.extra_perplexity = {str(name): self._extra(str(name), fields) for name, fields in extra.items()} or None

    @property
    def perplexity_sets(self) -> dict[str, tuple[str, PerplexityConfig]]:
        """All sets of windows to score by name, each after the setting that describes it; that of the tables first."""
        if self.perplexity is None:
            return {}
        extra = self.extra_perplexity or {}
        sets = {name: (f"eval.extra_perplexity.{name}", scored) for name, scored in extra.items()}
        return {self.perplexity.name: ("eval.perplexity", self.perplexity), **sets}

    def _extra(self, name: str, settings: Any) -> PerplexityConfig:
        setting = f"eval.extra_perplexity.{name}"
        if isinstance(settings, PerplexityConfig):
            return settings
        if self.perplexity is not None and name == self.perplexity.name:
            raise UserError(f"{setting}: eval.perplexity has this name; choose another")
        if not isinstance(settings, dict) or "text" not in settings:
            raise UserError(f"{setting}={settings!r}: expected {{text: ..., context: ..., max_windows: ...}}")
        for key in settings:
            one_of(f"{setting}: its setting", key, ("text", "context", "max_windows"))
        scored = PerplexityConfig(name, settings["text"])
        scored.context, scored.max_windows = settings.get("context", scored.context), settings.get("max_windows")
        scored.check(setting)
        return scored


@dataclass
class RunConfig:
    """All settings of one run; docs/settings.md describes each of them.

    ``method``, ``pattern``, the stages, ``tracker`` and the texts are described by ``_target_``
    (:class:`dass_exp.runs.resolved_run.Components` builds them).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    method: Any = MISSING
    pattern: Any = MISSING
    allocation: Any = field(default_factory=lambda: {"_target_": "dass_exp.allocation.uniform.Uniform"})
    permute: Any = field(default_factory=lambda: {"_target_": "dass_exp.permute.base.NoOrder"})
    refine: Any = field(default_factory=lambda: {"_target_": "dass_exp.refine.none.NoRefinement"})
    repair: Any = field(default_factory=lambda: {"_target_": "dass_exp.repair.base.NoRepair"})
    retrain: Any = field(default_factory=lambda: {"_target_": "dass_exp.retrain.base.NoRetraining"})
    scope: str = "mlp"
    seed: int = 0
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    protocol: Any = field(default=MISSING, metadata=NO_EFFECT)
    tracker: Any = field(default=MISSING, metadata=NO_EFFECT)
    sweep: Any = field(default=None, metadata=NO_EFFECT)
    name: str | None = field(default=None, metadata=NO_EFFECT)
    tags: list[str] = field(default_factory=list, metadata=NO_EFFECT)
    notes: str | None = field(default=None, metadata=NO_EFFECT)
    threads: int | None = field(default=None, metadata=NO_EFFECT)
    rerun: bool = field(default=False, metadata=NO_EFFECT)
    plan: bool = field(default=False, metadata=NO_EFFECT)
    repeat: int = 0
    save_masks: bool = field(default=False, metadata=NO_EFFECT)
    save: str | None = field(default=None, metadata=NO_EFFECT)
    resume: bool | None = field(default=None, metadata=NO_EFFECT)
    checkpoint: bool | None = field(default=None, metadata=NO_EFFECT)  # the former name of resume
    results_dir: str = field(default="results", metadata=NO_EFFECT)
    plugins: list[str] = field(default_factory=list, metadata=NO_EFFECT)

    def __post_init__(self) -> None:
        check_choice("scope", self.scope)
        whole_number("seed", self.seed, least=0, most=MAX_SEED)
        whole_number("repeat", self.repeat, least=0)
        if self.threads is not None:
            whole_number("threads", self.threads, least=1, most=MAX_THREADS)
        check_folder("results_dir", self.results_dir)
        if self.save is not None:
            check_folder("save", self.save)
        if self.checkpoint is not None:
            log.warning("checkpoint=%s is now called resume=%s", *2 * (str(self.checkpoint).lower(),))
            self.resume, self.checkpoint = self.checkpoint, None


def check_folder(setting: str, text: str) -> None:
    """Check that a path can be a folder of results.

    Raises:
        UserError: it is empty, the root of the file system, a file, or a loop of links.
    """
    try:
        path = Path(text).resolve(strict=False)
        is_file = path.exists() and not path.is_dir()
        text.encode()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{setting}={text!r}: it cannot be a folder: {one_line(error)}; choose another") from error
    if not text.strip() or path == Path(path.anchor) or is_file:
        what = "a file" if is_file else "the root of the file system" if text.strip() else "empty"
        raise UserError(f"{setting}={text!r}: it is {what}; expected a folder, which is made if there is none")


def settings_without_effect(schema: type = RunConfig, path: str = "") -> frozenset[str]:
    """Return the dotted names of all settings whose fields are marked :data:`NO_EFFECT`."""
    found: set[str] = set()
    for entry in fields(schema):
        if entry.metadata.get("no_effect"):
            found.add(path + entry.name)
        elif (nested := nested_schema(schema, entry.name)) is not None:
            found |= settings_without_effect(nested, f"{path}{entry.name}.")
    return frozenset(found)


def register() -> None:
    """Make the schema known to Hydra under the name that conf/config.yaml refers to."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)


def validate(
    composed: DictConfig, packages: frozenset[str] = OURS, choices: Mapping[str, str | None] | None = None
) -> RunConfig:
    """Check every setting that can be checked without a model.

    Args:
        composed: what Hydra composed.
        packages: packages whose classes may be built (:func:`dass_exp.config.components.admitted_packages`).
        choices: the file chosen in each config group; its name is used where a file states no ``name``.

    Raises:
        UserError: names the setting, its value and what is allowed.
    """
    try:
        _check_keys(composed, RunConfig, "")
        check_targets(composed, packages)
        config = OmegaConf.to_object(_named(composed, choices or {}))
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key or error.key} has no value; set it on the command line") from error
    except OmegaConfBaseException as error:
        raise UserError(unresolved(error)) from error
    except RecursionError as error:
        raise UserError("the config is nested too deeply, or refers to itself") from error
    if not isinstance(config, RunConfig):
        raise TypeError(f"composed a {type(config).__name__}; conf/config.yaml must list run_schema first")
    return replace(config, model=rename_model(config.model, (choices or {}).get("model")))


def unresolved(error: OmegaConfBaseException) -> str:
    """Return as one line which setting has a wrong value or interpolation, and why."""
    reason = " ".join(str(error.msg or error).partition("full_key:")[0].split())
    return f"{error.full_key}: {reason}" if error.full_key else reason


def _named(composed: DictConfig, choices: Mapping[str, str | None]) -> DictConfig:
    """Add the name of the chosen file to each part of the config that states no name."""
    composed = composed.copy()
    for group in ("model", "calibration", "eval", "protocol"):
        # Hydra names no choice where several were made: eval=[mini,generation_mini]
        node, name = composed.get(group), choices.get(group, "several" if group == "eval" and choices else None)
        if (
            name is not None
            and isinstance(node, DictConfig)
            and (OmegaConf.is_missing(node, "name") or "name" not in node)
        ):
            OmegaConf.update(composed, f"{group}.name", name, force_add=True)
    return composed


def rename_model(model: ModelConfig, chosen: str | None = None) -> ModelConfig:
    """Name a model after its path if that is not the path of the ``chosen`` file; drop that file's licence and size."""
    chosen = chosen or model.name
    file = project_root() / "conf" / "model" / f"{chosen}.yaml"
    if not file.is_file() or choice("model", chosen).get("path") == model.path:
        return model
    name = model.path.rstrip("/").rsplit("/", 1)[-1] if model.name == chosen else model.name
    return replace(model, name=name, license=None, parameters=None, context=None)


def _check_keys(node: Any, schema: type, path: str) -> None:
    """Refuse unknown settings: Hydra adds whatever follows a ``+``, so a misspelt one would change nothing."""
    for key in node:
        if key not in (known := get_type_hints(schema)):
            parent = path.rstrip(".") or "a run"
            raise UserError(f"{path}{key}: there is no such setting; {parent} has {', '.join(known)}")
        nested = nested_schema(schema, key)
        if nested is not None and not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            _check_keys(node[key], nested, f"{path}{key}.")


def nested_schema(schema: type, name: str) -> type | None:
    """Return the dataclass that a field holds or may hold; None for a plain field."""
    kind = get_type_hints(schema)[name]
    return next(
        (option for option in (kind, *get_args(kind)) if isinstance(option, type) and is_dataclass(option)), None
    )
