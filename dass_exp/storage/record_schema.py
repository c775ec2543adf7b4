"""The shape of a record, as far as a reader relies on it: what is no such thing is named before anything trips over it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

SCHEMA = 1


class Named(TypedDict):
    """A choice with its settings beside the name."""

    name: str


class Windows(TypedDict):
    """Which windows a perplexity was asked for."""

    max_windows: NotRequired[int | None]


class Evaluation(TypedDict):
    """What was to be scored."""

    name: str
    perplexity: NotRequired[Windows | None]


class Intended(TypedDict):
    """What a cell was meant to be; null where the method ignores it."""

    model: Named
    method: Named
    pattern: Named | None
    scope: str | None
    seed: int | None
    calibration: dict[str, Any] | None


class Config(Intended):
    """The resolved settings of a run."""

    eval: Evaluation


class Trained(TypedDict):
    """Which of several trainings of one recipe a model is."""

    recipe: str
    seed: int


class Identity(TypedDict):
    """All that can change a number."""

    model: str
    trained: NotRequired[Trained]


class Protocol(TypedDict):
    """How the model was scored."""

    bos: str
    dtype: str
    device: str
    model_note: str
    method_note: NotRequired[str]
    context: NotRequired[int]
    dataset: NotRequired[str]
    split: NotRequired[str | None]
    windows: NotRequired[int]
    windows_sha256: NotRequired[str]
    lm_eval: NotRequired[str]
    tasks: NotRequired[list[str]]
    limit: NotRequired[int | None]


class Calibration(TypedDict):
    """The tokens that the method saw."""

    name: str
    num_samples: int
    seq_len: int
    tokens_sha256: str


class Layer(TypedDict):
    """One pruned linear."""

    name: str
    role: str
    zeros: int
    size: int
    block_error: NotRequired[float | None]


class Sparsity(TypedDict):
    """Zeros of the masks."""

    scope: float
    decoder: float
    model: float
    layers: list[Layer]


class Task(TypedDict):
    """The scores of one zero-shot task."""

    acc: float
    acc_stderr: float
    acc_norm: NotRequired[float]
    acc_norm_stderr: NotRequired[float]
    split: str | None
    limit: int | None


class Metrics(TypedDict):
    """What was scored."""

    perplexity: NotRequired[dict[str, float]]
    window_nll: NotRequired[dict[str, list[float]]]
    tasks: NotRequired[dict[str, Task]]
    mean_acc: NotRequired[float]
    mean_acc_norm: NotRequired[float]


class Cost(TypedDict):
    """Seconds and bytes."""

    load_s: float
    prune_s: float
    eval_s: float
    peak_rss_bytes: int
    peak_gpu_bytes: int | None


class Solver(TypedDict):
    """What the method met on its way."""

    starved_experts: NotRequired[list[str]]


class Shape(TypedDict):
    """A record (results/README.md). Fields that are not named here are free."""

    key: str
    created: str
    config: Config
    identity: Identity
    protocol: Protocol
    calibration: Calibration | None
    sparsity: Sparsity
    metrics: Metrics
    cost: Cost
    solver: Solver
    environment: dict[str, Any]


def problem_of(found: Any, key: str) -> str | None:
    """Why a JSON value is not the record of this key, in words; None if it is.

    Args:
        found: what was read.
        key: as its folder is called.
    """
    from pydantic import ValidationError

    if not isinstance(found, dict):
        return "it holds no JSON object"
    if found.get("schema") != SCHEMA:
        return f"schema is {found.get('schema')!r}; this version reads {SCHEMA}"
    if found.get("key") != key:
        return f"its key is {found.get('key')!r}"
    try:
        _adapter(Shape).validate_python(found, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    return _contradiction(found["metrics"], found["protocol"])


def is_config(found: Any) -> bool:
    """Whether a JSON value tells what a cell was meant to be."""
    from pydantic import ValidationError

    try:
        _adapter(Intended).validate_python(found, strict=True)
    except ValidationError:
        return False
    return True


def _contradiction(metrics: Metrics, protocol: Protocol) -> str | None:
    scored, tasks = metrics.get("perplexity", {}), metrics.get("tasks", {})
    if scored and not {"context", "dataset", "split", "windows", "windows_sha256"} <= protocol.keys():
        return "protocol: it does not say which windows the perplexity is of"
    if any(not metrics.get("window_nll", {}).get(name) for name in scored):
        return "metrics.window_nll: nothing for a perplexity that is there"
    if tasks and not {"mean_acc", "mean_acc_norm"} <= metrics.keys():
        return "metrics: tasks without their mean_acc and mean_acc_norm"
    if tasks and not {"lm_eval", "limit"} <= protocol.keys():
        return "protocol: it does not say which lm_eval scored the tasks"
    if any("acc_norm" in task and "acc_norm_stderr" not in task for task in tasks.values()):
        return "metrics.tasks: an acc_norm without its standard error"
    return None


@cache
def _adapter(kind: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def flattened(node: Any, path: str = "") -> dict[str, str]:
    """The leaves of nested settings as text, by their dotted names."""
    if not isinstance(node, Mapping):
        return {path: str(node)}
    return {
        name: text
        for key, value in node.items()
        for name, text in flattened(value, f"{path}.{key}".lstrip(".")).items()
    }
