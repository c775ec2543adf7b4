"""The folder with conf/ and sweeps/, the cache of offline models and data, and the name of a file of masks."""

import os
from pathlib import Path

MASKS = "masks.safetensors"  # beside a record or in the folder of a saved model; written by storage/mask_file.py


def project_root() -> Path:
    """Return the folder of ``conf/`` and ``sweeps/``: the checkout, or the copy inside the wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parent
    return checkout if (checkout / "pyproject.toml").is_file() and (checkout / "conf").is_dir() else package / "_share"


def cache_dir() -> Path:
    """Return the folder for offline models and data: ``$DASS_EXP_CACHE``, else ``~/.cache/dass_exp``."""
    return Path(os.environ.get("DASS_EXP_CACHE") or Path.home() / ".cache" / "dass_exp").expanduser()
