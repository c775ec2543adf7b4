"""``dass-report leaderboard``: records of one protocol stand in one table, the best first."""

from __future__ import annotations

import re

import pytest
from factory import diverged, record_of, write_record
from support import ROOT

from dass_exp.report import cli

CLEAN = {"torch": "2.13.0", "gpu": None, "git_commit": "0" * 40, "git_dirty": False}


def written(records, folder, **environment) -> str:
    for record in records:
        write_record({**record, "environment": CLEAN | environment}, folder)
    cli.main(["leaderboard", "--results", str(folder), "--output", str(folder / "page")])
    return (folder / "page" / "leaderboard.md").read_text()


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = page.split(f"\n## {heading}\n")[1].split("\n## ", maxsplit=1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_best_stands_first_below_dense(tmp_path):
    kl = diverged(record_of("dass", [94.0, 95.0, 96.0, 94.5], key="b1" * 8), [1.5] * 4, [0.4] * 4, 4.5)
    records = [
        record_of("dense", [20.0, 21.0, 22.0, 20.5], key="d" * 16),
        record_of("wanda", [110.0, 111.0, 112.0, 110.5], key="a1" * 8),
        kl,
    ]
    rows = rows_of(written(records, tmp_path), "2:4, mlp, smollm2_135m")
    assert [row[0] for row in rows] == ["dense", "DaSS", "Wanda"]
    assert [row[1] for row in rows] == ["20.88", "94.88 (1)", "110.88 (2)"]
    assert rows[1][2:4] == ["1.500 (1)", "40.0 (1)"] and rows[2][2] == "not recorded"
    assert rows[2][-1] == f"[a1a1a1a1](runs/{'a1' * 8}/result.json)"


def test_seeds_are_one_row(tmp_path):
    records = [record_of("wanda", [110.0 + seed], key=f"a{seed}" * 8, seed=seed) for seed in range(3)]
    ((name, perplexity, *_, keys),) = rows_of(written(records, tmp_path), "2:4, mlp, smollm2_135m")
    assert (name, perplexity) == ("Wanda", "111.00 ± 1.00 (1)")
    assert re.findall(r"\[(\w+)\]", keys) == ["a0a0a0a0", "a1a1a1a1", "a2a2a2a2"]


@pytest.mark.parametrize(
    ("change", "headings"),
    [
        ({"pattern": "4:8"}, ["2:4, mlp, smollm2_135m", "4:8, mlp, smollm2_135m"]),
        ({"scope": "all"}, ["2:4, all, smollm2_135m", "2:4, mlp, smollm2_135m"]),
        ({"model": "gemma3_270m"}, ["2:4, mlp, gemma3_270m", "2:4, mlp, smollm2_135m"]),
        ({"num_samples": 64}, ["2:4, mlp, smollm2_135m"] * 2),
        ({"context": 256}, ["2:4, mlp, smollm2_135m"] * 2),
    ],
    ids=str,
)
def test_another_protocol_is_another_table(change, headings, tmp_path):
    records = [record_of("wanda", [110.0], key="a1" * 8), record_of("dass", [94.0], key="b1" * 8, **change)]
    page = written(records, tmp_path)
    assert sorted(re.findall("^## (.*)$", page, re.M)) == headings
    assert page.count("(1)") == 2 and "(2)" not in page


def test_a_method_without_calibration_stands_in_every_table_of_its_protocol(tmp_path):
    records = [record_of("magnitude", [700.0], key="c1" * 8)]
    records += [record_of("wanda", [110.0 - count], key=f"{count}" * 8, num_samples=count) for count in (16, 64)]
    page = written(records, tmp_path)
    assert page.count("\n## ") == 2 and page.count("| Magnitude | 700.00 (1-2)") == 2


def test_plugins_and_repetitions_share_a_table(tmp_path):
    records = [record_of("wanda", [110.0 + number], key=f"a{number}" * 8, seed=number) for number in range(2)]
    records[1]["identity"]["repeat"] = 1
    records.append(record_of("mine", [90.0], key="b1" * 8))
    records[2]["identity"]["code"] = {"method": "0123"}
    page = written(records, tmp_path)
    assert [row[:2] for row in rows_of(page, "2:4, mlp, smollm2_135m")] == [
        ["mine", "90.00 (1-2)"],
        ["Wanda", "110.50 ± 0.71 (1-2)"],
    ]


def test_filters_apply(tmp_path):
    written([record_of("wanda", [110.0], key="a1" * 8), record_of("dass", [94.0], key="b1" * 8)], tmp_path)
    cli.main(["leaderboard", "--results", str(tmp_path), "--where", "method=dass"])
    assert "Wanda" not in (tmp_path / "leaderboard.md").read_text()


@pytest.mark.parametrize("environment", [{"git_dirty": True}, {"git_commit": None}, {"git_dirty": None}], ids=str)
def test_uncommitted_code_is_left_out(environment, tmp_path, caplog):
    with pytest.raises(SystemExit):
        written([record_of("wanda", [110.0], key="a1" * 8)], tmp_path, **environment)
    assert "made by committed code" in caplog.text


def test_a_damaged_record_stops_the_page(tmp_path, caplog):
    path = write_record(record_of("wanda", [110.0], key="a1" * 8), tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(SystemExit):
        cli.main(["leaderboard", "--results", str(tmp_path)])
    assert str(path) in caplog.text


def test_the_committed_page_is_that_of_the_committed_records(tmp_path):
    folder = ROOT / "results" / "leaderboard"
    cli.main(["leaderboard", "--results", str(folder), "--output", str(tmp_path)])
    assert (tmp_path / "leaderboard.md").read_text() == (folder / "leaderboard.md").read_text()


@pytest.mark.thorough
def test_the_committed_tables_of_the_demo_are_those_of_the_committed_records(tmp_path):
    demo = ROOT / "results" / "demo"
    sweeps = ["perplexity", "zero_shot", "alpha", "granularity", "calibration_size"]
    cli.main([*sweeps, "--results", str(demo), "--output", str(tmp_path)])
    for sweep in sweeps:
        written = (tmp_path / "tables" / f"{sweep}.md").read_text(encoding="utf-8")
        assert written == (demo / "tables" / f"{sweep}.md").read_text(encoding="utf-8")
    page = (demo / "report.html").read_text(encoding="utf-8")
    linked = set(re.findall(r'href="([^"#:]+)"', page))
    assert len(linked) > 40 and all((demo / link).exists() for link in linked)
