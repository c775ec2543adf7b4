"""Published numbers: which of ours they are compared with, the verdict, and files that cannot be read."""

import pytest
from factory import record_of

from dass_exp.errors import UserError
from dass_exp.report import published
from dass_exp.report.load import told_apart

HEAD = "source,model,scope,pattern,method,metric,dataset,context,value"


def llama(value=6.9):
    changes = {"model": "llama31_8b", "context": 2048, "dataset": "wikitext2"}
    return record_of("wanda", [value], scope="all", pattern="50%", **changes)


def row_of(**changes):
    row = {"source": "somewhere", "model": "llama3.1_8b", "scope": "all", "pattern": "50%", "method": "wanda"}
    row |= {"metric": "perplexity", "dataset": "wikitext2", "context": "2048", "value": "7.0", "note": ""}
    return row | changes


@pytest.mark.parametrize(
    ("ours", "note", "verdict"),
    [(6.9, "", "within 2% (1.4%)"), (7.7, "", "outside 2% (10.0%)"), (6.9, "not stated", "no verdict: not stated")],
)
def test_a_published_number_of_the_same_kind_gets_a_verdict(ours, note, verdict):
    (match,) = published.counterparts([llama(ours)], [row_of(note=note)])
    assert (match.ours, match.value, match.verdict) == (ours, 7.0, verdict)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context", "4096"),
        ("scope", "mlp"),
        ("pattern", "2:4"),
        ("method", "dass"),
        ("model", "llama2_7b"),
        ("dataset", "c4"),
        ("metric", "accuracy_percent"),
    ],
)
def test_another_protocol_is_no_counterpart(name, value):
    assert published.counterparts([llama()], [row_of(**{name: value})]) == []
    assert "No published number on file" in published.as_markdown([])


def test_a_users_own_rows_count(tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text(f"{HEAD},note\ndass-paper,llama3.1_8b,all,50%,wanda,perplexity,wikitext2,2048,6.9,\n")
    (match,) = published.counterparts([llama()], published.read(path))
    assert match.source == "dass-paper"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"source,model\nx,y\n", "no column scope, pattern, method"),
        (f"{HEAD}\na,b,c,d,e,f,g,h,many\n".encode(), "line 2: value='many': expected a number"),
        (f"{HEAD}\na,b,c,d,e,f,g,h\n".encode(), "line 2: value=None: expected a number"),
        (f"{HEAD}\na,b,c,d,e,perplexity,g,h,0\n".encode(), "line 2: value='0': expected a number above 0"),
        (HEAD.encode() + b"\n\xe9,,,,,,,,1\n", "no CSV file in UTF-8"),
    ],
)
def test_a_reference_that_cannot_be_read_is_refused(tmp_path, content, message):
    (tmp_path / "numbers.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        published.read(tmp_path / "numbers.csv")


def test_a_reference_saved_by_excel_is_read(tmp_path):
    (tmp_path / "excel.csv").write_text(f"{HEAD}\n", encoding="utf-8-sig")
    assert published.read(tmp_path / "excel.csv") == []


def test_a_model_that_is_told_apart_keeps_its_published_numbers():
    first, second = llama(), llama()
    second["identity"]["model"] = "local:abcdef01"
    renamed, _ = told_apart([first, second], [])
    assert all("@" in record["config"]["model"]["name"] for record in renamed)
    assert len(published.counterparts(renamed, [row_of()])) == 2
