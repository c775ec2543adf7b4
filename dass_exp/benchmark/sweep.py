"""Time a whole sweep, five methods at three patterns as a user runs them, against the floors of its cells."""

import itertools
import tempfile
import time
from collections.abc import Callable
from typing import Any

from dass_exp.config.compose import composing, settings_of
from dass_exp.runs.context import ModelCache, RunContext
from dass_exp.runs.run import run

METHODS = ("dense", "magnitude", "wanda", "sparsegpt", "dass")
PATTERNS = ("unstructured", "4of8", "2of4")


def sweep_ratio(
    overrides: list[str], floor_s: float, plain_s: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Run the fifteen cells in this process, records included, and compare with the passes that they cannot avoid.

    ``overrides`` choose model, calibration and evaluation. Each cell needs ``plain_s``, the seconds of a plain forward
    pass over the scored windows, and each calibrated one also the floor.
    """
    context, keys = RunContext(shared=ModelCache()), set[str]()
    seconds = floors = 0.0
    with tempfile.TemporaryDirectory() as results, composing():
        common = [*overrides, f"results_dir={results}", "tracker=none"]
        for method, pattern in itertools.product(METHODS, PATTERNS):
            config = settings_of([*common, f"method={method}", f"pattern={pattern}"])
            start = time.perf_counter()
            record = run(config, context).record
            seconds += (elapsed := time.perf_counter() - start)
            if record["key"] not in keys:  # dense is one record, whatever the pattern
                floors += plain_s + (floor_s if record["calibration"] else 0.0)
            keys.add(record["key"])
            progress(f"sweep: {method} {pattern} {elapsed:.2f} s")
    cells = len(METHODS) * len(PATTERNS)
    return {"cells": cells, "records": len(keys), "seconds": seconds, "floors_s": floors, "ratio": seconds / floors}
