"""The page: what it shows, that it sorts in a real browser, that nothing in it can run or load but what we wrote."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import pytest
from factory import record_of, write_record

from dass_exp.report.figures import draw
from dass_exp.report.load import SweepCell
from dass_exp.report.page import Section, write_page
from dass_exp.report.published import Published
from dass_exp.report.table import ResultTable, TableValue

HOSTILE = "<script>alert(1)</script>\"'&_$x$"
CHROMIUM = shutil.which("chromium")
ROWS = {"dense": 20.5, "wanda": 100.25, HOSTILE: 9.75, "dass alpha=0.5": 100.25, "dass alpha=0.25": 61.0}
MARKS = {61.0: "second", 9.75: "best"}
LOADING = {"src", "srcset", "data", "action", "poster"}
FOREIGN = {"link", "img", "iframe", "object", "embed", "base", "image", "foreignobject"}


@pytest.fixture
def table() -> ResultTable:
    values = {row: TableValue((value,), keys=("aa11",), mark=MARKS.get(value, "")) for row, value in ROWS.items()}
    cells: dict[tuple[str, str], TableValue | str] = {(row, "2:4"): value for row, value in values.items()}
    cells |= {("magnitude", "2:4"): "failed", ("dense", "4:8"): TableValue((20.0, 21.0))}
    other = record_of("wanda", key="bb22")
    other["environment"] |= {"gpu": "H100"}
    records = [record_of(HOSTILE, key="aa11"), other, other]
    failed = [SweepCell(("method=magnitude", "pattern=2of4"), "failed", None, f"NumericalError: {HOSTILE}")]
    rows, title = [*ROWS, "magnitude"], f"Perplexity {HOSTILE}"
    return ResultTable(
        "perplexity", title, "perplexity", rows, ["2:4", "4:8"], cells, records, failed, {"kind": "bars"}
    )


@pytest.fixture
def report(table, tmp_path) -> Path:
    published = [Published(f"llama wanda {HOSTILE}", 7.25, 7.5, "a paper", "outside 2%")]
    section = Section(table, f"A caption {HOSTILE}", draw(table, tmp_path / "figures"), published)
    store(table, tmp_path)
    return write_page([section], [f"runs/x: {HOSTILE}"], tmp_path / "report.html")


def store(table: ResultTable, results: Path) -> None:
    """Write the records of the table into a results folder."""
    for record in {record["key"]: record for record in table.records}.values():
        write_record(record, results)


class Tags(HTMLParser):
    """Tags, their attributes as triples, and the text outside style and script."""

    def __init__(self, report: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.feed(report.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.texts.append(data)

    def values(self, *names: str, of: str | None = None) -> list[str]:
        return [value for tag, name, value in self.attributes if name in names and of in (None, tag)]


def test_values_marks_failures_environments_records_and_problems(report):
    source, tags = report.read_text(encoding="utf-8"), Tags(report)
    shown = " ".join(tags.texts)
    values = ["20.50", "20.50 ± 0.71", "100.25", "failed", "-0.25"]
    words = ["method=magnitude pattern=2of4", "A caption", "H100", "2.13.0", "a paper", "outside 2%"]
    for text in [*values, *words, "Files that are no records"]:
        assert text in shown, text
    assert '<span class="best">9.75</span>' in source
    assert '<span class="second">61.00</span>' in source
    links, ids = tags.values("href", of="a"), tags.values("id")
    assert [link for link in links if not link.startswith("#")] == ["runs/aa11/result.json", "runs/bb22/result.json"]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert len(ids) == len(set(ids))
    assert list(report.parent.glob("*.partial")) == []


def test_a_page_elsewhere_links_to_the_records(table, tmp_path):
    store(table, tmp_path / "results")
    tags = Tags(write_page([Section(table, "")], [], tmp_path / "shown" / "here" / "report.html", tmp_path / "results"))
    assert "../../results/runs/aa11/result.json" in tags.values("href", of="a")
    assert "No published number on file" in " ".join(tags.texts)


def test_a_record_that_is_not_there_has_no_link(table, tmp_path):
    write_record(table.records[0], tmp_path)
    tags = Tags(write_page([Section(table, "")], [], tmp_path / "report.html"))
    assert [link for link in tags.values("href", of="a") if link[0] != "#"] == ["runs/aa11/result.json"]
    assert {"aa11", "bb22"} <= set(tags.texts)


def test_the_page_says_which_version_wrote_it_and_of_when_its_records_are(table, tmp_path):
    for record, day in zip(table.records, ("02-03", "01-05", "01-05"), strict=True):
        record["created"] = f"2026-{day}T00:00:00+00:00"
    shown = Tags(write_page([Section(table, "")], [], tmp_path / "report.html")).texts
    assert f"dass_exp {version('dass_exp')}, records of 2026-01-05 to 2026-02-03" in shown


def test_records_are_shown_with_their_scores(report):
    source = report.read_text(encoding="utf-8")
    (row,) = (line for line in source.splitlines() if line.startswith('<tr><th scope="row"><a href="runs/bb22/'))
    scores = [float(value) for value in re.findall(r'data-value="([\d.]+)"', row)]
    assert scores[0] == pytest.approx(float(record_of("wanda")["metrics"]["perplexity"]["wikipedia_mini"]))


def test_a_hostile_name_stays_text(report):
    tags = Tags(report)
    assert tags.tags.count("script") == 1
    assert "<script>alert" not in report.read_text(encoding="utf-8")
    assert " ".join(tags.texts).count(HOSTILE) >= 6  # table, title, caption, failure, problem, record, picture
    assert not [name for _, name, _ in tags.attributes if name.startswith("on")]


def test_nothing_is_loaded_from_anywhere(report):
    source, tags = report.read_text(encoding="utf-8"), Tags(report)
    assert tags.values(*LOADING) == []
    assert not set(tags.tags) & FOREIGN
    assert all(link.startswith(("#", "runs/")) for link in tags.values("href", "xlink:href"))
    names_of_formats = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert {*re.findall(r"https?://[^\"'\s<)]*", source)} <= names_of_formats
    assert "@import" not in source
    assert "default-src 'none'" in source
    assert all(match.startswith("#") for match in re.findall(r"url\(([^)]*)\)", source))


def test_the_policy_lets_the_script_of_the_page_run(report):
    source = report.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    assert f"script-src 'sha256-{hash_of(script)}'" in source


def test_pictures_of_two_tables_do_not_share_ids(table, tmp_path):
    first, *_ = draw(table, tmp_path)
    second = first.with_name("other.svg")
    second.write_bytes(first.read_bytes())
    section = Section(table, "", [first, second, tmp_path / "perplexity.png"])
    tags = Tags(write_page([section], [], tmp_path / "report.html"))
    ids = tags.values("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in tags.values("xlink:href")} <= set(ids)


def test_a_page_without_tables_is_still_a_page(tmp_path):
    assert "</html>" in write_page([], [], tmp_path / "report.html").read_text(encoding="utf-8")


def hash_of(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def dom_after(report: Path, script: str) -> str:
    """The page as Chromium has it after a script of the test, which its policy then allows beside its own."""
    source = report.read_text(encoding="utf-8").replace("script-src ", f"script-src 'sha256-{hash_of(script)}' ")
    copy = report.with_name("hooked.html")
    copy.write_text(source.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return dom(copy)


def dom(report: Path) -> str:
    profile = report.parent / "profile"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    call = [CHROMIUM, *options, f"--user-data-dir={profile}", "--dump-dom", report.as_uri()]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=True)
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout


def order(dom: str) -> list[str]:
    """The names of the rows of the first table."""
    body = dom[dom.index("<tbody>") : dom.index("</tbody>")]
    return [html.unescape(name) for name in re.findall(r'<th scope="row">(.*?)</th>', body)]


def click(column: int, times: int = 1) -> str:
    head = f"document.querySelectorAll('table.sortable')[0].tHead.rows[0].cells[{column}]"
    return f"for (let n = 0; n < {times}; n++) {head}.querySelector('button').click();"


needs_chromium = pytest.mark.skipif(
    CHROMIUM is None,
    reason="chromium is not installed (apt-get install chromium): the page was not opened in a browser",
)


@needs_chromium
def test_the_page_sorts_in_a_browser(report):
    up = dom_after(report, click(1))
    # as numbers; equal ones as they stood
    assert order(up) == [HOSTILE, "dense", "DaSS alpha=0.25", "Wanda", "DaSS alpha=0.5", "Magnitude"]
    assert 'aria-sort="ascending"' in up
    down = dom_after(report, click(1, times=2))
    assert order(down) == ["Wanda", "DaSS alpha=0.5", "DaSS alpha=0.25", "dense", HOSTILE, "Magnitude"]
    assert 'aria-sort="descending"' in down
    named = order(dom_after(report, click(0)))
    assert named.index("DaSS alpha=0.25") < named.index("DaSS alpha=0.5") < named.index("dense") < named.index("Wanda")


@needs_chromium
def test_records_are_filtered_by_words_in_a_browser(report):
    typed = "const field = document.querySelector('input[type=search]'); field.value = ' WANDA  2:4 ';"
    shown = dom_after(report, typed + "field.dispatchEvent(new Event('input'));")
    rows = re.findall(r"<tr(.*?)><th scope=\"row\"><a href=\"runs/(\w+)/", shown)
    assert rows == [(' hidden=""', "aa11"), ("", "bb22")]


@needs_chromium
def test_no_script_but_ours_runs(report):
    foreign = "<script>document.title = 'taken over'</script></body>"
    source = report.read_text(encoding="utf-8").replace("</body>", foreign)
    report.write_text(source.replace("<main>", '<main><img src=x onerror="document.title = 1">'), encoding="utf-8")
    assert "<title>dass_exp: report</title>" in dom(report)


def test_what_the_gpu_check_found_is_shown(table, tmp_path):
    lines = [{"name": f"masks of {HOSTILE}", "status": "differs", "detail": "all bits"}]
    (tmp_path / "bench").mkdir()
    content = {"schema": 1, "created": "2026-12-01T00:00:00Z", "machine": {"gpu": "H100"}, "lines": lines}
    (tmp_path / "bench" / "gpu-h100-2026-12-01.json").write_text(json.dumps(content))
    (tmp_path / "bench" / "gpu-torn-2026-12-02.json").write_text("{")
    page = write_page([Section(table, "A caption")], [], tmp_path / "report.html").read_text()
    assert "GPU check: H100, 2026-12-01" in page and page.count("GPU check") == 1
    assert "masks of &lt;script&gt;" in page and HOSTILE not in page
