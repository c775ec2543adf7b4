"""``make gpu-check``: its one line without a GPU, and every check on a pretended one."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from support import save_tiny

from dass_exp.benchmark import gpu_check, gpu_checks, gpu_kernels
from dass_exp.benchmark.gpu_checks import Line, guarded


def test_without_a_gpu_it_says_so_and_succeeds(capsys, tmp_path):
    assert gpu_check.main(["--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "gpu-check: this machine has no CUDA GPU that torch can use, so nothing was checked"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_every_check_runs_on_a_pretended_gpu(accelerator, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "SHAPES", ((64, 128),))
    monkeypatch.setattr(gpu_kernels, "TOKENS", {"prefill": 16, "decode of 1": 1})
    monkeypatch.setattr(gpu_kernels, "_ROUNDS", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = save_tiny(tmp_path / "tiny")
    sizes = ["--samples", "4", "--length", "12", "--block", "64", "32"]
    # the two workers are processes of their own, for which no GPU is pretended, and that is said
    assert gpu_check.main(["--model", str(model), *sizes, "--output", str(tmp_path / "bench")]) == 1
    (path,) = (tmp_path / "bench").glob("*.json")
    assert path.name.startswith("gpu-pretended-gpu-20")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["machine"]["gpu"] == "Pretended GPU"
    results = {line["name"]: line["status"] for line in content["lines"]}
    checked = {name: status for name, status in results.items() if "kernel" not in name}
    (unlike,) = [
        line for line in content["lines"] if line["name"] in checked and line["status"] not in ("ok", "measured")
    ]
    assert (unlike["name"], unlike["status"]) == ("two workers", "differs")
    numbers = re.findall(r"(\d+\.\d{4}) \(here (\d+\.\d{4})\)", unlike["detail"])
    assert unlike["detail"].startswith("on GPU None: ") and len(numbers) == 2
    assert all(theirs == ours for theirs, ours in numbers)
    assert {
        "masks of dass",
        "masks of sparsegpt",
        "perplexity",
        "bfloat16",
        "waits of a block",
        "masks of alps",
        "two models in a process",
        "retraining",
        "two GPUs",
        "two workers",
        "peak memory against the plan",
    } <= checked.keys()
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name in results)
    assert table in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("check", "kernel", "code"),
    [
        (lambda: Line("seven", "differs", "8"), lambda: Line("four", "measured", "4"), 1),
        (lambda: 1 / 0, lambda: Line("four", "measured", "4"), 1),
        (lambda: Line("seven", "ok", "7"), lambda: 1 / 0, 0),  # a card without that kernel
    ],
    ids=["differs", "failed", "not run"],
)
def test_what_differs_or_fails_fails_the_command(check, kernel, code, accelerator, tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "tiny")
    monkeypatch.setattr(gpu_check, "kernel_lines", lambda setup: [("four", kernel)])
    monkeypatch.setattr(gpu_check, "checks", lambda setup: [("seven", check)])
    sizes = ["--samples", "2", "--length", "8", "--output", str(tmp_path)]
    assert gpu_check.main(["--model", str(model), *sizes]) == code
    assert gpu_check.main(["--model", str(tmp_path / "none"), *sizes]) == 1


def test_a_check_that_cannot_run_says_why():
    def broken() -> Line:
        raise RuntimeError("no kernel\nfor this card")

    assert guarded("kernels", broken, optional=True) == Line(
        "kernels", "not run", "RuntimeError: no kernel for this card"
    )
    assert guarded("masks", broken) == Line("masks", "failed", "RuntimeError: no kernel for this card")


def test_the_share_of_differing_bits():
    first = {"a": torch.tensor([True, False]), "b": torch.tensor([True, True])}
    second = {"a": torch.tensor([True, True]), "b": torch.tensor([True, True])}
    assert gpu_checks._share_differing(first, second) == pytest.approx(0.25)


@pytest.mark.parametrize(("there", "status"), [([True, False], "ok"), ([False, True], "differs")])
def test_masks_that_differ_from_the_cpus_are_said(there, status, monkeypatch):
    found = iter([[True, False], there])
    monkeypatch.setattr(
        gpu_checks, "prune", lambda *_, **__: SimpleNamespace(masks={"gate": torch.tensor(next(found))})
    )
    setup = gpu_checks.Setup("made", torch.nn.Identity(), None, torch.ones(1, 4), torch.device("cpu"), (4, 4))
    assert gpu_checks._masks(setup, "dass").status == status


@pytest.mark.thorough
def test_sparse_kernels_of_a_whole_model_are_compared_with_dense_ones(tmp_path, monkeypatch):
    converted = []
    monkeypatch.setattr(gpu_kernels, "_ROUNDS", 1)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: converted.append(weight) or weight)
    cpu = torch.device("cpu")
    setup = gpu_checks.Setup.load(str(save_tiny(tmp_path / "tiny")), cpu, 2, 8, (4, 4))
    setup.model.half()
    lines = [check() for name, check in gpu_kernels.kernel_lines(setup) if "whole model, decode" in name]
    linears = 3 * setup.model.config.num_hidden_layers
    assert [line.status for line in lines] == ["measured", "measured"]
    assert all(f"{linears} linears" in line.name and "differ by 0.0e+00" in line.detail for line in lines)
    groups = [weight.view(len(weight), -1, 4) for weight in converted]
    assert len(groups) == 2 * linears and all(bool(((group != 0).sum(-1) <= 2).all()) for group in groups)
