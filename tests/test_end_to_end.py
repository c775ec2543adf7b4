"""The real SmolLM2 through the code of the command, with few tokens: only the order of the methods is certain."""

from __future__ import annotations

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
CALIBRATED = ("wanda", "dass", "sparsegpt")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """One record per method."""
    results = tmp_path_factory.mktemp("results")
    methods = ("dense", "magnitude", *CALIBRATED)
    shared = ModelCache()  # as the cells of a sweep share it
    return {
        method: run_with(*SHORT, f"method={method}", f"results_dir={results}", context=RunContext(shared=shared)).record
        for method in methods
    }


def test_a_calibrated_method_lies_between_dense_and_magnitude(records):
    scores = {method: record["metrics"]["perplexity"]["wikipedia_mini"] for method, record in records.items()}
    assert 1 < scores["dense"] < 40  # it is a language model
    assert all(scores["dense"] < scores[method] < scores["magnitude"] for method in CALIBRATED), scores


@pytest.mark.parametrize("method", ["magnitude", *CALIBRATED])
def test_the_sparsity_is_exact(records, method):
    sparsity = records[method]["sparsity"]
    assert sparsity["scope"] == 0.5
    assert len(sparsity["layers"]) == 90
    assert all(layer["zeros"] * 2 == layer["size"] for layer in sparsity["layers"])
    assert sum(layer["size"] for layer in sparsity["layers"]) == 30 * 3 * 576 * 1536  # the MLPs of SmolLM2


def test_the_records_tell_the_protocol(records):
    assert all("4-bit" in record["protocol"]["model_note"] for record in records.values())
    assert all(record["identity"]["model"].startswith("offline:smollm2_135m@") for record in records.values())
    assert {record["protocol"]["bos"] for record in records.values()} == {"never"}
    assert len({record["protocol"]["windows_sha256"] for record in records.values()}) == 1
    assert len({records[method]["calibration"]["tokens_sha256"] for method in CALIBRATED}) == 1
    assert records["magnitude"]["calibration"] is None
