"""Scores of tasks: bits per byte and calibration error by hand, and what lm-eval itself gives, document by document."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from lm_eval_reference import stock

from dass_exp.errors import NumericalError
from dass_exp.evaluate.offline_tasks import GROUPS, NAMES
from dass_exp.evaluate.task_scores import _answers, calibration_error, calibration_gaps
from dass_exp.evaluate.zeroshot import ZeroShotOptions, zero_shot

GENERATED = ("triviaqa", "nq_open")
SUBJECTS = ("mmlu_anatomy", "mmlu_high_school_us_history")
CHOICES = tuple(name for name in NAMES if not name.startswith("mmlu") and name not in GENERATED)


def logs(*probabilities: float) -> list[float]:
    """Log-likelihoods, far below zero, whose softmax these are."""
    return [math.log(each) - 40 for each in probabilities]


def test_the_calibration_error_of_four_answers():
    # bins of 1/15: two answers of 0.9 (one right), one of 0.62 (right), one of 0.35 (wrong)
    answers = [logs(0.9, 0.1), logs(0.1, 0.9), logs(0.62, 0.38), logs(0.35, 0.33, 0.32)]
    error = calibration_error(answers, [0, 0, 0, 2])
    assert error == pytest.approx((2 * abs(0.5 - 0.9) + abs(1 - 0.62) + abs(0 - 0.35)) / 4)


def test_answers_of_one_bin_are_averaged_before_they_are_compared():
    answers = [logs(0.61, 0.39), logs(0.65, 0.35)]  # both in [9/15, 10/15)
    assert calibration_error(answers, [0, 1]) == pytest.approx(abs(0.5 - 0.63))
    apart = [logs(0.59, 0.41), logs(0.65, 0.35)]  # on either side of 9/15
    assert calibration_error(apart, [0, 1]) == pytest.approx((0.41 + 0.65) / 2)


def test_the_sum_of_the_mean_gaps_is_the_calibration_error():
    # two documents with confidence 0.7, one right; one with confidence 0.5, wrong
    choices = [[math.log(0.7), math.log(0.3)], [math.log(0.3), math.log(0.7)], [0.0, 0.0]]
    gaps = calibration_gaps(choices, [1.0, 0.0, 0.0])
    by_hand = 2 / 3 * abs(0.7 - 0.5) + 1 / 3 * abs(0.5 - 0.0)
    assert np.abs(gaps.mean(axis=0)).sum() == pytest.approx(by_hand)


def test_a_certain_and_right_model_has_no_calibration_error():
    assert calibration_error([[-1.0, -900.0]] * 3, [0, 0, 0]) == 0


class Made:
    """A task as lm-eval gives it to us: choices, and what names the right one."""

    OUTPUT_TYPE = "multiple_choice"

    def __init__(self, told: Any, multiple_input: int = 0) -> None:
        self.told, self.multiple_input = told, multiple_input

    def doc_to_choice(self, doc: Any) -> list[str]:
        return ["no", "yé", "maybe"]

    def doc_to_target(self, doc: Any) -> Any:
        return "the end of the sentence" if self.multiple_input else self.told

    def doc_to_text(self, doc: Any) -> Any:
        return self.told


SAMPLE = {
    "doc": {},
    "filtered_resps": [(-2.0, False), (-3.0, False), (-4.0, True)],
    "arguments": [("q", " no"), ("q", " yé"), ("q", " maybe")],
}


@pytest.mark.parametrize(
    ("told", "gold"), [(1, 1), ("yé", 1), ([1], 1), ([1, 2], 1), (["maybe", "yé"], 1), ([2, 0], 0)], ids=str
)
def test_the_right_answer_by_index_by_its_text_or_the_likeliest_of_several(told, gold):
    fields = _answers("made", Made(told), [SAMPLE])
    assert fields["gold"] == [gold]
    size = {0: 3, 1: 4}[gold]  # of " yé": é takes two bytes
    assert fields["bits_per_byte"] == [pytest.approx((gold + 2) / math.log(2) / size)]
    assert fields["loglikelihoods"] == [[-2, -3, -4]]


def test_where_the_choices_are_contexts_the_text_names_the_right_one():
    assert _answers("made", Made(2, multiple_input=1), [SAMPLE])["gold"] == [2]


@pytest.mark.parametrize("told", [3, -100, "perhaps", [], [0, 7]], ids=str)
def test_without_a_known_right_answer_only_the_likelihoods_are_kept(told):
    assert _answers("made", Made(told), [SAMPLE]) == {"loglikelihoods": [[-2, -3, -4]]}


def test_a_likelihood_that_is_no_number_stops_the_run():
    with pytest.raises(NumericalError, match=r"made: the log-likelihoods .*nan"):
        _answers("made", Made(0), [{**SAMPLE, "filtered_resps": [(float("nan"), False)] * 3}])


# --- against lm-eval


@pytest.fixture(scope="module")
def manager() -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    # the folders of these tasks: reading the files of all of them takes a quarter of a minute
    own = Path(lm_eval.__file__).parent / "tasks"
    folders = "hellaswag piqa winogrande arc super_glue openbookqa sciq siqa commonsense_qa glue triviaqa nq_open mmlu"
    return TaskManager(include_path=[own / name for name in folders.split()], include_defaults=False)


@pytest.fixture(scope="module")
def loaded(tiny) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    return model, transformers.AutoTokenizer.from_pretrained(tiny)


def assert_equal_to_lm_eval(loaded, tasks, manager, monkeypatch, limit, shots=0) -> Any:
    """Log-likelihoods, outcomes and means are those of lm-eval's own path; returns ours."""
    ours = zero_shot(*loaded, tasks, limit, "offline", ZeroShotOptions(batch_size=4, num_fewshot=shots))
    theirs = stock(*loaded, list(tasks), manager, monkeypatch, limit=limit, num_fewshot=shots)
    for task, samples in theirs["samples"].items():
        outcomes, scores = ours.documents[task], ours.tasks[task]
        samples.sort(key=lambda sample: sample["doc_id"])
        for metric in ("acc", "acc_norm", "exact_match"):
            assert (metric in outcomes) == (metric in samples[0])
            if metric in outcomes:
                assert outcomes[metric] == [sample[metric] for sample in samples]
                (value,) = [
                    theirs["results"][task][key] for key in theirs["results"][task] if key.startswith(f"{metric},")
                ]
                assert scores[metric] == pytest.approx(value)
        if "loglikelihoods" in outcomes:
            for mine, sample in zip(outcomes["loglikelihoods"], samples, strict=True):
                assert mine == pytest.approx([answer[0] for answer in sample["filtered_resps"]], rel=1e-5, abs=1e-3)
        assert scores["version"] == theirs["versions"][task]
        assert scores["num_fewshot"] == theirs["n-shot"][task] == shots
    return ours


@pytest.mark.thorough
def test_a_task_of_each_kind_is_scored_as_by_lm_eval(loaded, manager, monkeypatch):
    kinds = ("winogrande", "copa", "social_iqa")  # contexts, an answer's text, a number
    assert_equal_to_lm_eval(loaded, kinds, manager, monkeypatch, limit=4)


@pytest.mark.slow
def test_every_task_of_choices_is_scored_as_by_lm_eval(loaded, manager, monkeypatch):
    ours = assert_equal_to_lm_eval(loaded, CHOICES, manager, monkeypatch, limit=6)
    for task in CHOICES:
        outcomes = ours.documents[task]
        right = [
            max(range(len(each)), key=each.__getitem__) == gold
            for each, gold in zip(outcomes["loglikelihoods"], outcomes["gold"], strict=True)
        ]
        assert right == [bool(each) for each in outcomes["acc"]], task
        assert 0 <= ours.tasks[task]["ece"] <= 1
        assert ours.tasks[task]["bits_per_byte"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 2, 5])
def test_subjects_of_mmlu_are_scored_as_by_lm_eval_with_and_without_examples(loaded, manager, monkeypatch, shots):
    assert_equal_to_lm_eval(loaded, SUBJECTS, manager, monkeypatch, limit=3, shots=shots)


@pytest.mark.slow
def test_the_mean_of_mmlu_is_that_of_lm_eval(loaded, manager, monkeypatch):
    ours = assert_equal_to_lm_eval(loaded, ["mmlu"], manager, monkeypatch, limit=2)
    theirs = stock(*loaded, ["mmlu"], manager, monkeypatch, limit=2)["results"]["mmlu"]
    assert tuple(ours.tasks) == ("mmlu", *(name for name in ours.tasks if name != "mmlu"))
    assert set(ours.tasks) == {"mmlu", *GROUPS["mmlu"]}
    assert ours.tasks["mmlu"]["acc"] == ours.mean_acc == pytest.approx(theirs["acc,none"])
    assert ours.tasks["mmlu"]["acc_stderr"] == pytest.approx(theirs["acc_stderr,none"])
    assert len(ours.documents["mmlu"]["acc"]) == ours.tasks["mmlu"]["documents"] == 2 * 57
    assert sum(ours.documents["mmlu"]["acc"]) / 114 == pytest.approx(ours.tasks["mmlu"]["acc"])


@pytest.mark.slow
def test_what_is_generated_is_scored_as_by_lm_eval(loaded, manager, monkeypatch):
    ours = assert_equal_to_lm_eval(loaded, GENERATED, manager, monkeypatch, limit=3)
    assert set(ours.documents["triviaqa"]) == {"exact_match"}
    assert "ece" not in ours.tasks["triviaqa"]
