"""The table "what perplexity does not show": each method by several metrics, with ranks that say what noise allows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dass_exp.report.load import Record, SweepCell
from dass_exp.report.metrics import METRICS
from dass_exp.report.table import HEADLINE, ResultTable, build_table, with_metric

_SHOWN = ("perplexity", "kl", "agreement", "generation_equal", "distinct_4", "flips", "bits_per_byte", "ece", "acc")


def build_metric_table(
    name: str,
    layout: Mapping[str, Any],
    records: list[Record],
    failed: list[SweepCell],
    results: Path,
    mix: bool = False,
) -> ResultTable:
    """Lay the records of a sweep out with one column per metric; what was its columns goes in front of its rows.

    Metrics that no record holds are left out and named in the note.

    Raises:
        UserError: the records differ in a setting that no axis shows, and not ``mix``.
    """
    tables = {}
    for metric in _SHOWN:
        axes = {"rows": with_metric(layout, "acc", name)["rows"], "columns": HEADLINE}
        own = {**layout, **axes, "metric": metric, "title": layout.get("title", name), "figure": None}
        tables[metric] = build_table(f"{name}_metrics", own, records, failed, results, mix)
    known = {metric: table for metric, table in tables.items() if table.headlines} or tables
    first = max(known.values(), key=lambda table: len(table.rows))  # a metric without a dense value has fewer rows
    absent = [METRICS[metric].label for metric in _SHOWN if metric not in known]
    missing = f"No record holds: {', '.join(absent)}." if absent else ""
    return ResultTable(
        first.name,
        f"What perplexity does not show: {first.title}",
        first.metric,
        list(dict.fromkeys(row for table in (first, *known.values()) for row in table.rows)),
        [METRICS[metric].label for metric in known],
        {place: value for table in known.values() for place, value in table.cells.items()},
        records,
        failed,
        None,
        first.mixed,
        " ".join(filter(None, (first.note, missing))),
        first.axes,
        arguments=f"{name} --metrics",
        by_column={METRICS[metric].label: metric for metric in known},
    )
