"""The fields of a record that its readers rely on, and a validation that explains what is wrong."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, NotRequired

from annotated_types import Ge, Le, Lt
from typing_extensions import TypedDict  # pydantic accepts that of typing from Python 3.12 on only

SCHEMA = 1

_Share = Annotated[float, Ge(0), Le(1)]
_Size = Annotated[float, Ge(0), Lt(math.inf)]
_Count = Annotated[int, Ge(0)]


class _Named(TypedDict):
    name: str


class _Perplexity(TypedDict):
    max_windows: NotRequired[int | None]


class _Evaluation(_Named):
    perplexity: NotRequired[_Perplexity | None]


class _CellConfig(TypedDict):
    """The settings that define a cell; null where the method ignores them."""

    model: _Named
    method: _Named
    pattern: _Named | None
    scope: str | None
    seed: int | None
    calibration: dict[str, Any] | None


class _RunConfig(_CellConfig):
    eval: _Evaluation


class _Training(TypedDict):
    recipe: str
    seed: int


class _Identity(TypedDict):
    model: str
    trained: NotRequired[_Training]


class _Windows(TypedDict):
    context: int
    dataset: str
    split: str | None
    windows: _Count
    windows_sha256: str


class _Protocol(TypedDict):
    bos: str
    dtype: str
    device: str
    model_note: str
    method_note: NotRequired[str]
    context: NotRequired[int]
    dataset: NotRequired[str]
    split: NotRequired[str | None]
    windows: NotRequired[_Count]
    windows_sha256: NotRequired[str]
    extra_perplexity: NotRequired[dict[str, _Windows]]  # further sets, by name
    lm_eval: NotRequired[str]
    tasks: NotRequired[list[str]]
    num_fewshot: NotRequired[_Count]
    limit: NotRequired[int | None]


class _Calibration(_Named):
    num_samples: _Count
    seq_len: _Count
    tokens_sha256: str


class _Layer(_Named):
    role: str
    zeros: _Count
    size: _Count
    block_error: NotRequired[_Size | None]


class _Sparsity(TypedDict):
    scope: _Share
    decoder: _Share
    model: _Share
    dense_bytes: NotRequired[_Count]
    packed_bytes: NotRequired[_Count]
    zero_weights: NotRequired[_Share]
    layers: list[_Layer]


class _Task(TypedDict):
    """One of acc and exact_match; a single document has no standard error."""

    acc: NotRequired[_Share]
    acc_stderr: NotRequired[_Size]
    exact_match: NotRequired[_Share]
    exact_match_stderr: NotRequired[_Size]
    acc_norm: NotRequired[_Share]
    acc_norm_stderr: NotRequired[_Size]
    bits_per_byte: NotRequired[_Size]
    ece: NotRequired[_Share]
    group: NotRequired[str]
    documents: NotRequired[_Count]
    split: str | None
    limit: int | None


class _Divergence(TypedDict):
    kl: _Size
    agreement: _Share
    perplexity_ratio: Annotated[float, Ge(0), Lt(math.inf)]


class _Generation(TypedDict):
    prompts: _Count
    tokens: _Count
    equal: _Share
    distinct_4: _Share


class _Step(TypedDict):
    step: _Count
    loss: float | None
    perplexity: NotRequired[dict[str, Annotated[float, Ge(1), Lt(math.inf)]]]
    kl: NotRequired[dict[str, _Size]]
    agreement: NotRequired[dict[str, _Share]]
    mask_overlap: NotRequired[dict[str, _Share]]


class _Retrain(TypedDict):
    """The course of a retraining, and what became of the masks: Jaccard index by role, a correlation by block."""

    curve: list[_Step]
    gap_closed: NotRequired[dict[str, float]]
    mask_overlap: NotRequired[dict[str, _Share]]
    activation_rank_correlation: NotRequired[list[Annotated[float, Ge(-1), Le(1)] | None]]


class _Metrics(TypedDict):
    perplexity: NotRequired[dict[str, Annotated[float, Ge(1), Lt(math.inf)]]]
    window_nll: NotRequired[dict[str, list[Annotated[float, Ge(-1e-3), Lt(math.inf)]]]]
    position_nll: NotRequired[dict[str, list[Annotated[float, Ge(-1e-3), Lt(math.inf)]]]]
    divergence: NotRequired[dict[str, _Divergence]]
    window_kl: NotRequired[dict[str, list[_Size]]]
    window_agreement: NotRequired[dict[str, list[_Share]]]
    tasks: NotRequired[dict[str, _Task]]
    generation: NotRequired[_Generation]
    retrain: NotRequired[_Retrain]
    mean_acc: NotRequired[_Share]
    mean_acc_norm: NotRequired[_Share]


class _Cost(TypedDict):
    load_s: _Size
    prune_s: _Size
    eval_s: _Size
    retrain_s: NotRequired[_Size]
    peak_rss_bytes: _Count
    peak_gpu_bytes: _Count | None


class _Solver(TypedDict):
    starved_experts: NotRequired[list[str]]


class _Record(TypedDict):
    """A record (results/README.md). Fields that are not named here are allowed; a number out of its range is not."""

    key: str
    created: str
    name: NotRequired[str]
    tags: NotRequired[list[str]]
    notes: NotRequired[str]
    config: _RunConfig
    identity: _Identity
    protocol: _Protocol
    calibration: _Calibration | None
    sparsity: _Sparsity
    metrics: _Metrics
    cost: _Cost
    solver: _Solver
    environment: dict[str, Any]


def schema_is_newer(value: Any) -> bool:
    """Whether a JSON value says that a later version of this project wrote it as a record."""
    schema = value.get("schema") if isinstance(value, dict) else None
    return isinstance(schema, int) and schema > SCHEMA


def record_problem(value: Any, key: str) -> str | None:
    """Say why a JSON value is not a valid record of this key (the name of its folder); None if it is."""
    if not isinstance(value, dict):
        return "it holds no JSON object"
    if value.get("schema") != SCHEMA:
        return f"schema is {value.get('schema')!r}; this version reads {SCHEMA}"
    if value.get("key") != key:
        return f"its key is {value.get('key')!r}"
    return _schema_problem(value, _Record) or _contradiction(value["metrics"], value["protocol"])


def is_config(value: Any) -> bool:
    """Check that a JSON value holds the settings that define a cell."""
    return _schema_problem(value, _CellConfig) is None


def _schema_problem(value: Any, schema: type) -> str | None:
    from pydantic import ValidationError

    try:
        _adapter(schema).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    return None


@cache
def _adapter(schema: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def _contradiction(metrics: _Metrics, protocol: _Protocol) -> str | None:
    scored, tasks = metrics.get("perplexity", {}), metrics.get("tasks", {})
    if scored and not {"context", "dataset", "split", "windows", "windows_sha256"} <= protocol.keys():
        return "protocol: it does not say which windows the perplexity is of"
    if any(not metrics.get("window_nll", {}).get(name) for name in scored):
        return "metrics.window_nll: nothing for a perplexity that is there"
    if tasks and not {"mean_acc", "mean_acc_norm"} <= metrics.keys():
        return "metrics: tasks without their mean_acc and mean_acc_norm"
    if tasks and not {"lm_eval", "limit"} <= protocol.keys():
        return "protocol: it does not say which lm_eval scored the tasks"
    return next(filter(None, map(_task_problem, tasks.values())), None)


def _task_problem(task: _Task) -> str | None:
    if "acc" not in task and "exact_match" not in task:
        return "metrics.tasks: a task with neither acc nor exact_match"
    # a single document has no standard error, nor has a group of tasks of one each
    if 1 not in (task.get("documents"), task.get("limit")):
        for name in ("acc", "acc_norm", "exact_match"):
            if name in task and f"{name}_stderr" not in task:
                return f"metrics.tasks: an {name} without its standard error"
    return None


def flatten(node: Any, path: str = "") -> dict[str, str]:
    """Return the leaves of nested settings as text, by dotted name."""
    if not isinstance(node, Mapping):
        return {path: str(node)}
    leaves: dict[str, str] = {}
    for name, value in node.items():
        leaves |= flatten(value, f"{path}.{name}".lstrip("."))
    return leaves
