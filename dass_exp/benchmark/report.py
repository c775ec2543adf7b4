"""The results of ``make bench`` as a Markdown page, each next to its target, and as a figure."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dass_exp.benchmark.measure import PARTS
from dass_exp.report.figures import canvas, save
from dass_exp.report.styles import series_style
from dass_exp.report.write import markdown_table

METHOD_TARGETS = {"dass": 1.1, "wanda": 1.1, "sparsegpt": 1.8}  # times the floor
_ZERO_SHOT = "Zero-shot, lm-eval's own work included"


def markdown(measured: dict[str, Any]) -> str:
    """Return the Markdown page of a measurement."""
    machine, settings, methods = measured["machine"], measured["settings"], measured["methods"]
    floor, masks, sweep = measured["floor_s"], measured["masks"], measured["sweep"]
    paragraphs = [
        f"# Speed, {measured['created'][:10]}",
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, GPU: {machine['gpu'] or 'none'}; "
        f"torch {machine['torch']}, transformers {machine['transformers']}. {settings['model']}, {settings['dtype']}, "
        f"{settings['samples']} x {settings['length']} tokens, scope {settings['scope']}, {settings['pattern']}; "
        f"one process, in turn, medians of {settings['repeats']} rounds.",
        "## Against the targets",
        markdown_table(("", "measured", "target", "met"), _against_targets(measured)),
        f"Floor: {floor['median']:.2f} s (runs: {', '.join(f'{run:.2f}' for run in floor['runs'])}): one pass through "
        "every block, and a second one, attention as it was, through every block but the last.",
        "## Where the seconds go",
        markdown_table(("method", "total", *PARTS, "peak GB"), (_parts(*method) for method in methods.items())),
        "## Growth: DaSS against its floor, one run each",
        markdown_table(("sequences", "tokens", "blocks", "floor s", "DaSS s", "ratio"), _growth(measured["growth"])),
        "## Single figures",
        f"- A 2:4 mask of 4096 x 11008 weights: {masks['mask_s']:.2f} s; two passes of 16 x 512 tokens through such a "
        f"matrix: {masks['passes_s']:.2f} s (the mask is {100 * masks['share']:.1f} % of both together).\n"
        f"{_scoring('Perplexity', measured['perplexity'])}\n"
        f"{_scoring(_ZERO_SHOT, measured['zero_shot'])}\n"
        f"- A sweep of {sweep['cells']} cells ({sweep['records']} records): {sweep['seconds']:.1f} s; the floors of "
        f"its cells and plain passes over what they score: {sweep['floors_s']:.1f} s.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _against_targets(measured: dict[str, Any]) -> Iterator[Sequence[str]]:
    dass, methods = measured["methods"]["dass"], measured["ratios_to_floor"]
    rows = [(name, ratio, "of the floor", METHOD_TARGETS.get(name)) for name, ratio in methods.items()]
    rows += [
        ("masks", (dass["solve"] + dass["write"]) / dass["total"], "of a DaSS run", 0.05),
        ("sweep", measured["sweep"]["ratio"], "of plain passes", 1.1),
        ("perplexity", measured["perplexity"]["ratio"], "of plain passes", 1.1),
        ("zero-shot", measured["zero_shot"]["ratio"], "of plain passes", 1.5),
    ]
    if (divergence := measured.get("divergence")) is not None:  # former versions did not measure it
        rows.append(("divergence", divergence, "of perplexity alone", 1.25))
    for name, ratio, unit, target in rows:
        met = "" if target is None else "yes" if ratio <= target else "**no**"
        yield name, f"{ratio:.3f} {unit}", "none" if target is None else f"at most {target}", met


def _growth(runs: Iterable[dict[str, float]]) -> Iterator[Sequence[str]]:
    for run in runs:
        sizes, seconds = (run["samples"], run["length"], run["blocks"]), (run["floor_s"], run["dass_s"])
        yield [*(f"{size:.0f}" for size in sizes), *(f"{second:.2f}" for second in seconds), f"{run['ratio']:.3f}"]


def _scoring(name: str, scored: dict[str, float]) -> str:
    return (
        f"- {name}: {scored['tokens']:.0f} tokens in {scored['seconds']:.2f} s ({scored['tokens_per_second']:.0f} "
        f"tokens per second); the model's own forward over them: {scored['plain_s']:.2f} s."
    )


def _parts(name: str, seconds: dict[str, float]) -> Sequence[str]:
    return [name, *(f"{seconds[part]:.2f}" for part in ("total", *PARTS)), f"{seconds['peak_rss_bytes'] / 1e9:.2f}"]


def draw(measured: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what ``make bench`` measured as stacked bars of seconds: ``speed.svg`` and ``speed.png`` in ``folder``."""
    floor, methods, settings = measured["floor_s"]["median"], measured["methods"], measured["settings"]
    names = ["floor", *methods]
    left = [0.0] * len(names)
    with canvas() as figure:
        figure.set_size_inches(7.5, 3.4)
        axes = figure.subplots()
        for number, part in enumerate(PARTS):
            widths = [floor if part == "forward" else 0.0, *(max(seconds[part], 0.0) for seconds in methods.values())]
            style: dict[str, Any] = {**series_style(number).bar, "edgecolor": "black", "linewidth": 0.6}
            axes.barh(names, widths, left=left, label=part, **style)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for row, (name, end) in enumerate(zip(names, left, strict=True)):
            axes.text(end, row, f"  {measured['ratios_to_floor'][name]:.2f}" if row else "  1", va="center")
        axes.axvline(floor, color="black", linestyle="--", linewidth=1)
        axes.invert_yaxis()
        axes.set(xlabel="seconds (beside each bar: its ratio to the floor)", xlim=(0, 1.12 * max(left)))
        figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False)
        tokens = f"{settings['samples']} x {settings['length']} tokens"
        return save(figure, f"Pruning {settings['model']} to {settings['pattern']}, {tokens}", folder / "speed")
