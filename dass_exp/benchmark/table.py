"""The figures of ``make bench`` as Markdown, each against its target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

TARGETS = {
    "dass": 1.10,
    "wanda": 1.10,
    "sparsegpt": 1.8,
    "masks": 0.05,
    "sweep": 1.1,
    "perplexity": 1.1,
    "zero-shot": 1.5,
}
PARTS = ("forward", "statistics", "solve", "write", "verify", "rest")


def shares(found: dict[str, Any]) -> dict[str, float]:
    """What each target is about: times as ratios to what cannot be avoided, masks as a share of a DaSS run."""
    dass = found["methods"]["dass"]
    return {
        **found["ratios_to_floor"],
        "masks": (dass["solve"] + dass["write"]) / dass["total"],
        "sweep": found["sweep"]["ratio"],
        "perplexity": found["perplexity"]["ratio"],
        "zero-shot": found["zero_shot"]["ratio"],
    }


def markdown(found: dict[str, Any]) -> str:
    """The whole page.

    Args:
        found: as :func:`dass_exp.benchmark.__main__.measure` gives it.
    """
    machine, settings, methods = found["machine"], found["settings"], found["methods"]
    lines = [
        f"# Speed, {found['created'][:10]}",
        "",
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, GPU: {machine['gpu'] or 'none'}; torch {machine['torch']}, "
        f"transformers {machine['transformers']}. {settings['model']}, {settings['dtype']}, {settings['samples']} x {settings['length']} tokens, "
        f"scope {settings['scope']}, {settings['pattern']}; one process, in turn, medians of {settings['repeats']} rounds.",
        "",
        "## Against the targets",
        "",
        *_rows(("", "measured", "target", "met"), _against(found)),
        "",
        f"Floor: {found['floor_s']['median']:.2f} s (runs: {', '.join(f'{run:.2f}' for run in found['floor_s']['runs'])}): one pass through every block, and a "
        "second one, attention as it was, through every block but the last.",
        "",
        "## Where the seconds go",
        "",
        *_rows(("method", "total", *PARTS, "peak GB"), (_split(name, of) for name, of in methods.items())),
        "",
        "## Growth: DaSS against its floor, one run each",
        "",
        *_rows(("sequences", "tokens", "blocks", "floor s", "DaSS s", "ratio"), _growth(found["growth"])),
        "",
        "## Single figures",
        "",
        f"- A 2:4 mask of 4096 x 11008 weights: {found['masks']['mask_s']:.2f} s; two passes of 16 x 512 tokens through such a matrix: "
        f"{found['masks']['passes_s']:.2f} s (the mask is {100 * found['masks']['share']:.1f} % of both together).",
        *(
            _scoring(name, found[key])
            for name, key in (("Perplexity", "perplexity"), ("Zero-shot, lm-eval's own work included", "zero_shot"))
        ),
        f"- A sweep of {found['sweep']['cells']} cells ({found['sweep']['records']} records): {found['sweep']['seconds']:.1f} s; the floors of its cells and "
        f"plain passes over what they score: {found['sweep']['floors_s']:.1f} s.",
    ]
    return "\n".join(lines) + "\n"


def _against(found: dict[str, Any]) -> Iterable[Sequence[str]]:
    for name, value in shares(found).items():
        unit = (
            "of a DaSS run"
            if name == "masks"
            else "of plain passes"
            if name in ("perplexity", "zero-shot", "sweep")
            else "of the floor"
        )
        target = TARGETS.get(name)
        yield (
            name,
            f"{value:.3f} {unit}",
            "none" if target is None else f"at most {target}",
            "" if target is None else "yes" if value <= target else "**no**",
        )


def _growth(lines: Iterable[dict[str, float]]) -> Iterable[Sequence[str]]:
    for line in lines:
        yield [
            *(f"{line[name]:.0f}" for name in ("samples", "length", "blocks")),
            *(f"{line[name]:.2f}" for name in ("floor_s", "dass_s")),
            f"{line['ratio']:.3f}",
        ]


def _scoring(name: str, found: dict[str, float]) -> str:
    return (
        f"- {name}: {found['tokens']:.0f} tokens in {found['seconds']:.2f} s ({found['tokens_per_second']:.0f} tokens per second); "
        f"the model's own forward over them: {found['plain_s']:.2f} s."
    )


def _split(name: str, of: dict[str, float]) -> Sequence[str]:
    return [name, *(f"{of[part]:.2f}" for part in ("total", *PARTS)), f"{of['peak_rss_bytes'] / 1e9:.2f}"]


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]
