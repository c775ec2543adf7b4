"""What a run scores: texts of one's own."""

from __future__ import annotations

import pytest
from support import Phases, contains, run_with

from dass_exp.errors import UserError
from dass_exp.runs.context import RunContext

pytestmark = pytest.mark.usefixtures("short_texts")

TEXT = "One-shot pruning removes weights of a language model.\n\nThe cat sat on the mat, twice.\n\n"


@pytest.fixture
def own(cell, tmp_path):
    """A run that calibrates on a file and scores another one."""
    (tmp_path / "a.txt").write_text(TEXT * 20)
    (tmp_path / "b.txt").write_text(TEXT.upper() * 20)
    files = ["calibration=text_file", f"calibration.text.path={tmp_path}/a.txt", "eval=ppl_text_file"]
    return [*cell, *files, f"eval.perplexity.text.path={tmp_path}/b.txt", "eval.perplexity.name=mine"]


def test_a_run_calibrates_on_a_file_and_scores_another(own, tmp_path):
    record = run_with(*own).record
    assert list(record["metrics"]["perplexity"]) == ["mine"]
    assert record["calibration"]["name"] == "text_file"
    assert str(tmp_path) not in repr(record["identity"])
    (tmp_path / "c.txt").write_text(TEXT.upper() * 20)
    assert run_with(*own, f"eval.perplexity.text.path={tmp_path}/c.txt").found


@pytest.mark.parametrize("setting", ["calibration.text.path", "eval.perplexity.text.path"])
@pytest.mark.parametrize(("content", "words"), [(None, "no such file"), (b"", "no text"), (b"caf\xe9", "not UTF-8")])
def test_a_file_that_is_no_text_is_refused_before_the_model_is_loaded(own, tmp_path, setting, content, words):
    phases = Phases()
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        run_with(*own, f"{setting}={tmp_path}/bad.txt", context=RunContext(phases))
    assert contains(str(caught.value), ["text.path=", "bad.txt", words])
    assert phases.count("loading") == [0]
    assert not (tmp_path / "results" / "runs").exists()
