"""Fixtures of all tests, which run offline, on one thread, on random two-layer models of every family."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_configs import OWN, SHAPE
from hypothesis import settings
from pretend_accelerator import PretendAccelerator, pretend
from support import IN, OUT, save_tiny, tiny_overrides  # first: it sets the environment that libraries read on import
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dass_exp.data.texts import OfflineText

settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """One thread: several that wait for each other over tiny matrices take ten times as long on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_model() -> Callable[..., nn.Module]:
    """A factory: ``tiny_model(family, **settings)`` is a random model of the family, the same at each call.

    A family that is missing in ``OWN`` raises, so a test that runs over ``FAMILIES`` fails until it has a tiny model.
    """

    def make(family: str, **changes: Any) -> nn.Module:
        config = AutoConfig.for_model(family, **{**SHAPE, **OWN[family], **changes})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms start as ones and biases as zeros, which would hide that one is skipped
                    nn.init.normal_(parameter, mean=0.5, std=0.2)
        return model.eval()

    return make


@pytest.fixture
def tokens() -> Tensor:
    """int64 [5, 12]: five sequences, so that batches of 2 and 3 leave a smaller one at the end."""
    return torch.randint(SHAPE["vocab_size"], (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weight() -> Tensor:
    """Of one layer, [OUT, IN], for stages that work on its output error."""
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> Tensor:
    """Of that layer: five sequences of 32 tokens with correlated features, so that errors move between columns."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(5, 32, IN, generator=generator)
    return tokens @ (torch.eye(IN) + 0.3 * torch.randn(IN, IN, generator=generator))


@pytest.fixture
def attached() -> Callable[[nn.Module], Counter[str]]:
    """A function that counts forward hooks of a model, and forwards that are set on an instance."""

    def count(model: nn.Module) -> Counter[str]:
        counts: Counter[str] = Counter()
        for module in model.modules():
            counts["hooks"] += len(module._forward_pre_hooks) + len(module._forward_hooks)
            counts["forwards"] += "forward" in vars(module)
        return counts

    return count


@pytest.fixture(scope="session", name="tiny")
def tiny_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder, shared by all files; not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(name="results")
def results_fixture(tmp_path: Path) -> Path:
    """A results folder of the test's own."""
    return tmp_path / "results"


@pytest.fixture(name="cell")
def cell_fixture(tiny: Path, results: Path) -> list[str]:
    """The overrides of a quick run of the tiny model into a folder of the test's own."""
    return tiny_overrides(tiny, results)


@pytest.fixture(name="short_texts")
def short_texts_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first documents of the real texts: the tiny tokenizer is slow on megabytes."""
    documents = functools.cache(OfflineText.documents)
    monkeypatch.setattr(OfflineText, "documents", lambda text: documents(text)[:20])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many cases of the campaign (tests/campaign) there are, how many were tried, and how many held."""
    counts: dict[str, list[int]] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, value in getattr(report, "user_properties", ()):
            if name == "campaign" and report.when == "call":
                kind, *numbers = value
                counts[kind] = [sum(pair) for pair in zip(counts.get(kind, [0, 0, 0]), numbers, strict=True)]
    if counts:
        counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
        terminalreporter.section("campaign")
        terminalreporter.write_line(f"{'class':24}{'cases':>8}{'tried':>8}{'held':>8}")
        for kind, numbers in counts.items():
            terminalreporter.write_line(f"{kind:24}" + "".join(f"{number:8}" for number in numbers))
        if os.environ.get("DASS_EXP_CAMPAIGN") != "all":
            terminalreporter.write_line("a sample: make campaign tries all cases, of more tests than these")


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendAccelerator]:
    """Two CUDA devices that are not there (tests/pretend_accelerator.py)."""
    pretend(monkeypatch)
    with PretendAccelerator() as entered:
        yield entered
