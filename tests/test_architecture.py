"""The rules of the house, checked on its source: sizes, types, what may be called, who may import what."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from support import CONF, ROOT

from dass_exp.methods.base import Pruner

PACKAGE = Path(importlib.import_module("dass_exp").__file__).parent
FILES = {
    str(path.relative_to(PACKAGE).with_suffix("")): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "_share" not in path.parts
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
METHODS = sorted(
    name for name in FILES if name.startswith("methods/") and name not in ("methods/__init__", "methods/base")
)

# From the ground up: a file imports files of lower lines only. A new file must be given its place here.
LAYERS = [
    ["errors", "paths", "schema", "tensorfile", "methods/__init__", "evaluate/__init__", "report/__init__"],
    ["masks", "maskfile", "matrices", "stats", "families", "assets", "held"],
    ["decoder", "digest", "tiny"],
    ["sources", "shards"],
    ["layout"],
    ["source"],
    ["methods/base"],
    ["methods/*"],
    ["capture", "blockreport"],
    ["progress"],
    ["experts", "replay"],
    ["observe", "evaluate/head"],
    ["calibrate", "memory"],
    ["models", "data", "verify", "evaluate/perplexity", "evaluate/continuations"],
    ["evaluate/alongside"],
    ["evaluate/zeroshot", "journal"],
    ["components", "track", "workers", "train"],
    ["config"],
    ["key", "record", "sketch"],
    ["summarise", "checkpoint"],
    ["bench"],
    ["pruning"],
    ["making"],
    ["settled"],
    ["run", "plan"],
    ["report/load", "report/noise", "report/template"],
    ["report/console", "report/alike"],
    ["report/compare", "report/sheet", "report/published", "report/pair"],
    ["report/callback", "report/write", "report/curves"],
    ["report/figures", "report/page"],
    ["report/cli"],
    ["api", "__main__"],
    ["speed/__init__", "speed/floor", "speed/table"],
    ["speed/measure", "speed/picture"],
    ["speed/scoring", "speed/sweep", "speed/scale", "speed/large"],
    ["speed/__main__"],
    ["__init__"],
]
EDGES = {"wandb": "track", "lm_eval": "evaluate/zeroshot", "datasets": "data"}
each_file = pytest.mark.parametrize("name", FILES)


def layer_of(name: str) -> int:
    exact = [number for number, layer in enumerate(LAYERS) if name in layer]
    return (
        exact or [number for number, layer in enumerate(LAYERS) if any(fnmatch(name, entry) for entry in layer)] or [-1]
    )[0]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """All of them, self and cls apart."""
    spec = function.args
    named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    return [argument for index, argument in enumerate(named) if not (index == 0 and argument.arg in ("self", "cls"))]


def imported(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every import, wherever it stands, by the dotted name of what is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package"
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def ours(dotted: str) -> str | None:
    """The file of this package that an import reaches, None for another package."""
    first, *rest = dotted.split(".")
    if first != "dass_exp":
        return None
    for end in range(len(rest), -1, -1):
        path = "/".join(rest[:end])
        for candidate in (path, f"{path}/__init__".lstrip("/")):
            if candidate in FILES:
                return candidate
    raise AssertionError(dotted)


def uses(name: str) -> set[str]:
    return {target for _, dotted in imported(TREES[name]) if (target := ours(dotted))}


def called(tree: ast.AST) -> set[str]:
    """Plain names that are called: print, not log.print."""
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def words(tree: ast.AST) -> set[str]:
    """Names and attributes, comments and texts apart."""
    return {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(tree)
        if isinstance(node, (ast.Attribute, ast.Name))
    }


# Sizes and types


@each_file
def test_a_file_has_at_most_250_lines(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 250


@each_file
def test_a_function_has_at_most_60_lines(name):
    assert [function.name for function in functions(TREES[name]) if function.end_lineno - function.lineno >= 60] == []


@each_file
def test_a_function_has_at_most_7_parameters(name):
    assert [function.name for function in functions(TREES[name]) if len(parameters(function)) > 7] == []


@each_file
def test_every_function_is_typed(name):
    bare = [
        function.name for function in functions(TREES[name]) if function.returns is None and function.name != "__init__"
    ]
    bare += [
        f"{function.name}({argument.arg})"
        for function in functions(TREES[name])
        for argument in parameters(function)
        if argument.annotation is None
    ]
    assert bare == []


@each_file
def test_every_file_says_what_it_is_for(name):
    assert ast.get_docstring(TREES[name])


# What may be called


@each_file
def test_no_print_no_eval_no_exec(name):
    assert called(TREES[name]) & {"print", "eval", "exec", "compile", "__import__", "breakpoint", "input"} == set()


@each_file
def test_no_assert_and_no_bare_except(name):
    assert [node.lineno for node in ast.walk(TREES[name]) if isinstance(node, ast.Assert)] == []
    assert [
        node.lineno for node in ast.walk(TREES[name]) if isinstance(node, ast.ExceptHandler) and node.type is None
    ] == []


@each_file
def test_no_pickle_and_no_resolver_of_code(name):
    modules = {dotted.split(".")[0] for _, dotted in imported(TREES[name])}
    assert modules & {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"} == set()
    assert words(TREES[name]) & {"register_new_resolver", "register_resolver"} == set()
    source = ast.unparse(TREES[name])
    assert "torch.load(" not in source
    assert "trust_remote_code=True" not in source
    assert "shell=True" not in source


@each_file
def test_masks_are_made_in_one_place(name):
    ranking = words(TREES[name]) & {"topk", "argsort", "kthvalue", "msort", "argpartition"}
    assert bool(ranking) == (name == "masks")


@each_file
def test_module_names_of_models_stand_in_one_place(name):
    source = FILES[name].read_text(encoding="utf-8")
    found = set(re.findall(r"\b(?:[qkvo]|gate|up|down|out)_proj\b|\bself_attn\b|\bmodel\.layers\b|\bfc[12]\b", source))
    if name == "families":
        assert found >= {"q_proj", "down_proj", "gate_proj", "up_proj"}
    else:
        assert found == set()


# Who may import what


@each_file
def test_every_file_has_its_place(name):
    assert layer_of(name) >= 0, f"{name}: place it in LAYERS"


def test_no_place_is_empty():
    entries = [entry for layer in LAYERS for entry in layer]
    assert [entry for entry in entries if not any(fnmatch(name, entry) for name in FILES)] == []
    assert len(entries) == len(set(entries))


@each_file
def test_imports_run_downward(name):
    assert {target for target in uses(name) if layer_of(target) >= layer_of(name)} == set()


def test_the_search_for_imports_finds_them():
    assert uses("run") >= {"bench", "key", "summarise", "making", "methods/dense"}
    assert uses("config") >= {"evaluate/zeroshot"}  # it stands inside a function
    assert uses("key") >= {"evaluate/__init__"}


def test_reports_run_no_model():
    reached, waiting = set(), [name for name in FILES if name.startswith("report/")]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += uses(name)
    assert {name for name in reached if not name.startswith("report/")} <= {
        "errors",
        "paths",
        "schema",
        "tensorfile",
        "components",
        "maskfile",
        "record",
        "track",
    }


def test_methods_are_named_by_configs_and_not_by_code():
    naming = {name: {target for target in uses(name) if target in METHODS} for name in FILES}
    assert {name: targets for name, targets in naming.items() if targets} == {
        name: {"methods/dense"} for name in ("making", "run")
    }


@pytest.mark.parametrize(("library", "home"), EDGES.items())
def test_third_parties_stay_at_the_edge(library, home):
    found = {
        name: [node for node, dotted in imported(tree) if dotted.split(".")[0] == library]
        for name, tree in TREES.items()
    }
    assert {name for name, nodes in found.items() if nodes} == {home}
    assert not set(found[home]) & set(TREES[home].body), "it is imported where it is used, not when the program starts"


def test_the_command_starts_without_them():
    code = f"import sys, dass_exp.__main__; sys.exit(' '.join(sorted({set(EDGES)!r} & set(sys.modules))) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# A method is one dataclass in one file


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_dataclass_in_one_file_with_one_choice(name):
    module = importlib.import_module("dass_exp." + name.replace("/", "."))
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Pruner) and value.__module__ == module.__name__
    ]
    (method,) = found
    stem = name.removeprefix("methods/")
    assert method.__name__.lower() == stem
    assert "__dataclass_params__" in vars(method)
    assert method.__doc__
    choice = yaml.safe_load((CONF / "method" / f"{stem}.yaml").read_text(encoding="utf-8"))
    assert choice.pop("_target_") == f"{module.__name__}.{method.__name__}"
    assert choice == {field.name: field.default for field in dataclasses.fields(method)}


def test_every_choice_of_a_method_has_its_file():
    assert {f"methods/{path.stem}" for path in (CONF / "method").glob("*.yaml")} == set(METHODS)
