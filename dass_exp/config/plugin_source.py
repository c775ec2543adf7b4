"""The source code of plugins, by content: an edited method is another method, whatever its version says."""

import ast
import functools
import hashlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from dass_exp.config.components import OURS

_SUFFIXES = (".py", *EXTENSION_SUFFIXES)
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_LIBRARIES = frozenset({"torch", "transformers", "numpy"})  # of which a class may inherit; not the user's code


def source_digest(kind: type) -> str | None:
    """Return 16 hex digits of a SHA-256 over the source of the packages that define a class and its base classes.

    Of what these import, the user's own packages count too: those that are not installed among the libraries. None if
    all are ours and the standard library's. As the code of a process does not change once it is imported, each package
    is read once.
    """
    bases = {base.__module__.partition(".")[0] for base in kind.__mro__} - OURS - _LIBRARIES - sys.stdlib_module_names
    digests = [_package_digest(name) for name in sorted(_with_imports(bases))]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16] if any(digests) else None


def _with_imports(names: Iterable[str]) -> set[str]:
    """Add the user's own packages that these import, and what those import."""
    found, waiting = set(names), {name for name in names if _is_the_users(name)}
    while waiting:
        found.add(name := waiting.pop())
        waiting |= {imported for imported in _imports(name) if _is_the_users(imported)} - found
    return found


def _is_the_users(name: str) -> bool:
    """Whether a package has source code outside of the folders of installed libraries."""
    if name in OURS | _LIBRARIES | sys.stdlib_module_names:
        return False
    own = [Path(root) for root in _roots(name) if not _INSTALLED & {*Path(root).parts}]
    return next(_sources(own), None) is not None  # an empty folder of that name is a package to Python too


@functools.cache
def _imports(name: str) -> frozenset[str]:
    """Return the top-level names that the source of a package imports, wherever it does."""
    found = set[str]()
    for path, content in _sources(map(Path, _roots(name))):
        try:
            with warnings.catch_warnings(action="ignore"):
                nodes = list(ast.walk(ast.parse(content))) if path.endswith(".py") else []
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # it cannot be imported either
        for node in nodes:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return frozenset(found - {name})


@functools.cache
def _roots(name: str) -> tuple[str, ...]:
    """Return the folders of a package, or the file of a module; none for what has no file, such as a notebook."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is None:
        with suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)
    folders = getattr(module, "__path__", None) or getattr(spec, "submodule_search_locations", None) or ()
    file = getattr(module, "__file__", None) or getattr(spec, "origin", None)
    return tuple(folders) or ((file,) if file and Path(file).is_file() else ())


@functools.cache
def _package_digest(name: str) -> str:
    """Hash the files of a package, or the file of a module; empty for one that has no file, such as a notebook."""
    roots = _roots(name)
    total = hashlib.sha256(name.encode())
    for path, content in _sources(map(Path, roots)):
        total.update(f"{path}:{hashlib.sha256(content).hexdigest()};".encode(errors="surrogateescape"))
    return total.hexdigest() if roots else ""


def _sources(roots: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield the name of each source file, relative to its package, and its content."""
    for root in roots:
        if root.is_file():
            yield root.name, root.read_bytes()
        for parent, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                path = Path(parent, name)
                if name.endswith(_SUFFIXES) and path.is_file():
                    yield path.relative_to(root).as_posix(), path.read_bytes()
