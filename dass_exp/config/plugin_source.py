"""The source code of plugins, by content: an edited method is another method, whatever its version says."""

import functools
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from dass_exp.config.components import OURS

_SUFFIXES = (".py", *EXTENSION_SUFFIXES)
_LIBRARIES = frozenset({"torch", "transformers", "numpy"})  # of which a class may inherit; not the user's code


def source_digest(kind: type) -> str | None:
    """Return 16 hex digits of a SHA-256 over the source of the packages that define a class and its base classes.

    None if these are ours and the standard library's only. As the code of a process does not change once it is
    imported, each package is read once.
    """
    packages = {base.__module__.partition(".")[0] for base in kind.__mro__}
    digests = [_package_digest(name) for name in sorted(packages - OURS - _LIBRARIES - sys.stdlib_module_names)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16] if any(digests) else None


@functools.cache
def _package_digest(name: str) -> str:
    """Hash the files of a package, or the file of a module; empty for one that has no file, such as a notebook."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    roots = list(getattr(module, "__path__", [])) or ([file] if file else [])
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
