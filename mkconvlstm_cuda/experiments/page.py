"""Results as Markdown, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(told: Mapping[str, Any]) -> str:
    """The claims of a results.json as a Markdown table: the paper's words, what was measured, what came out."""
    lines = [
        "| the paper | measured | mean | 95% interval | seeds | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for claim in told["claims"]:
        found = claim["interval"]
        cells = (
            f"“{claim['words']}” ({claim['where']})",
            claim["measured"],
            f"{found['mean']:.4g}",
            ends(found),
            str(found["n"]),
            f"**{claim['verdict']}**",
        )
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def ends(found: Mapping[str, float | None]) -> str:
    """The ends of an interval, or nothing where it has none."""
    return "" if found["low"] is None else f"{found['low']:.4g} to {found['high']:.4g}"


def page(told: Mapping[str, Any]) -> str:
    """All of a results.json that is not in its figures."""
    where = told["environment"]
    took = f"{told['seconds']:.0f} s on {where['device']}, processes: {where['processes']}, torch {where['torch']}"
    small = " Settings for a CPU: too small to say anything about the paper." if told["quick"] else ""
    return f"# {told['experiment']}: {told['question']}\n\n{table(told)}\n{took}.{small}\n"
