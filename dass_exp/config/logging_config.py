"""Which classes a logging configuration may name: :mod:`logging.config` imports and calls whatever stands in it."""

import importlib
from collections.abc import Iterable

from dass_exp.config.components import target_class
from dass_exp.errors import UserError

_MODULES = ("logging", "logging.handlers", "colorlog", "colorlog.formatter")
_STREAMS = ("sys.stdout", "sys.stderr")
_NAMES_CODE = ("class", "()", "queue", "listener", "_target_")
_EXTERNAL = "ext://"


def check_logging(leaves: Iterable[tuple[str, object]], packages: frozenset[str]) -> None:
    """Check a logging configuration before anything that it names is imported.

    Args:
        leaves: dotted name and value of each of its settings.
        packages: packages whose classes may be built.

    Raises:
        UserError: a class, factory or ``ext://`` object that is neither the standard library's nor admitted.
    """
    for setting, value in leaves:
        text = str(value)
        if text.startswith(_EXTERNAL) or (value is not None and setting.rsplit(".", 1)[-1] in _NAMES_CODE):
            _check_name(setting, text, packages)


def _check_name(setting: str, text: str, packages: frozenset[str]) -> None:
    name = text.removeprefix(_EXTERNAL)
    module, _, last = name.rpartition(".")
    if text.startswith(_EXTERNAL) and name in _STREAMS:
        return
    if module in _MODULES:
        found = getattr(importlib.import_module(module), last, None)
        if isinstance(found, type) and found.__module__ in _MODULES:
            return
    elif name.split(".")[0] in packages and target_class(setting, name).__module__.split(".")[0] in packages:
        return
    raise UserError(
        f"{setting}={text}: a logging configuration may name classes of logging and logging.handlers, ext://sys.stdout "
        f"and ext://sys.stderr, and classes of {', '.join(sorted(packages))}; name another package in DASS_EXP_PLUGINS "
        "or with plugins=[...] on the command line"
    )
