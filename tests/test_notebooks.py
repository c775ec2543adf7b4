"""The notebooks run from top to bottom, on a tiny model, and hold no output."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, environment

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_of(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["first_steps", "own_method"]


@pytest.mark.thorough
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tiny, tmp_path):
    # as a kernel does: one name space, and the value of the last line of each cell is computed
    code = "\n\n".join(code_of(notebook))
    code = re.sub(r'"smollm2_135m"', repr(str(tiny)), code)
    code = re.sub(r"= 16, 512", "= 4, 32", code).replace(", 16, 512", ", 4, 32")
    assert str(tiny) in code and "4, 32" in code
    script = tmp_path / "notebook.py"
    script.write_text(code, encoding="utf-8")
    env = environment() | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    call = [sys.executable, str(script)]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    made = {path.name for path in tmp_path.iterdir()}
    assert made >= ({"pruned", "results"} if notebook.stem == "first_steps" else {"own_method.png"})
