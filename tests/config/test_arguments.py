"""What a command line becomes before Hydra reads it."""

from __future__ import annotations

import pytest

from dass_exp.config.arguments import prepare


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
        (["plan=true", "hydra/launcher=joblib"], ["plan=true"]),
    ],
    ids=lambda texts: "as typed" if texts is None else " ".join(texts),
)
def test_a_command_line_as_hydra_reads_it(typed, read):
    assert prepare(typed) == (typed if read is None else read)
