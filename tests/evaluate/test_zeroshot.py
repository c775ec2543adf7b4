"""Zero-shot tasks through lm-eval, on the tiny model: all seven offline tasks, their labels, and what is refused."""

from __future__ import annotations

from typing import Any

import pyarrow
import pytest
import transformers

from dass_exp.data import assets
from dass_exp.errors import UserError
from dass_exp.evaluate.zeroshot import ZeroShotOptions, ZeroShotResult, _write_task, check_tasks, zero_shot

SIZES = {
    "hellaswag": 10042,
    "piqa": 1838,
    "winogrande": 1267,
    "arc_easy": 570,
    "arc_challenge": 299,
    "boolq": 3270,
    "openbookqa": 500,
}
TASKS = tuple(SIZES)
NORMED = {"hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa"}  # where lm-eval has acc_norm
LIMIT = 2


@pytest.fixture(scope="module")
def loaded(tiny) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    return model, transformers.AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def scored(loaded) -> ZeroShotResult:
    return zero_shot(*loaded, TASKS, LIMIT, "offline", ZeroShotOptions(batch_size=8))


@pytest.fixture(scope="module")
def lm_eval_tasks(tmp_path_factory) -> dict[str, Any]:
    """The tasks as lm-eval loads them from our files."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    for task in TASKS:
        _write_task(task, folder)
    return TaskManager(include_path=str(folder), include_defaults=False).load(list(TASKS))["tasks"]


def rows_of(task: str, count: int) -> list[dict[str, Any]]:
    """The first rows of the file itself."""
    with pyarrow.memory_map(str(assets.fetch(assets.TASKS[task]))) as source:
        return pyarrow.ipc.open_stream(source).read_all().slice(0, count).to_pylist()


def test_every_offline_task_is_tested_here():
    assert set(TASKS) == set(assets.TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_scores_and_the_outcomes_that_average_to_them(scored, task):
    scores, outcomes = scored.tasks[task], scored.documents[task]
    assert scores["acc_stderr"] >= 0
    assert ("acc_norm" in scores) == ("acc_norm_stderr" in scores) == (task in NORMED)
    assert isinstance(scores["version"], float)
    assert scores["version"] >= 1
    assert (scores["split"], scores["limit"], scores["documents"]) == ("validation", LIMIT, LIMIT)
    assert set(outcomes) == ({"acc", "acc_norm"} if task in NORMED else {"acc"})
    for metric, values in outcomes.items():
        assert len(values) == LIMIT
        assert set(values) <= {0.0, 1.0}
        assert sum(values) / LIMIT == pytest.approx(scores[metric])


def test_acc_stands_in_where_a_task_has_no_acc_norm():
    scores = ZeroShotResult({"piqa": {"acc": 0.6, "acc_norm": 0.8}, "winogrande": {"acc": 0.5}}, {})
    assert scores.mean_acc == pytest.approx(0.55)
    assert scores.mean_acc_norm == pytest.approx(0.65)


def test_scores_are_in_the_order_that_was_asked(scored):
    assert tuple(scored.tasks) == tuple(scored.documents) == TASKS


def test_scoring_again_gives_the_same_outcomes(loaded, scored):
    again = zero_shot(*loaded, ["piqa", "boolq"], LIMIT, "offline", ZeroShotOptions(batch_size=3))
    assert again.documents == {task: scored.documents[task] for task in ("piqa", "boolq")}


def test_a_task_has_all_its_documents(lm_eval_tasks):
    assert {name: len(list(task.validation_docs())) for name, task in lm_eval_tasks.items()} == SIZES


def lettered(row: dict[str, Any]) -> str:
    """The choice that the row's answer key names."""
    return row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("piqa", lambda row: [row["sol1"], row["sol2"]][row["label"]]),
        ("boolq", lambda row: "yes" if row["answer"] else "no"),
        *((name, lettered) for name in ("openbookqa", "arc_easy", "arc_challenge")),
    ],
)
def test_the_right_answers_are_those_of_the_data(lm_eval_tasks, name, answer):
    task, rows = lm_eval_tasks[name], rows_of(name, 40)
    documents = list(task.validation_docs())[:40]
    answers = [task.doc_to_choice(document)[int(task.doc_to_target(document))] for document in documents]
    assert answers == [answer(row) for row in rows]
    assert len(set(answers)) > 1


@pytest.mark.parametrize(("name", "choices"), [("hellaswag", 4), ("winogrande", 2)])
def test_a_task_with_a_prompt_of_its_own_keeps_it(lm_eval_tasks, name, choices):
    task = lm_eval_tasks[name]
    document = next(iter(task.validation_docs()))
    assert len(task.doc_to_choice(document)) == choices
    if name == "hellaswag":
        assert int(task.doc_to_target(document)) == int(rows_of(name, 1)[0]["label"])
    assert "[header]" not in str(task.doc_to_choice(document))  # lm-eval's own clean-up of the text still runs


def test_no_examples_are_shown(loaded, monkeypatch):
    from lm_eval import evaluator

    fewshot, evaluate = {}, evaluator.evaluate

    def watching(model, tasks, **settings):
        fewshot.update({name: task.config.num_fewshot for name, task in tasks["tasks"].items()})
        return evaluate(model, tasks, **settings)

    monkeypatch.setattr(evaluator, "evaluate", watching)
    zero_shot(*loaded, ["piqa"], 1, "offline", ZeroShotOptions())
    assert fewshot == {"piqa": 0}


@pytest.mark.parametrize("bos", [True, False])
def test_the_token_at_the_head_of_a_request_follows_the_policy(loaded, bos):
    first: set[int] = set()
    model, tokenizer = loaded
    with model.model.register_forward_pre_hook(
        lambda module, args, kwargs: first.update(kwargs["input_ids"][:, 0].tolist()), with_kwargs=True
    ):
        zero_shot(model, tokenizer, ["piqa"], 2, "offline", ZeroShotOptions(bos=bos))
    assert {token == tokenizer.bos_token_id for token in first} == {bos}


@pytest.mark.parametrize("data", ["offline", "hub"])
def test_an_unknown_task_is_named(data):
    choice = "hellaswag" if data == "offline" else "lm-eval"
    with pytest.raises(UserError, match=rf"^eval\.zeroshot\.tasks: .*'no_such_task'.*{choice}"):
        check_tasks(["piqa", "no_such_task"], data)


@pytest.mark.parametrize("tasks", [[], ["piqa", "piqa"]])
def test_a_list_of_tasks_that_cannot_be(tasks):
    with pytest.raises(UserError, match=r"^eval\.zeroshot\.tasks="):
        check_tasks(tasks, "offline")


def test_a_task_that_is_only_on_the_hub_needs_it():
    check_tasks(["piqa", "lambada_openai"], "hub")
    with pytest.raises(UserError, match="lambada_openai"):
        check_tasks(["lambada_openai"], "offline")


def test_nothing_is_left_in_the_working_folder(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zero_shot(*loaded, ["winogrande"], 1, "offline", ZeroShotOptions())
    assert list(tmp_path.iterdir()) == []
