"""``dass-report`` on records of no sweep in particular: lists, filters, and tables of any rows and columns."""

from __future__ import annotations

import pytest
from factory import record_of, write_record

from dass_exp.report import cli
from dass_exp.report.frame import records_frame


@pytest.fixture(name="results")
def results_fixture(tmp_path):
    """Five records, of two patterns and two seeds."""
    records = [
        record_of("dense", [20.0], key="d" * 16),
        record_of("wanda", [110.0], key="a1" * 8, seed=0),
        record_of("wanda", [114.0], key="a2" * 8, seed=1),
        record_of("dass", [94.0], key="b1" * 8, alpha=0.5),
        record_of("dass", [43.0], key="b2" * 8, alpha=1.0, pattern="50%"),
    ]
    records[3] |= {"tags": ["mine"], "name": "first try", "created": "2026-02-03T00:00:00Z", "notes": "The second one"}
    records[4]["identity"]["code"] = {"method": "abc"}
    for record in records:
        write_record(record, tmp_path)
    return tmp_path


def report(capsys, *arguments):
    try:
        cli.main(list(arguments))
        code = 0
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr()


def listed(capsys, results, *filters):
    """The sorted beginnings of the keys in a list."""
    wheres = [part for text in filters for part in ("--where", text)]
    code, shown = report(capsys, "list", "--results", str(results), *wheres)
    assert code == 0, shown
    cells = [line.split("│")[1].strip() for line in shown.out.splitlines() if line.startswith("│")]
    return sorted(cell for cell in cells if len(cell) == 8)


@pytest.mark.parametrize(
    ("filters", "keys"),
    [
        ([], ["a1a1a1a1", "a2a2a2a2", "b1b1b1b1", "b2b2b2b2", "dddddddd"]),
        (["method=wanda"], ["a1a1a1a1", "a2a2a2a2"]),
        (["method=wanda,dass", "pattern=2:4", "seed=0"], ["a1a1a1a1", "b1b1b1b1"]),
        (["method.alpha=1"], ["b2b2b2b2"]),
        (["calibration.num_samples=16", "method=DASS"], ["b1b1b1b1", "b2b2b2b2"]),
        (["tag=mine"], ["b1b1b1b1"]),
        (["name=first try"], ["b1b1b1b1"]),
        (["key=b,d"], ["b1b1b1b1", "b2b2b2b2", "dddddddd"]),
        (["repair=none", "method=dense"], ["dddddddd"]),
        (["date=2026-02"], ["b1b1b1b1"]),
        (["created=2026-02-03"], ["b1b1b1b1"]),
        (["pattern=2of4", "method=dass"], ["b1b1b1b1"]),
        (["calibration=c4_mini", "method=dass"], ["b1b1b1b1", "b2b2b2b2"]),
        (["notes=second"], ["b1b1b1b1"]),
        (["code.method=abc"], ["b2b2b2b2"]),
    ],
    ids=str,
)
def test_a_list_holds_what_its_filters_admit(results, capsys, filters, keys):
    assert listed(capsys, results, *filters) == keys


def test_the_newest_record_is_last_and_settings_keep_their_types(results):
    frame = records_frame(results)
    assert frame.iloc[-1].tags == "mine"
    dass = frame[frame.method == "dass"].set_index("pattern")
    assert dass.loc["50%", "method.alpha"] == 1.0 and dass.loc["2:4", "perplexity"] == 94.0
    assert set(frame["calibration.num_samples"].dropna()) == {16}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "--where", "method"], "--where method: expected FIELD=VALUE"),
        (["list", "--where", "nothing=1"], "--where nothing=1: no record has nothing; expected key, date, name"),
        (["list", "--where", "method=ria"], "matches method=ria"),
        (["list", "method=ria"], "filters are given with --where"),
        (["--rows", "method", "--where", "method=ria"], "matches method=ria"),
        (["--rows", "methd"], "--rows methd: no record has such a setting; expected allocation, method, model"),
        (["--rows", "pattern", "--columns", "pattern"], "it can be one of them only"),
    ],
    ids=str,
)
def test_a_filter_that_admits_nothing_is_said_in_one_line(results, capsys, caplog, arguments, words):
    code, _ = report(capsys, *arguments, "--results", str(results))
    assert code == 2 and words in caplog.messages[-1]


@pytest.mark.thorough
def test_any_records_make_a_table(results, capsys):
    options = ["--rows", "method", "--columns", "seed", "--where", "method=wanda", "--title", "Two seeds"]
    code, _ = report(capsys, *options, "--results", str(results), "--output", str(results / "out"))
    table = (results / "out" / "tables" / "grid.md").read_text()
    assert code == 0
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert rows == [
        "| | seed=0 | seed=1 |",
        "|---|---|---|",
        "| dense | 20.00 | 20.00 |",
        "| Wanda | 110.00 | 114.00 |",
    ]
    assert table.startswith("# Two seeds\n")
    assert "Made by `dass-report --rows method --columns seed --metric perplexity --where method=wanda`." in table


def test_a_method_names_its_stages_once(tmp_path, capsys):
    repaired = record_of("wanda", [50.0], key="b1" * 8)
    repaired["config"]["repair"] = {"name": "least_squares", "steps": 5}
    for record in (record_of("dense", [20.0], key="d" * 16), record_of("wanda", [110.0], key="a1" * 8), repaired):
        write_record(record, tmp_path)
    code, _ = report(capsys, "--rows", "method,repair", "--results", str(tmp_path))
    rows = [line for line in (tmp_path / "tables" / "grid.md").read_text().splitlines() if line.startswith("|")]
    assert code == 0
    assert {row.split(" | ")[0] for row in rows[2:]} == {"| dense", "| Wanda", "| Wanda + least squares"}


def test_records_that_do_not_belong_together_are_refused_as_in_a_sweep(results, capsys, caplog):
    code, _ = report(capsys, "--rows", "method", "--columns", "seed", "--results", str(results))
    assert code == 1 and "pattern: 2:4, 50%" in caplog.text


def test_a_missing_folder_is_said(tmp_path, capsys, caplog):
    code, _ = report(capsys, "list", "--results", str(tmp_path / "none"))
    assert code == 2 and "there is no such folder" in caplog.text


def rows_of(capsys, results, *arguments):
    code, _ = report(capsys, *arguments, "--results", str(results), "--output", str(results / "out"))
    assert code == 0
    table = (results / "out" / "tables" / "grid.md").read_text()
    return [line for line in table.splitlines() if line.startswith("|")]


def plugin_of(name, nll, digest, **changes):
    record = record_of(name, nll, **changes)
    record["identity"]["code"] = {"method": digest}
    return record


def test_two_methods_of_plugins_stand_in_one_table(tmp_path, capsys):
    """Each has its own code; one method with two codes is two methods, and is not averaged or mixed in a row."""
    for record in (plugin_of("mine", [30.0], "aaa", key="a1" * 8), plugin_of("other", [40.0], "bbb", key="b1" * 8)):
        write_record(record, tmp_path)
    assert rows_of(capsys, tmp_path, "--rows", "method")[2:] == ["| mine | 30.00 |", "| other | 40.00 |"]
    write_record(plugin_of("mine", [20.0], "ccc", key="c1" * 8, pattern="50%"), tmp_path)
    code, _ = report(capsys, "--rows", "method", "--results", str(tmp_path))
    assert code == 1
    assert len(rows_of(capsys, tmp_path, "--rows", "method", "--where", "code.method=aaa,bbb")) == 4


def test_two_models_of_one_name_are_told_apart(tmp_path, capsys):
    for number, nll in enumerate([[30.0], [50.0]]):
        for method, factor in (("dense", 1), ("wanda", 2)):
            record = record_of(method, [nll[0] * factor], key=f"{method[0]}{number}" * 8)
            record["identity"]["model"] = f"local:{number}f00dfeed"
            write_record(record, tmp_path)
    expected = [
        "| smollm2_135m@0f00df dense | 30.00 |",
        "| smollm2_135m@0f00df Wanda | 60.00 |",
        "| smollm2_135m@1f00df dense | 50.00 |",
        "| smollm2_135m@1f00df Wanda | 100.00 |",
    ]
    assert sorted(rows_of(capsys, tmp_path, "--rows", "model")[2:]) == sorted(expected)
    assert sorted(rows_of(capsys, tmp_path, "--rows", "method")[2:]) == sorted(expected)
    assert rows_of(capsys, tmp_path, "--rows", "method", "--columns", "model") == [
        "| | smollm2_135m@0f00df | smollm2_135m@1f00df |",
        "|---|---|---|",
        "| dense | 30.00 | 50.00 |",
        "| Wanda | 60.00 | 100.00 |",
    ]


def test_models_stand_beside_methods(tmp_path, capsys):
    for model, nll in (("first", 30.0), ("second", 50.0)):
        for method, factor in (("wanda", 2), ("dass", 1)):
            write_record(record_of(method, [nll * factor], key=f"{method[0]}{model[0]}" * 8, model=model), tmp_path)
    for rows in ("model", "model.name"):
        table = rows_of(capsys, tmp_path, "--rows", rows, "--columns", "method")
        assert sorted(table[2:]) == ["| first | 30.00 | 60.00 |", "| second | 50.00 | 100.00 |"]
