"""What a command line becomes before Hydra reads it."""

from __future__ import annotations

import pytest

from dass_exp.config.arguments import prepare
from dass_exp.errors import UserError


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["sweeps/cells=dass"], ["variant=dass"]),
        (["eval.tasks.num_fewshot=5"], ["eval.zeroshot.num_fewshot=5"]),
        (["eval.perplexity.text.path=my.txt"], ["eval=ppl_text_file", "eval.perplexity.text.path=my.txt"]),
        (["seed=1", "calibration.text.path=a.txt"], ["seed=1", "calibration=text_file", "calibration.text.path=a.txt"]),
        (
            ["--cfg", "job", "calibration.text.path=a.txt"],
            ["--cfg", "job", "calibration=text_file", "calibration.text.path=a.txt"],
        ),
        (["protocol=paper", "calibration.text.path=/data/c4"], None),
        (["calibration.text.path=b.txt", "--config-path", "run/.hydra"], None),
        (["eval=own", "eval.perplexity.text.path=my.txt"], ["eval=own", "eval.perplexity.text.path=my.txt"]),
        (["seed=1", "-m"], ["-m", "seed=1"]),
        (["pattern=2:4"], ["pattern=2of4"]),
        (["-m", "pattern=2:4,4of8,8:16"], ["-m", "pattern=2of4,4of8,8of16"]),
        (["pattern=1:8", "seed=1"], ["pattern=nm", "pattern.n=1", "pattern.m=8", "seed=1"]),
        (["pattern=0.5"], ["pattern=unstructured", "pattern.sparsity=0.5"]),
        (["-m", "pattern=0.5,.6"], ["-m", "pattern=unstructured", "pattern.sparsity=0.5,.6"]),
        (["pattern='2:4'", "+pattern=0.25"], ["pattern=2of4", "pattern=unstructured", "pattern.sparsity=0.25"]),
        (["pattern=wrong,2of4"], None),
        (["pattern=50"], None),
        (["plan=true", "hydra/launcher=joblib"], ["plan=true"]),
    ],
    ids=lambda texts: "as typed" if texts is None else " ".join(texts),
)
def test_a_command_line_as_hydra_reads_it(typed, read):
    assert prepare(typed) == (typed if read is None else read)


@pytest.mark.parametrize("patterns", ["2:4,0.5", "2:4,1:8", "0.5,2of4"])
def test_patterns_of_two_kinds_are_refused(patterns):
    with pytest.raises(UserError, match="one command takes shares, or patterns of conf/pattern"):
        prepare(["-m", f"pattern={patterns}"])
