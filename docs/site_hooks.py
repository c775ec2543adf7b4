"""Hooks of mkdocs: pages link to files beside docs/ as they stand in the repository; the site gets them too."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_ROOT = Path(__file__).resolve().parent.parent
_PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "results/README.md",
    "results/leaderboard/leaderboard.md",
)
_TABLES = ("results/*/tables/*.md", "results/bench/*", "results/reference/*")
_SHOWN = (*_TABLES, "results/leaderboard/runs/*/result.json", "results/*/figures/*.png", "notebooks/*.ipynb")


def on_files(files: Any, config: Any) -> Any:
    """Add what the pages link to: pictures, tables, notebooks, and the pages at the top of the repository."""
    for pattern in (*_PAGES, *_SHOWN):
        for path in sorted(_ROOT.glob(pattern)):
            uri = f"repository/{path.relative_to(_ROOT).as_posix()}"
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links that leave docs/ point to the copies."""
    if page.file.src_uri.startswith("repository/"):
        return re.sub(r"(?<=\]\()((?:\.\./)?)docs/", r"../\1", markdown)
    depth = page.file.src_uri.count("/")
    return re.sub(rf"(?<=\]\()(?:\.\./){{{depth + 1}}}", "../" * depth + "repository/", markdown)
