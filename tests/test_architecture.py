"""The rules of the package, checked on its source: sizes, types, what may be called, who may import what."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
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
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
METHODS = sorted(path.stem for path in (PACKAGE / "methods").glob("*.py") if path.stem not in ("__init__", "base"))

# Folders, and files that are in none: imports run downwards, or along a row. benchmark is an entry point of its own.
ROWS = [
    {"__init__", "__main__", "api", "cell", "notebook", "train", "benchmark", "speed"},
    {"report"},
    {"runs"},
    {"engine", "evaluate", "retrain"},
    {"methods", "models", "data", "refine", "repair", "allocation", "permute", "trackers"},
    {"storage"},
    {"config"},
    {"masks", "statistics", "hessian", "errors", "paths"},
]
EDGES = {
    "wandb": "trackers/wandb",
    "mlflow": "trackers/mlflow",
    "trackio": "trackers/trackio",
    "lm_eval": "evaluate/zeroshot",
    "datasets": "data/texts",
}
FORBIDDEN_CALLS = {"print", "eval", "exec", "compile", "__import__", "breakpoint", "input"}
FORBIDDEN_MODULES = {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_WORDS = {"register_new_resolver", "register_resolver"}
FORBIDDEN_TEXTS = ("torch.load(", "trust_remote_code=True", "shell=True")
RANKING = {"topk", "argsort", "kthvalue", "msort", "argpartition"}
MODULE_NAMES = re.compile(r"\b(?:[qkvo]|gate|up|down|out)_proj\b|\bself_attn\b|\bmodel\.layers\b|\bfc[12]\b")


def row_of(name: str) -> int:
    """The row of a file by its folder; an error if it has none."""
    return next(number for number, row in enumerate(ROWS) if name.split("/", 1)[0] in row)


def imports_of(node: ast.AST, typing_only: bool = True) -> Iterator[tuple[ast.stmt, str]]:
    """Every import below a node with the dotted name of what it imports, with or without those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not typing_only:
            continue
        if isinstance(child, ast.Import):
            yield from ((child, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports name the package"
            yield from ((child, f"{child.module}.{alias.name}") for alias in child.names)
        yield from imports_of(child, typing_only)


def file_of(dotted: str) -> str | None:
    """The file of this package that an import reaches, None for another package."""
    first, *parts = dotted.split(".")
    if first != "dass_exp":
        return None
    paths = ["/".join(parts[:end]) for end in range(len(parts), -1, -1)]
    return next(file for path in paths for file in (path, f"{path}/__init__".lstrip("/")) if file in FILES)


# The files that each file imports when it runs.
IMPORTS = {
    name: {file for _, dotted in imports_of(tree, typing_only=False) if (file := file_of(dotted))} - {name}
    for name, tree in TREES.items()
}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """All parameters, self and cls apart."""
    spec = function.args
    named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    return [argument for index, argument in enumerate(named) if not (index == 0 and argument.arg in ("self", "cls"))]


def is_untyped(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    bare = any(argument.annotation is None for argument in parameters(function))
    return bare or (function.returns is None and function.name != "__init__")


def words(tree: ast.AST) -> set[str]:
    """Names and attributes, comments and texts apart."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Name))]
    return {node.attr if isinstance(node, ast.Attribute) else node.id for node in nodes}


def calls(tree: ast.AST) -> set[str]:
    """Plain names that are called: print, not log.print."""
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def violations(name: str) -> dict[str, list[object]]:
    """What a file breaks, by rule: lines, names or texts."""
    tree, source, lines = TREES[name], SOURCES[name], SOURCES[name].splitlines()
    defs, code, modules = list(functions(tree)), ast.unparse(tree), {dotted for _, dotted in imports_of(tree)}
    excepts = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    return {
        "400 lines a file": [len(lines)] if len(lines) > 400 else [],
        "120 columns a line": [number for number, line in enumerate(lines, 1) if len(line) > 120],
        "60 lines a function": [item.name for item in defs if item.end_lineno - item.lineno >= 60],
        "7 parameters a function": [item.name for item in defs if len(parameters(item)) > 7],
        "typed functions": [item.name for item in defs if is_untyped(item)],
        "a docstring": [] if ast.get_docstring(tree) else ["none"],
        "no print, no eval": sorted(calls(tree) & FORBIDDEN_CALLS),
        "no assert, no bare except": [node.lineno for node in (*asserts, *excepts)],
        "no pickle": [module for module in modules if module.split(".")[0] in FORBIDDEN_MODULES],
        "no resolver": sorted(words(tree) & FORBIDDEN_WORDS),
        "no foreign code, no shell": [text for text in FORBIDDEN_TEXTS if text in code],
        "masks are made in masks.py only": [] if name == "masks" else sorted(words(tree) & RANKING),
        "names of modules in families.py only": [] if name == "models/families" else MODULE_NAMES.findall(source),
        "imports run one way": sorted(file for file in IMPORTS[name] if row_of(file) < row_of(name)),
    }


VIOLATIONS = {path.relative_to(ROOT): violations(name) for name, path in FILES.items()}


@pytest.mark.parametrize("rule", violations("__init__"))
def test_every_file_keeps_the_rule(rule):
    broken = [f"{path}: {found[rule]}" for path, found in VIOLATIONS.items() if found[rule]]
    assert not broken, "\n".join([rule, *broken])


def test_the_rules_see_what_they_look_for():
    assert words(TREES["masks"]) & RANKING
    assert set(MODULE_NAMES.findall(SOURCES["models/families"])) >= {"q_proj", "down_proj", "gate_proj", "up_proj"}
    assert IMPORTS["runs/run"] >= {"runs/context", "runs/execute", "runs/resolve", "config/settings", "errors"}
    assert "evaluate/__init__" in IMPORTS["runs/resolved_run"]
    assert file_of("dass_exp.api") == "api"
    assert row_of("errors") > row_of("config/settings") > row_of("engine/prune") > row_of("runs/run") > row_of("api")
    function = next(functions(ast.parse("def f(self, a, *, b: int) -> None: ...")))
    assert [argument.arg for argument in parameters(function)] == ["a", "b"]
    assert is_untyped(function)


def test_every_folder_has_its_row():
    rooms = {name.split("/")[0] for name in FILES}
    assert rooms - set().union(*ROWS) == set(), "place it in ROWS"
    assert sum(len(row) for row in ROWS) == len(set().union(*ROWS))


def test_no_two_files_import_each_other():
    TopologicalSorter(IMPORTS).prepare()  # a CycleError names the files


def test_few_files_are_in_no_folder():
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 12


def test_reports_run_no_model():
    reached, waiting = set(), [name for name in FILES if name.startswith("report/")]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += IMPORTS[name]
    rooms = ("report/", "storage/", "config/", "trackers/")
    assert {name for name in reached if not name.startswith(rooms)} <= {
        "errors",
        "paths",
        "masks",
        "evaluate/task_scores",
    }


def test_methods_are_named_by_configs_and_not_by_code():
    files = {f"methods/{method}" for method in METHODS}
    assert {name: IMPORTS[name] & files for name in FILES if IMPORTS[name] & files} == {
        "runs/resolved_run": {"methods/dense"}
    }


@pytest.mark.parametrize(("library", "home"), EDGES.items())
def test_third_parties_stay_at_the_edge(library, home):
    statements = {
        name: [node for node, dotted in imports_of(tree) if dotted.split(".")[0] == library]
        for name, tree in TREES.items()
    }
    assert {name for name, nodes in statements.items() if nodes} == {home}
    assert not set(statements[home]) & set(TREES[home].body), "it is imported where it is used, not at the start"


def test_the_command_starts_without_them():
    code = f"import sys, dass_exp.__main__; sys.exit(' '.join(sorted({set(EDGES)!r} & set(sys.modules))) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_dataclass_in_one_file_with_one_choice(name):
    module = importlib.import_module(f"dass_exp.methods.{name}")
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    (method,) = [value for value in own if isinstance(value, type) and issubclass(value, Pruner)]
    assert method().name == name
    assert "__dataclass_params__" in vars(method)
    assert method.__doc__
    choice = yaml.safe_load((CONF / "method" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert choice.pop("_target_") == f"{module.__name__}.{method.__name__}"
    assert choice == {field.name: field.default for field in dataclasses.fields(method)}


def test_every_choice_of_a_method_has_its_file():
    assert {path.stem for path in (CONF / "method").glob("*.yaml")} == set(METHODS)
