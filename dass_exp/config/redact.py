"""Secrets: which settings and texts look like one, and how they are hidden in whatever is written or shown."""

import os
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from dass_exp.errors import UserError

HIDDEN = "***"

_WORDS = frozenset({"token", "secret", "password", "passwd", "passphrase", "credential", "credentials", "apikey"})
_PAIRS = frozenset({("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("auth", "key")})
# token_id is a word of the vocabulary, HF_TOKEN_PATH and TOKEN_FILE say where a secret lies
_PLAIN = re.compile(r"(bos|eos|pad|unk|mask|cls|sep|special|image)_token\w*|\w*_(path|file|dir|id)", re.I)
_KNOWN = re.compile(
    r"\bhf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}|\bsk-[\w-]{16,}|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}"
    r"|\bAKIA[0-9A-Z]{16}"
)
_WANDB_KEY = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"revision|commit|sha|hash|digest|git|identity|version", re.I)  # 40 hex digits that are no W&B key
_ASSIGNED = re.compile(r"([\w.+/-]+)(=)([^\s,;'\"{}\[\]()]+)")


def is_secret(name: str) -> bool:
    """Whether the value of a setting or variable of this (dotted) name is a secret."""
    last = name.rsplit(".", 1)[-1].lstrip("+")
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", last)]
    named = bool(_WORDS & set(words)) or any(pair in _PAIRS for pair in pairwise(words))
    return named and not _PLAIN.fullmatch(last)


def redact(value: Any, name: str = "") -> Any:
    """Return a copy of JSON-like content in which ``***`` stands for every secret.

    Args:
        value: what is to be written.
        name: of the setting whose value it is.
    """
    if isinstance(value, Mapping):
        return {key: redact(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(entry, name) for entry in value]
    if not isinstance(value, str):
        return value
    if (is_secret(name) and value) or (_WANDB_KEY.fullmatch(value) and not _DIGEST.search(name)):
        return HIDDEN
    return redact_text(value)


def redact_text(text: str) -> str:
    """Hide secrets inside a text: keys of known services, values of secret variables, and ``password=...``."""
    text = _KNOWN.sub(HIDDEN, text)
    for value in _secrets_of_environment():
        text = text.replace(value, HIDDEN)
    return _ASSIGNED.sub(_hide_assigned, text)


def refuse_secrets(content: Any, path: str = "") -> None:
    """Check that no setting holds a secret: Hydra keeps the settings of a run beside its results.

    Raises:
        UserError: names the setting, not its value.
    """
    for setting, value in _leaves(content, path):
        plain = value.split("=", 1) if path.endswith("overrides") and "=" in value else [setting, value]
        if value and "${" not in value and redact(plain[1], plain[0]) != plain[1]:
            raise UserError(
                f"{plain[0].lstrip('+')}: its value looks like a secret, and settings are kept with the results; give "
                "it in an environment variable that its library reads, such as HF_TOKEN or WANDB_API_KEY"
            )


def _hide_assigned(found: re.Match[str]) -> str:
    name, mark, value = found.groups()
    secret = is_secret(name) and value.lower() not in ("null", "none", "true", "false") and not value.isdecimal()
    return f"{name}{mark}{HIDDEN}" if secret else found.group()


def _secrets_of_environment() -> Iterator[str]:
    return (value for name, value in os.environ.items() if is_secret(name) and len(value) >= 8)


def _leaves(node: Any, path: str) -> Iterator[tuple[str, str]]:
    entries = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, value in entries:
        yield from _leaves(value, f"{path}.{key}" if isinstance(node, Mapping) and path else path or str(key))
    if isinstance(node, str):
        yield path, node
