"""One resolved run, and its identity, which defines when two runs are the same: for key, resume state, plan, report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dass_exp.config.components import OURS, build
from dass_exp.config.plugin_source import source_digest
from dass_exp.config.settings import STAGE_GROUPS, RunConfig
from dass_exp.data.texts import Text
from dass_exp.engine.prune import ENGINE_VERSION
from dass_exp.engine.stages import Stages, build_stages
from dass_exp.engine.verify import VerificationError
from dass_exp.errors import UserError, naming
from dass_exp.evaluate import EVALUATION_VERSION
from dass_exp.evaluate.offline_tasks import documents_identity
from dass_exp.evaluate.zeroshot import check_tasks, lm_eval_version
from dass_exp.masks import Pattern
from dass_exp.methods.base import Pruner, Stage
from dass_exp.methods.dense import Dense
from dass_exp.models.decoder import Decoder, LinearSite
from dass_exp.models.load import ModelSpec
from dass_exp.models.save import is_saved, partial_folder_of
from dass_exp.retrain.base import NoRetraining, Retraining
from dass_exp.runs.memory import MemoryNeeds
from dass_exp.storage.checksum import folder_digest
from dass_exp.storage.records import Record, RecordStore
from dass_exp.trackers.base import Tracker

_STARVED = {"uniform": "level", "raise": "refuse"}  # as identities spelt them before they were renamed


@dataclass(frozen=True, eq=False)
class Components:
    """The objects that a config describes by ``_target_``."""

    method: Pruner
    pattern: Pattern
    stages: Stages
    retrain: Retraining
    tracker: Tracker
    calibration_text: Text
    evaluation_texts: dict[str, Text]  # by name of the set of windows

    @classmethod
    def of(cls, config: RunConfig) -> Components:
        """Build them from their settings.

        Raises:
            UserError: a value is not allowed; the message names the setting.
        """
        if (zeroshot := config.eval.zeroshot) is not None:
            check_tasks(zeroshot.tasks, zeroshot.data, zeroshot.num_fewshot, zeroshot.include_path)
        stages = build_stages({group: getattr(config, group) for group in STAGE_GROUPS})
        method, pattern = build(config.method, Pruner, "method"), build(config.pattern, Pattern, "pattern")
        stages.check(method, pattern, config.scope)
        retrain = build(config.retrain, Retraining, "retrain")
        if retrain.active and not method.prunes:
            advice = "to train the dense model, take method=magnitude pattern=unstructured pattern.sparsity=0"
            raise UserError(f"retrain={retrain.name}: method={method.name} removes nothing; {advice}")
        return cls(
            method=method,
            pattern=pattern,
            stages=stages if method.prunes else Stages(),
            retrain=retrain,
            tracker=build(config.tracker, Tracker, "tracker"),
            calibration_text=build(config.calibration.text, Text, "calibration.text"),
            evaluation_texts={
                name: build(scored.text, Text, f"{setting}.text")
                for name, (setting, scored) in config.eval.perplexity_sets.items()
            },
        )

    @property
    def optional(self) -> dict[str, Stage | Retraining]:
        """What is done beside the method, by the name of its config group."""
        return {**self.stages.active, **({"retrain": self.retrain} if self.retrain.active else {})}

    @property
    def calibrated(self) -> bool:
        """Whether calibration tokens are needed."""
        return self.stages.calibrated(self.method)

    @property
    def uses(self) -> frozenset[str]:
        """The run settings that can change the outcome: those of the method, and calibration where a stage needs it."""
        seeded = {"seed"} if self.retrain.active else set()
        return self.method.uses | seeded | ({"calibration", "seed"} if self.calibrated else set())


@dataclass(frozen=True, eq=False)
class ResolvedRun(Components):
    """One run, resolved once and never changed.

    Args:
        config: the typed settings.
        spec: the model, identified but not loaded.
        bos: where the beginning-of-sequence token is put: ``never``, ``stream`` or ``window``.
        placement: ``resident`` or ``stream``; None if nothing has to be executed.
        needs: memory of the run; None before it is placed.
    """

    config: RunConfig
    spec: ModelSpec
    bos: str
    placement: str | None = None
    needs: MemoryNeeds | None = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that can change a number: the one definition of when two runs are the same."""
        return identity_of(self)

    @cached_property
    def key(self) -> str:
        """The key of its record."""
        return key_of(self.identity)

    @property
    def streams(self) -> bool:
        """Whether the model is read block by block."""
        return self.placement == "stream"

    @property
    def store(self) -> RecordStore:
        """The store of its record."""
        return RecordStore(self.config.results_dir)

    @property
    def record_folder(self) -> Path:
        """The folder of its record."""
        return self.store.path(self.key).parent

    @property
    def work_folder(self) -> Path:
        """The folder of its resume state, cached activations and unfinished checkpoint, removed when it is done."""
        save = self.config.save
        return self.record_folder / "work" if save is None else partial_folder_of(save)

    @property
    def work_folders(self) -> set[Path]:
        """Its own work folder, and the one of an earlier start of the same run without ``save``."""
        return {self.work_folder, self.record_folder / "work"}

    @property
    def keeps_masks(self) -> bool:
        """Whether masks are written, next to the record or into the saved model."""
        wanted = self.config.save_masks or self.config.save is not None or self.retrain.active
        return self.method.prunes and wanted

    @property
    def resumable(self) -> bool:
        """Whether the state behind each block is kept: asked for by ``resume``, by default in streamed runs."""
        return self.config.resume is not False if self.streams else bool(self.config.resume)

    def finished_record(self) -> Record | None:
        """Return the record of the run if nothing is left to do: requested masks and saved model exist too.

        Raises:
            UserError: the save folder holds something else.
        """
        config = self.config
        saved = config.save is None or is_saved(config.save, self.key)
        record = None if config.rerun else self.store.find(self.key)
        needs_masks = config.save_masks and self.method.prunes
        return record if saved and not (needs_masks and not self.store.has_masks(self.key)) else None

    def dense(self) -> ResolvedRun | None:
        """Return its dense counterpart, with the same model and evaluation; None if it is dense or scores nothing."""
        evaluation = self.config.eval
        if not self.method.prunes or (evaluation.perplexity is None and evaluation.zeroshot is None):
            return None
        model, placement = self.config.model, self.placement
        if (evaluation.zeroshot or evaluation.generation) is not None and placement != "resident":
            # tasks and generation need the whole model in memory, where it may fit alone
            model, placement = dataclasses.replace(model, placement="resident"), None
        # what the user calls a run is not said of one that others will find
        own: dict[str, Any] = {"save": None, "name": None, "notes": None}
        config = dataclasses.replace(self.config, model=model, rerun=False, repeat=0, **own)
        return dataclasses.replace(
            self, config=config, method=Dense(), stages=Stages(), retrain=NoRetraining(), placement=placement
        )

    def naming_foreign_code(self, kind: type[Exception]) -> AbstractContextManager[None]:
        """Name the classes of other packages that the run uses in whatever they raise inside the context."""
        settings = {
            "method": self.method,
            **self.optional,
            "pattern": self.pattern,
            "calibration.text": self.calibration_text,
            **_texts_by_setting(self),
        }
        kinds = {setting: type(part) for setting, part in settings.items()}
        foreign = [
            f"{setting}._target_={part.__module__}.{part.__qualname__}"
            for setting, part in kinds.items()
            if part.__module__.partition(".")[0] not in OURS
        ]
        return naming(", ".join(foreign), kind, passing=(OSError, VerificationError)) if foreign else nullcontext()

    def sites(self, decoder: Decoder) -> Iterator[LinearSite]:
        """Yield the linears that it prunes."""
        for index in range(len(decoder.blocks)):
            yield from decoder.sites(index, self.config.scope)


def key_of(identity: Mapping[str, Any]) -> str:
    """Hash an identity to 16 hex digits; runs that must give equal numbers have the same, on any machine."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def identity_of(run: ResolvedRun) -> dict[str, Any]:
    """Return everything that can change a number of the run, in canonical form, without what its method ignores.

    It has no setting marked :data:`dass_exp.config.settings.NO_EFFECT`; a test compares the two.
    """
    config, method, spec = run.config, run.method, run.spec
    identity: dict[str, Any] = {
        "model": spec.identity,
        "roles": dict(spec.roles) if spec.roles else None,
        "dtype": spec.dtype_name,
        "device": spec.device.type,
        "bos": run.bos,
        "method": {
            "class": f"{type(method).__module__}.{type(method).__qualname__}",
            "version": method.version,
            **method.settings(),
        },
        "eval": _evaluation(run),
    }
    for group, stage in run.optional.items():
        kind = type(stage)
        name = f"{kind.__module__}.{kind.__qualname__}"
        identity[group] = {"class": name, "version": stage.version, **stage.settings()}
    if method.prunes:
        identity["engine"] = ENGINE_VERSION
    if "pattern" in run.uses:
        identity["pattern"] = run.pattern.settings()
    if "scope" in run.uses:
        identity["scope"] = config.scope
    if "calibration" in run.uses:
        calibration = config.calibration
        names = ["sampling", "num_samples", "seq_len", *(["separator"] if calibration.sampling == "joined" else [])]
        cut = {name: getattr(calibration, name) for name in names}
        identity["calibration"] = {"text": run.calibration_text.identity, **cut}
        if spec.family is not None and spec.family.experts is not None:
            experts = dataclasses.asdict(config.experts)
            identity["experts"] = {**experts, "starved": _STARVED[config.experts.starved]}
    if method.prunes and config.eval.perplexity is not None and not config.eval.divergence:
        identity["divergence"] = False  # not part of ``eval``, by which a dense record is found
    if code := _plugin_code(run):
        identity["code"] = code
    if spec.trained:
        identity["trained"] = dict(spec.trained)
    if config.repeat:
        identity["repeat"] = config.repeat
    if "seed" in run.uses:
        identity["seed"] = config.seed
    return identity


def _plugin_code(run: ResolvedRun) -> dict[str, str]:
    """Return digests of the source of what plugins contribute to the numbers of a run."""
    parts: dict[str, object] = {"method": run.method, **run.optional}
    if run.retrain.active:
        parts["retrain.text"] = run.retrain.text
    if "pattern" in run.uses:
        parts["pattern"] = run.pattern
    if "calibration" in run.uses:
        parts["calibration.text"] = run.calibration_text
    parts |= _texts_by_setting(run)
    return {name: digest for name, part in parts.items() if (digest := source_digest(type(part)))}


def _texts_by_setting(run: ResolvedRun) -> dict[str, Text]:
    sets = run.config.eval.perplexity_sets
    return {f"{setting}.text": run.evaluation_texts[name] for name, (setting, _) in sets.items()}


def _evaluation(run: ResolvedRun) -> dict[str, Any]:
    evaluation = run.config.eval
    windows = {
        name: {
            "text": run.evaluation_texts[name].identity,
            "context": scored.context,
            "max_windows": scored.max_windows,
        }
        for name, (_, scored) in evaluation.perplexity_sets.items()
    }
    identity: dict[str, Any] = {}
    if evaluation.perplexity is not None:
        identity["perplexity"] = windows.pop(evaluation.perplexity.name)
    if windows:
        identity["extra_perplexity"] = windows
    if (zeroshot := evaluation.zeroshot) is not None:
        offline = zeroshot.data == "offline"
        tasks = documents_identity(zeroshot.tasks) if offline else sorted(zeroshot.tasks)
        identity["zeroshot"] = {"tasks": tasks, "limit": zeroshot.limit, "lm_eval": lm_eval_version()}
        if zeroshot.num_fewshot:
            identity["zeroshot"]["num_fewshot"] = zeroshot.num_fewshot
        if zeroshot.include_path is not None:
            identity["zeroshot"]["own_tasks"] = folder_digest(Path(zeroshot.include_path))
    if evaluation.generation is not None:
        identity["generation"] = dataclasses.asdict(evaluation.generation)
    if identity:
        identity["version"] = EVALUATION_VERSION
    return identity
