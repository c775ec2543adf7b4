"""Zero-shot tasks through lm-eval, on the tiny model: all offline tasks, their labels, and what is refused."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import transformers
from support import contains

from dass_exp.data import assets
from dass_exp.errors import UserError
from dass_exp.evaluate.offline_tasks import GROUPS, NAMES, write_tasks
from dass_exp.evaluate.zeroshot import ZeroShotOptions, ZeroShotResult, check_tasks, zero_shot

SIZES = {
    "hellaswag": 10042,
    "piqa": 1838,
    "winogrande": 1267,
    "arc_easy": 570,
    "arc_challenge": 299,
    "boolq": 3270,
    "openbookqa": 500,
    "sciq": 1000,
    "social_iqa": 1954,
    "commonsense_qa": 1221,
    "copa": 100,
    "rte": 277,
    "triviaqa": 7993,
    "nq_open": 3610,
}
TASKS = tuple(SIZES)
GENERATED = {"triviaqa", "nq_open"}
NORMED = {"hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "sciq"}  # where lm-eval has acc_norm
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
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(TASKS, folder, Path(lm_eval.__file__).parent / "tasks")
    return TaskManager(include_path=str(folder), include_defaults=False).load(list(TASKS))["tasks"]


def rows_of(task: str, count: int) -> list[dict[str, Any]]:
    """The first rows of the file itself."""
    with pyarrow.memory_map(str(assets.fetch(assets.TASKS[task]))) as source:
        return pyarrow.ipc.open_stream(source).read_all().slice(0, count).to_pylist()


def test_every_offline_task_is_tested_here():
    assert {*TASKS, *GROUPS["mmlu"]} == set(assets.TASKS)
    assert {*TASKS, *GROUPS["mmlu"], "mmlu"} == set(NAMES)
    assert set(assets.EXAMPLES) == set(GROUPS["mmlu"])


@pytest.mark.thorough
@pytest.mark.parametrize("task", TASKS)
def test_scores_and_the_outcomes_that_average_to_them(scored, task):
    scores, outcomes = scored.tasks[task], scored.documents[task]
    main = "exact_match" if task in GENERATED else "acc"
    assert scores[f"{main}_stderr"] >= 0
    assert ("acc_norm" in scores) == ("acc_norm_stderr" in scores) == (task in NORMED)
    assert scores["version"] is not None
    assert (scores["split"], scores["limit"], scores["documents"]) == ("validation", LIMIT, LIMIT)
    answers = set() if task in GENERATED else {"loglikelihoods", "gold", "bits_per_byte"}
    assert set(outcomes) == {main, *(["acc_norm"] if task in NORMED else []), *answers}
    for metric, values in outcomes.items():
        if metric in answers:
            continue
        assert len(values) == LIMIT
        assert set(values) <= {0.0, 1.0}
        assert sum(values) / LIMIT == pytest.approx(scores[metric])


def test_acc_stands_in_where_a_task_has_no_acc_norm():
    scores = ZeroShotResult({"piqa": {"acc": 0.6, "acc_norm": 0.8}, "winogrande": {"acc": 0.5}}, {})
    assert scores.mean_acc == pytest.approx(0.55)
    assert scores.mean_acc_norm == pytest.approx(0.65)


def test_a_mean_takes_a_group_for_its_tasks_and_an_exact_match_for_an_acc():
    tasks = {"mmlu": {"acc": 0.4}, "mmlu_a": {"acc": 0.1, "group": "mmlu"}, "triviaqa": {"exact_match": 0.2}}
    assert ZeroShotResult(tasks, {}).mean_acc == ZeroShotResult(tasks, {}).mean_acc_norm == pytest.approx(0.3)


def test_one_document_has_no_standard_error(loaded):
    scores = zero_shot(*loaded, ["piqa"], 1, "offline", ZeroShotOptions()).tasks["piqa"]
    assert set(scores) >= {"acc", "acc_norm", "bits_per_byte", "ece"}
    assert not {"acc_stderr", "acc_norm_stderr"} & set(scores)


def test_the_model_is_not_held_once_it_is_scored(tiny):
    """A shared machine has room for one model: a cycle of references would keep this one until the next collection."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    zero_shot(model, tokenizer, ["piqa"], LIMIT, "offline", ZeroShotOptions())
    kept = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        zero_shot(model, tokenizer, ["piqa"], LIMIT, "offline", ZeroShotOptions())
        del model
        assert kept() is None
    finally:
        gc.enable()


def test_scores_are_in_the_order_that_was_asked(scored):
    assert tuple(scored.tasks) == tuple(scored.documents) == TASKS


def test_scoring_again_gives_the_same_outcomes(loaded, scored):
    again = zero_shot(*loaded, ["piqa", "boolq"], LIMIT, "offline", ZeroShotOptions(batch_size=3))
    assert list(again.documents) == ["piqa", "boolq"]
    for task, outcomes in again.documents.items():
        before = scored.documents[task]
        assert {name: outcomes[name] for name in ("acc", "gold")} == {name: before[name] for name in ("acc", "gold")}
        # some processors round products of another batch in another way
        for one, other in zip(outcomes["loglikelihoods"], before["loglikelihoods"], strict=True):
            assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.thorough
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


@pytest.mark.parametrize("shots", [0, 3])
def test_as_many_examples_are_shown_as_asked(loaded, monkeypatch, shots):
    from lm_eval import evaluator

    fewshot, evaluate = set(), evaluator.evaluate

    def watching(model, tasks, **settings):
        output = evaluate(model, tasks, **settings)
        prompts = [sample["arguments"][0][0] for sample in output["samples"]["piqa"]]
        fewshot.update({prompt.count("Answer:") - 1 for prompt in prompts})
        assert len({prompt.rpartition("Question:")[2] for prompt in prompts}) == len(prompts)
        assert not any(prompt.count(prompt.rpartition("Question:")[2]) > 1 for prompt in prompts)
        return output

    monkeypatch.setattr(evaluator, "evaluate", watching)
    scores = zero_shot(*loaded, ["piqa"], 4, "offline", ZeroShotOptions(num_fewshot=shots)).tasks["piqa"]
    assert fewshot == {shots} == {scores["num_fewshot"]}


def first_tokens(ids: Any) -> list[int]:
    """The first token of each row behind its padding; none where a cache holds what came before (one column)."""
    return [next(token for token in row if token != 2) for row in ids.tolist()] if ids.shape[1] > 1 else []


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["piqa", "triviaqa"])
@pytest.mark.parametrize("bos", [True, False])
def test_the_token_at_the_head_of_a_request_follows_the_policy(loaded, bos, task):
    first: set[int] = set()
    model, tokenizer = loaded
    with model.model.register_forward_pre_hook(
        lambda module, args, kwargs: first.update(first_tokens(kwargs["input_ids"])), with_kwargs=True
    ):
        zero_shot(model, tokenizer, [task], 2, "offline", ZeroShotOptions(bos=bos))
    assert {token == tokenizer.bos_token_id for token in first} == {bos}


@pytest.mark.thorough
@pytest.mark.parametrize("data", ["offline", "hub"])
def test_an_unknown_task_is_named(data):
    choice = "hellaswag" if data == "offline" else "lm-eval"
    with pytest.raises(UserError, match=rf"^eval\.zeroshot\.tasks: .*'no_such_task'.*{choice}"):
        check_tasks(["piqa", "no_such_task"], data)


@pytest.mark.parametrize("tasks", [[], ["piqa", "piqa"]])
def test_a_list_of_tasks_that_cannot_be(tasks):
    with pytest.raises(UserError, match=r"^eval\.zeroshot\.tasks="):
        check_tasks(tasks, "offline")


@pytest.mark.thorough
def test_a_task_that_is_only_on_the_hub_needs_it():
    check_tasks(["piqa", "lambada_openai"], "hub")
    with pytest.raises(UserError, match="lambada_openai"):
        check_tasks(["lambada_openai"], "offline")


def test_nothing_is_left_in_the_working_folder(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zero_shot(*loaded, ["winogrande"], 1, "offline", ZeroShotOptions())
    assert list(tmp_path.iterdir()) == []


# --- what cannot be scored, and own tasks

OWN = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {validation: "%s"}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: ["Paris", "Rome", "Bern"]
doc_to_target: "{{capital}}"
metric_list: [{metric: %s}]
"""


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder with a task and its documents."""
    folder = tmp_path / "own"
    folder.mkdir()
    rows = [("Italy", "Rome"), ("France", "Paris"), ("Switzerland", "Bern")]
    lines = [json.dumps({"country": country, "capital": capital}) for country, capital in rows]
    (folder / "capitals.jsonl").write_text("\n".join(lines))
    (folder / "capitals.yaml").write_text(OWN % (folder / "capitals.jsonl", "acc"))
    return folder


def test_a_task_of_ones_own_is_scored_beside_offline_ones(loaded, own):
    check_tasks(["capitals", "piqa"], "offline", 0, str(own))
    result = zero_shot(*loaded, ["capitals", "piqa"], 3, "offline", ZeroShotOptions(include_path=str(own)))
    assert result.documents["capitals"]["gold"] == [1, 0, 2]
    assert tuple(result.tasks) == ("capitals", "piqa")


def test_a_task_that_is_scored_by_something_else_is_refused_in_one_line(own):
    (own / "capitals.yaml").write_text(OWN % (own / "capitals.jsonl", "f1"))
    with pytest.raises(
        UserError, match=r"^eval\.zeroshot\.tasks: capitals is scored by f1; expected .* acc, exact_match"
    ):
        check_tasks(["capitals"], "offline", 0, str(own))
    (own / "capitals.yaml").write_text("task: capitals\nclass: !function none.Made\n")
    with pytest.raises(UserError, match="capitals is scored by code of its own"):
        check_tasks(["capitals"], "offline", 0, str(own))


def test_a_folder_of_own_tasks_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"^eval\.zeroshot\.include_path=.*nowhere.*: expected a folder"):
        check_tasks(["piqa"], "offline", 0, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("tasks", "data", "words"),
    [
        (["wikitext"], "hub", ["wikitext is scored by word_perplexity"]),
        (["piqa", "squadv2"], "hub", ["squadv2 is scored by code of its own"]),
        (["ai2_arc"], "hub", ["ai2_arc is a label", "arc_challenge, arc_easy"]),
        (["mmlu", "mmlu_anatomy"], "hub", ["mmlu_anatomy is in two of them"]),
        (["mmlu", "mmlu_anatomy"], "offline", ["mmlu_anatomy is in two of them"]),
    ],
)
def test_what_cannot_be_scored_is_refused_before_a_model_is_loaded(tasks, data, words):
    with pytest.raises(UserError) as caught:
        check_tasks(tasks, data)
    assert contains(str(caught.value), words), caught.value


def test_tasks_of_the_hub_that_generate_are_accepted():
    check_tasks(["gsm8k", "drop", "mmlu", "lambada_openai"], "hub")


@pytest.mark.parametrize("task", ["mmlu", "mmlu_virology"])
def test_mmlu_has_five_examples(task):
    check_tasks([task], "offline", 5)
    with pytest.raises(UserError, match=r"^eval\.zeroshot\.num_fewshot=6: mmlu.* has 5 examples"):
        check_tasks([task], "offline", 6)
