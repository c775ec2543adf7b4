"""Hydra's config loader with our checks: nothing that Hydra would import, build or keep is acted on before them."""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra._internal import hydra as hydra_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from dass_exp.config.arguments import ConfigSource
from dass_exp.config.components import OURS, target_class
from dass_exp.config.logging_config import check_logging
from dass_exp.config.redact import refuse_secrets
from dass_exp.config.settings import unresolved
from dass_exp.errors import UserError

_HYDRA = frozenset({"hydra", "hydra_plugins"})
_KINDS = {"callbacks": Callback, "launcher": Launcher, "sweeper": Sweeper}
_LOGGING = ("job_logging", "hydra_logging")
_FOLDERS = ("run.dir", "sweep.dir", "sweep.subdir")

# variables that a config may read; anything else, such as a key, would end in records
ENVIRONMENT = ("HOME", "USER", "HOSTNAME", "TMPDIR", "SCRATCH", "CUDA_VISIBLE_DEVICES", "DASS_EXP_*", "SLURM_*")
_READ_ENVIRONMENT = re.compile(r"\boc\.env\s*:\s*['\"]?([^,}'\"\s]*)")
# variables that make a process load code, so no config may set them
_LOADS_CODE = re.compile(r"PATH|PYTHON\w*|LD_\w*|DYLD_\w*|WANDB__\w*|DASS_EXP_PLUGINS|BASH_ENV|ENV", re.I)
_OWN_TASKS = "eval.zeroshot.include_path"  # its files may name Python functions
_SHELL = ("setup",)  # settings of a launcher that are commands

_HOW = "name another package in DASS_EXP_PLUGINS or with plugins=[...] on the command line"


@contextmanager
def checked(packages: frozenset[str], source: ConfigSource) -> Iterator[None]:
    """Let Hydra's command use the checked loader inside the context.

    Args:
        packages: packages whose classes may be built.
        source: what the command line says about the config.
    """
    loader = functools.partial(CheckedConfigLoader, packages=packages, source=source)
    setattr(hydra_module, "ConfigLoaderImpl", loader)  # noqa: B010 - Hydra has no hook for it
    try:
        yield
    finally:
        setattr(hydra_module, "ConfigLoaderImpl", ConfigLoaderImpl)  # noqa: B010


class CheckedConfigLoader(ConfigLoaderImpl):
    """Composes as Hydra does, for the command and for each cell of a sweep, and checks the result."""

    def __init__(
        self, config_search_path: ConfigSearchPath, packages: frozenset[str] = OURS, source: ConfigSource | None = None
    ) -> None:
        self._packages, self._source = packages, source or ConfigSource()
        for entry in config_search_path.get_path():
            if entry.provider == "main" and self._source.folder is not None:
                entry.path = str(self._source.folder)
            _check_search_path(str(entry.path), packages)
        super().__init__(config_search_path)

    def load_configuration(self, *arguments: Any, **named: Any) -> DictConfig:
        """Compose, then check.

        Raises:
            UserError: the config names foreign code, holds a secret, or cannot be resolved where Hydra needs it.
        """
        composed = super().load_configuration(*arguments, **named)
        if self._source.saved is not None:
            self._source.saved.restore_choices(composed)
        check_composed(composed, self._packages, self._source.overrides)
        return composed

    def _process_config_searchpath(self, config_name: str | None, parsed_overrides: list[Override], repo: Any) -> None:
        primary = repo.load_config(config_path=config_name) if config_name is not None else None
        paths = OmegaConf.select(primary.config, "hydra.searchpath") if primary is not None else None
        values = [each.value() for each in parsed_overrides if each.get_key_element() == "hydra.searchpath"]
        for listed in (paths, *values):
            for path in listed if isinstance(listed, (list, tuple, ListConfig)) else ():
                _check_search_path(str(path), self._packages)
        super()._process_config_searchpath(config_name, parsed_overrides, repo)

    def _compose_config_from_defaults_list(self, *arguments: Any, **named: Any) -> DictConfig:
        composed = super()._compose_config_from_defaults_list(*arguments, **named)
        return composed if self._source.saved is None else self._source.saved.replace_settings(composed)


def check_composed(composed: DictConfig, packages: frozenset[str], typed: tuple[str, ...] = ()) -> None:
    """Check what Hydra composed before Hydra acts on it.

    Raises:
        UserError: names the setting and what is allowed.
    """
    raw = OmegaConf.to_container(composed, resolve=False)
    _check_environment(raw)
    settings = {name: node for name, node in raw.items() if name != "hydra"}  # type: ignore[union-attr]
    refuse_secrets(settings)
    refuse_secrets(raw["hydra"]["job"], "hydra.job")  # type: ignore[index, call-overload]
    for kind in ("task", "hydra"):
        refuse_secrets(raw["hydra"]["overrides"][kind], f"{kind}.overrides")  # type: ignore[index, call-overload]
    try:
        _check_code(composed.hydra, packages, typed)
        _check_folders(composed)
        if OmegaConf.select(composed, _OWN_TASKS, throw_on_resolution_failure=False) and not _is_typed(
            _OWN_TASKS, typed
        ):
            raise UserError(f"{_OWN_TASKS}: the files in it can run code, so only the command line may set it")
    except RecursionError as error:
        raise UserError("the config refers to itself: an interpolation leads back to its own setting") from error


def _check_search_path(path: str, packages: frozenset[str]) -> None:
    scheme, _, module = path.partition("://")
    if scheme == "pkg" and module and module.replace("/", ".").split(".")[0] not in packages | _HYDRA:
        raise UserError(
            f"hydra.searchpath={path}: pkg:// imports that package; admitted: {', '.join(sorted(packages))}; {_HOW}"
        )


def _check_environment(raw: Any) -> None:
    """Refuse to read variables that are not in :data:`ENVIRONMENT`."""
    for setting, text in _texts(raw, ""):
        for name in _READ_ENVIRONMENT.findall(text):
            if not any(re.fullmatch(allowed.replace("*", r"\w*"), name) for allowed in ENVIRONMENT):
                raise UserError(
                    f"{setting}: a config may not read the environment variable {name}, whose value would be kept with "
                    f"the results; allowed: {', '.join(ENVIRONMENT)}"
                )


def _check_code(node: DictConfig, packages: frozenset[str], typed: tuple[str, ...]) -> None:
    """Check every class that Hydra would build, and every command that a launcher would run."""
    for section in _LOGGING:
        check_logging(_resolved(node.get(section), f"hydra.{section}"), packages)
    for section, kind in _KINDS.items():
        for setting, value in _resolved(node.get(section), f"hydra.{section}"):
            depth = setting.count(".")
            if setting.endswith("._target_"):
                built_by_hydra = depth == (3 if section == "callbacks" else 2)
                _check_target(setting, value, packages | _HYDRA if built_by_hydra else packages, kind, built_by_hydra)
    for name in _SHELL:
        setting = f"hydra.launcher.{name}"
        if OmegaConf.select(node, f"launcher.{name}") and not _is_typed(setting, typed):
            raise UserError(f"{setting}: its value is run by a shell, so only the command line may set it")
    for name in node.job.env_set:
        if _LOADS_CODE.fullmatch(str(name)):
            raise UserError(f"hydra.job.env_set.{name}: programs load code from it, so it is not admitted in a config")


def _is_typed(setting: str, typed: tuple[str, ...]) -> bool:
    return any(text.lstrip("+").startswith((f"{setting}=", f"{setting}.")) for text in typed)


def _check_target(setting: str, value: Any, allowed: frozenset[str], kind: type, built_by_hydra: bool) -> None:
    if str(value).split(".")[0] not in allowed:
        raise UserError(
            f"{setting}={value}: a _target_ is code that runs, and its package is not admitted; admitted: "
            f"{', '.join(sorted(allowed))}; {_HOW}"
        )
    found = target_class(setting, value)
    if found.__module__.split(".")[0] not in allowed or (built_by_hydra and not issubclass(found, kind)):
        raise UserError(f"{setting}={value}: expected a {kind.__name__} of an admitted package")


def _check_folders(composed: DictConfig) -> None:
    """Resolve the folders that Hydra makes before it calls us, so that a mistake in them names its setting."""
    for name in _FOLDERS:
        try:
            OmegaConf.select(composed.hydra, name)
        except InterpolationToMissingValueError:
            continue  # known once the cell has its number
        except OmegaConfBaseException as error:
            raise UserError(f"hydra.{name} cannot be resolved: {unresolved(error)}; check results_dir") from error


def _resolved(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted name and value of every setting below a node; one that cannot be resolved yet as it is written."""
    keys = node.keys() if isinstance(node, DictConfig) else range(len(node)) if isinstance(node, ListConfig) else ()
    for key in keys:
        where = f"{path}.{key!s}"
        try:
            value = None if OmegaConf.is_missing(node, key) else node[key]
        except OmegaConfBaseException:
            value = str(node._get_node(key))
        if OmegaConf.is_config(value):
            yield from _resolved(value, where)
        else:
            yield where, value


def _texts(node: Any, path: str) -> Iterator[tuple[str, str]]:
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield from _texts(value, f"{path}.{key}" if path else str(key))
        yield path, str(key)
    if isinstance(node, str):
        yield path, node
