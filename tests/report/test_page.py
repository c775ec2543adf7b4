"""The page: what it shows, that it sorts in a real browser, that nothing in it can run or load but what we wrote."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dass_exp.report.figures import draw
from dass_exp.report.load import Cell
from dass_exp.report.page import Chapter, page
from dass_exp.report.published import Published
from dass_exp.report.table import Entry, ResultTable

HOSTILE = "<script>alert(1)</script>\"'&_$x$"
CHROMIUM = shutil.which("chromium")
ROWS = {
    "dense": 20.5,
    "wanda": 100.25,
    HOSTILE: 9.75,
    "dass alpha=0.5": 100.25,
    "dass alpha=0.25": 61.0,
    "magnitude": "failed",
}


def record_of(key: str, method: str, **environment: Any) -> dict[str, Any]:
    config = {
        "model": {"name": "tiny"},
        "method": {"name": method},
        "pattern": {"name": "2:4"},
        "scope": "mlp",
        "seed": 0,
        "calibration": None,
    }
    return {
        "key": key,
        "created": "2025-01-01T00:00:00Z",
        "config": config,
        "metrics": {},
        "environment": {"torch": "2.13.0", "gpu": None} | environment,
    }


@pytest.fixture
def sheet() -> ResultTable:
    cells: dict[tuple[str, str], Entry | str] = {
        (row, "2:4"): value
        if isinstance(value, str)
        else Entry((value,), keys=("aa11",), mark={61.0: "second", 9.75: "best"}.get(value, ""))
        for row, value in ROWS.items()
    }
    cells[("dense", "4:8")] = Entry((20.0, 21.0))
    records = [
        record_of("aa11", HOSTILE),
        record_of("bb22", "wanda", gpu="H100"),
        record_of("bb22", "wanda", gpu="H100"),
    ]
    failed = [Cell(("method=magnitude", "pattern=2of4"), "failed", None, f"NumericalError: {HOSTILE}")]
    return ResultTable(
        "perplexity",
        f"Perplexity {HOSTILE}",
        "perplexity",
        list(ROWS),
        ["2:4", "4:8"],
        cells,
        records,
        failed,
        {"kind": "bars"},
    )


@pytest.fixture
def report(sheet, tmp_path) -> Path:
    published = [Published(f"llama wanda {HOSTILE}", 7.25, 7.5, "a paper", "outside 2%")]
    chapter = Chapter(sheet, f"A caption {HOSTILE}", draw(sheet, tmp_path / "figures"), published)
    return page([chapter], [f"runs/x: {HOSTILE}"], tmp_path / "report.html")


class Tags(HTMLParser):
    """Collects tags with their attributes, and the text outside style and script."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.said.append(data)


def parsed(report: Path) -> Tags:
    tags = Tags()
    tags.feed(report.read_text(encoding="utf-8"))
    return tags


def test_values_marks_failures_environments_records_and_problems(report):
    source = report.read_text(encoding="utf-8")
    said = " ".join(parsed(report).said)
    for text in (
        "20.50",
        "20.50 ± 0.71",
        "100.25",
        "failed",
        "method=magnitude pattern=2of4",
        "A caption",
        "H100",
        "2.13.0",
        "-0.25",
        "a paper",
        "outside 2%",
        "Files that are no records",
    ):
        assert text in said, text
    assert '<span class="best">9.75</span>' in source
    assert '<span class="second">61.00</span>' in source
    links = [attributes["href"] for tag, attributes in parsed(report).found if tag == "a"]
    assert [link for link in links if not link.startswith("#")] == ["runs/aa11/result.json", "runs/bb22/result.json"]
    ids = [attributes["id"] for _, attributes in parsed(report).found if attributes.get("id")]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert len(ids) == len(set(ids))
    assert list(report.parent.glob("*.partial")) == []


def test_a_page_elsewhere_links_to_the_records(sheet, tmp_path):
    report = page([Chapter(sheet, "")], [], tmp_path / "shown" / "here" / "report.html", tmp_path / "results")
    links = [attributes["href"] for tag, attributes in parsed(report).found if tag == "a"]
    assert "../../results/runs/aa11/result.json" in links
    assert "No published number on file" in " ".join(parsed(report).said)


def test_a_hostile_name_stays_text(report):
    tags = parsed(report)
    assert [tag for tag, _ in tags.found].count("script") == 1
    assert "<script>alert" not in report.read_text(encoding="utf-8")
    assert " ".join(tags.said).count(HOSTILE) >= 6  # table, title, caption, failure, problem, record, picture
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]


def test_nothing_is_loaded_from_anywhere(report):
    source, tags = report.read_text(encoding="utf-8"), parsed(report)
    loading = [
        (tag, value)
        for tag, attributes in tags.found
        for name, value in attributes.items()
        if name in ("src", "srcset", "data", "action", "poster")
    ]
    assert loading == []
    assert not {tag for tag, _ in tags.found} & {
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "image",
        "foreignobject",
    }
    references = [
        value for _, attributes in tags.found for name, value in attributes.items() if name in ("href", "xlink:href")
    ]
    assert all(value.startswith(("#", "runs/")) for value in references)
    assert {*re.findall(r"https?://[^\"'\s<)]*", source)} <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }  # names of formats
    assert "@import" not in source
    assert "default-src 'none'" in source
    assert all(match.startswith("#") for match in re.findall(r"url\(([^)]*)\)", source))


def test_pictures_of_two_sheets_do_not_share_ids(sheet, tmp_path):
    first, _ = draw(sheet, tmp_path)
    second = first.with_name("other.svg")
    second.write_bytes(first.read_bytes())
    report = page([Chapter(sheet, "", [first, second, tmp_path / "perplexity.png"])], [], tmp_path / "report.html")
    ids = [attributes["id"] for _, attributes in parsed(report).found if attributes.get("id")]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, attributes in parsed(report).found if (value := attributes.get("xlink:href"))}
    assert used <= set(ids)


def test_a_page_without_anything_is_still_a_page(tmp_path):
    report = page([], [], tmp_path / "report.html")
    assert "</html>" in report.read_text(encoding="utf-8")


def in_browser(report: Path, script: str) -> str:
    """The page as Chromium has it after a script of the test, which the page's rule against foreign scripts is told to let pass beside its own."""
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    hooked = (
        report.read_text(encoding="utf-8")
        .replace("script-src ", f"script-src 'sha256-{allowed}' ")
        .replace("</body>", f"<script>{script}</script></body>")
    )
    copy = report.with_name("hooked.html")
    copy.write_text(hooked, encoding="utf-8")
    return dumped(copy)


def dumped(report: Path) -> str:
    profile = report.parent / "profile"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        f"--user-data-dir={profile}",
    ]
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", report.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout


def order(dom: str) -> list[str]:
    body = dom[dom.index("<tbody>") : dom.index("</tbody>")]
    names = {row.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"): row for row in ROWS}
    return [names[name] for name in re.findall(r'<th scope="row">(.*?)</th>', body)]


def click(column: int, times: int = 1) -> str:
    return f"for (let n = 0; n < {times}; n++) document.querySelectorAll('table.sortable')[0].tHead.rows[0].cells[{column}].querySelector('button').click();"


needs_chromium = pytest.mark.skipif(
    CHROMIUM is None,
    reason="chromium is not installed (apt-get install chromium): the page was not opened in a browser",
)


@needs_chromium
def test_the_page_sorts_in_a_browser(report):
    up = in_browser(report, click(1))
    assert order(up) == [
        HOSTILE,
        "dense",
        "dass alpha=0.25",
        "wanda",
        "dass alpha=0.5",
        "magnitude",
    ]  # as numbers; equal ones as they stood
    assert 'aria-sort="ascending"' in up
    down = in_browser(report, click(1, times=2))
    assert order(down) == ["wanda", "dass alpha=0.5", "dass alpha=0.25", "dense", HOSTILE, "magnitude"]
    assert 'aria-sort="descending"' in down
    named = order(in_browser(report, click(0)))
    assert named.index("dass alpha=0.25") < named.index("dass alpha=0.5") < named.index("dense") < named.index("wanda")


@needs_chromium
def test_no_script_but_ours_runs(report):
    source = report.read_text(encoding="utf-8").replace(
        "</body>", "<script>document.title = 'taken over'</script></body>"
    )
    report.write_text(source.replace("<main>", '<main><img src=x onerror="document.title = 1">'), encoding="utf-8")
    assert "<title>dass_exp: report</title>" in dumped(report)
