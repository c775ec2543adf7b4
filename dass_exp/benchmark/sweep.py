"""Time a whole sweep: five methods at three patterns, as a user runs them, against the floors of its cells."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

from hydra import compose, initialize_config_dir

from dass_exp.config.settings import register, validate
from dass_exp.paths import project_root
from dass_exp.runs.context import Shelf
from dass_exp.runs.run import run

METHODS = ("dense", "magnitude", "wanda", "sparsegpt", "dass")
PATTERNS = ("unstructured", "4of8", "2of4")


def sweep_ratio(overrides: list[str], floor_s: float, plain_s: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run the fifteen cells in this process, records written and all, and compare with the passes that they cannot avoid.

    Args:
        overrides: of every cell: model, calibration and evaluation.
        floor_s: the floor of one calibrated cell.
        plain_s: a plain pass over the windows that each cell scores.
        tell: told each cell as it is done.
    """
    os.environ.setdefault("DASS_EXP_ROOT", str(project_root()))
    register()
    shelf, keys = Shelf(), set[str]()
    taken = floors = 0.0
    with (
        tempfile.TemporaryDirectory() as results,
        initialize_config_dir(str(project_root() / "conf"), version_base="1.3"),
    ):
        for method in METHODS:
            for pattern in PATTERNS:
                composed = compose(
                    "config",
                    [*overrides, f"method={method}", f"pattern={pattern}", f"results_dir={results}", "tracker=none"],
                )
                settings = validate(composed)
                start = time.perf_counter()
                key = run(settings, shelf=shelf).record["key"]
                taken += (cell := time.perf_counter() - start)
                if key not in keys:  # dense is one cell, whatever the pattern
                    floors += plain_s + (floor_s if settings.method.stat else 0.0)
                keys.add(key)
                tell(f"sweep: {method} {pattern} {cell:.2f} s")
    return {
        "cells": len(METHODS) * len(PATTERNS),
        "records": len(keys),
        "seconds": taken,
        "floors_s": floors,
        "ratio": taken / floors,
    }
