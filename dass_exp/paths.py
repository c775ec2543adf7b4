"""The folder with conf/ and sweeps/, and the cache of offline models and data."""

import os
from pathlib import Path


def project_root() -> Path:
    """Return the folder of ``conf/`` and ``sweeps/``: the checkout, or the copy inside the wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parent
    return checkout if (checkout / "pyproject.toml").is_file() and (checkout / "conf").is_dir() else package / "_share"


def cache_dir() -> Path:
    """Return the folder for offline models and data: ``$DASS_EXP_CACHE``, else ``~/.cache/dass_exp``."""
    return Path(os.environ.get("DASS_EXP_CACHE") or Path.home() / ".cache" / "dass_exp").expanduser()
