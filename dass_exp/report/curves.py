"""The curves of a line figure, and the baselines: horizontal lines for records without the setting on the x axis."""

import math

from dass_exp.report.load import Record, is_dense, model_name, setting, varying_settings
from dass_exp.report.protocol_check import Protocols
from dass_exp.report.table import ResultTable, TableValue, axis_label

Curves = dict[str, dict[float, TableValue]]


def curves_of(table: ResultTable, x_axis: str) -> tuple[Curves, dict[str, TableValue]]:
    """Return curves by label and x, and baselines by label, both pooled over seeds."""
    records = {record["key"]: record for record in table.records}
    scores = {key: score for key, score in table.headlines.items() if math.isfinite(score)}
    scored = [(record, scores[key]) for key, record in records.items() if key in scores]
    labels = _labels(table, [record for record, _ in scored], x_axis)
    points: dict[str, dict[float, list[float]]] = {}
    baselines: dict[str, list[float]] = {}
    for record, score in scored:
        x, label = _x_of(record, x_axis), labels[record["key"]]
        if x is None:
            baselines.setdefault(label, []).append(score)
        else:
            points.setdefault(label, {}).setdefault(x, []).append(score)
    curves = {label: {x: TableValue(tuple(curve[x])) for x in sorted(curve)} for label, curve in points.items()}
    dense_first = sorted(baselines.items(), key=lambda baseline: not baseline[0].endswith("dense"))
    return curves, {label: TableValue(tuple(values)) for label, values in dense_first}


def _labels(table: ResultTable, records: list[Record], x_axis: str) -> dict[str, str]:
    """Label each record, by key, along the axes of the table that vary, and with the settings that the table mixes."""
    pruned = [record for record in records if not is_dense(record)]
    # x distinguishes the points of a curve, not the curves
    varying = {
        method: [name for name in names if x_axis not in (f"method.{name}", f"retrain.{name}")]
        for method, names in varying_settings(pruned).items()
    }
    axes = ["model.name", *(axis for axis in table.axes if axis not in (x_axis, "model"))]
    axes = [axis for axis in axes if len({axis_label(record, axis, varying) for record in pruned} - {""}) > 1]
    protocols = Protocols(records)
    mixed = [name for name in table.mixed if name != x_axis]
    labels = {}
    for record in records:
        has_x = _x_of(record, x_axis) is not None
        shown = [axis for axis in axes if not (has_x and x_axis.startswith(f"{axis}.") and axis != "method")]
        if is_dense(record):
            parts = [model_name(record) if "model.name" in axes else "", protocols.label(record, mixed), "dense"]
        else:
            parts = [axis_label(record, axis, varying) for axis in shown]
            if not any(parts) or not (has_x or "method" in shown):
                parts.insert(0, axis_label(record, "method", varying))
            parts.append(protocols.label(record, mixed))
        labels[record["key"]] = " ".join(filter(None, parts))
    return labels


def _x_of(record: Record, x_axis: str) -> float | None:
    value = setting(record["config"], x_axis)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value * 100 if x_axis.endswith("sparsity") else value
