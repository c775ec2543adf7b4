"""``make gpu-check``: what was built without a GPU, tried on one: line by line, ok or what differs."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as __main__.py does, before a library reads them
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers

from dass_exp.benchmark.gpu_checks import Line, Setup, checks, guarded
from dass_exp.benchmark.gpu_kernels import kernel_lines
from dass_exp.errors import UserError
from dass_exp.report.write import markdown_table
from dass_exp.storage.durable import now, write_json
from dass_exp.storage.environment import environment

log = logging.getLogger("dass_exp.benchmark")
_NO_GPU = "gpu-check: this machine has no CUDA GPU that torch can use, so nothing was checked"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and write; return 0 if nothing differs, or if there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m dass_exp.benchmark.gpu_check", description=__doc__)
    parser.add_argument("--model", default="smollm2_135m", help="name of conf/model or a folder")
    parser.add_argument("--samples", type=int, default=8, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="their tokens")
    parser.add_argument("--block", type=int, nargs=2, default=(4096, 11008), help="features of the block that is timed")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="folder of the results")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or accelerator.type != "cuda":
        sys.stdout.write(f"{_NO_GPU}\n")
        return 0
    device = torch.device("cuda", 0)
    try:
        setup = Setup.load(options.model, device, options.samples, options.length, tuple(options.block))
    except UserError as error:
        log.error("%s", error)
        return 1
    lines: list[Line] = []
    every = [(*check, False) for check in checks(setup)] + [(*line, True) for line in kernel_lines(setup)]
    for name, check, optional in every:
        lines.append(guarded(name, check, optional))
        log.info("%s: %s: %s", lines[-1].name, lines[-1].status, lines[-1].detail)
    path = _write(lines, options.output, device)
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    sys.stdout.write(f"{table}\nwrote {path}\n")
    return 1 if any(line.status in ("differs", "failed") for line in lines) else 0


def _write(lines: Sequence[Line], folder: Path, device: torch.device) -> Path:
    """Write the result as JSON and Markdown; return the path of the first."""
    machine, created = environment(device), now()
    card = "-".join(str(machine["gpu"]).lower().split())
    path = folder / f"gpu-{card}-{created[:10]}.json"
    content = {"schema": 1, "created": created, "machine": machine, "lines": [asdict(line) for line in lines]}
    write_json(path, content, checksum=False)
    title = f"# GPU check, {machine['gpu']}, {created[:10]}"
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}, dass_exp {machine['dass_exp']}"
    rows = [(line.name, line.status, line.detail) for line in lines]
    page = [title, versions, markdown_table(("check", "result", "detail"), rows)]
    path.with_suffix(".md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
