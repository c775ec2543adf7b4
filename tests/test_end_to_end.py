"""The real SmolLM2 through the code of the command, with few tokens: only the order of the methods is certain."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from support import run_with

from dass_exp.runs.context import ModelCache, RunContext

SHORT = [
    "model=smollm2_135m",
    "pattern=2of4",
    "tracker=none",
    "calibration.num_samples=2",
    "calibration.seq_len=64",
    "eval=ppl_mini",
    "eval.perplexity.context=128",
    "eval.perplexity.max_windows=2",
]
CALIBRATED = ["dass", *(pytest.param(method, marks=pytest.mark.thorough) for method in ("wanda", "sparsegpt"))]


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """The record of a method, which is run once."""
    results, shared = tmp_path_factory.mktemp("results"), ModelCache()  # as the cells of a sweep share it

    @functools.cache
    def of(method: str) -> dict[str, Any]:
        overrides = [*SHORT, f"method={method}", f"results_dir={results}"]
        return run_with(*overrides, context=RunContext(shared=shared)).record

    return of


@pytest.mark.parametrize("method", CALIBRATED)
def test_a_calibrated_method_lies_between_dense_and_magnitude(record, method):
    dense, calibrated, magnitude = (
        record(name)["metrics"]["perplexity"]["wikipedia_mini"] for name in ("dense", method, "magnitude")
    )
    assert 1 < dense < 60  # it is a language model
    assert dense < calibrated < magnitude


@pytest.mark.parametrize("method", ["magnitude", *CALIBRATED])
def test_the_sparsity_is_exact(record, method):
    sparsity = record(method)["sparsity"]
    assert sparsity["scope"] == 0.5
    assert len(sparsity["layers"]) == 90
    assert all(layer["zeros"] * 2 == layer["size"] for layer in sparsity["layers"])
    assert sum(layer["size"] for layer in sparsity["layers"]) == 30 * 3 * 576 * 1536  # the MLPs of SmolLM2


def test_the_records_tell_the_protocol(record):
    records = [record(method) for method in ("dense", "magnitude", "dass")]
    for each in records:
        assert "4-bit" in each["protocol"]["model_note"] and each["protocol"]["bos"] == "never"
        assert each["identity"]["model"].startswith("offline:smollm2_135m@")
    assert len({each["protocol"]["windows_sha256"] for each in records}) == 1
    assert [each["calibration"] is None for each in records] == [True, True, False]


@pytest.mark.thorough
def test_methods_are_calibrated_on_the_same_tokens(record):
    assert len({record(method)["calibration"]["tokens_sha256"] for method in ("dass", "wanda", "sparsegpt")}) == 1
