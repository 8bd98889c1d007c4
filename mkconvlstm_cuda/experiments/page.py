"""Results as Markdown, for people: of one experiment, and a page of them all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .claims import NOT_REPRODUCED, REPRODUCED, UNDECIDED
from .experiment import Experiment

INTRODUCTION = """# The paper's experiments, on data that anyone has

What Agethen & Hsu say, beside what came out here. Each experiment trains every variant with several seeds; variants
with the same seed see the same data. A claim is put as one number a seed, and judged by a rule that is written in the
code before anything is trained: it is *reproduced* if the 95% interval of the mean over seeds (Student's t) lies on
the claim's side, *not reproduced* if it lies on the other, and *undecided* if it reaches both. Where many claims are
judged, one in twenty may come out wrong by chance.

The data are generated: moving digits from the 1797 handwritten ones that scikit-learn carries, and stick figures. The
paper's own data sets are not needed. Every table below is written by `mkconvlstm experiment`, from the JSON beside
the figures.

    pip install "mkconvlstm_cuda[experiments]"
    mkconvlstm experiment --list
    mkconvlstm experiment fig3-speed                 # full size, on a GPU; --quick: about a minute on a CPU
    mkconvlstm experiment fig3-speed --resume        # keeps the runs that are done
    torchrun --nproc-per-node 8 --no-python mkconvlstm experiment fig3-speed    # runs shared out to 8 GPUs

Under torchrun the independent runs, one for each variant and seed, are shared out, and each is trained whole by one
process. `--set 'seeds=[0,1,2,3,4,5,6,7]'` takes more seeds, with `--resume` in addition to those that are done; to go
on until a claim comes out as hoped would not be a test.
"""


def table(told: Mapping[str, Any]) -> str:
    """The claims of a results.json as a Markdown table: the paper's words, what was measured, what came out."""
    columns = ("the paper, in short", "measured", "mean", "95% interval", "seeds", "verdict")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for claim in told["claims"]:
        found = claim["interval"]
        cells = (
            f"{claim['words']} ({claim['where']})",
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


def origin(told: Mapping[str, Any]) -> str:
    """Where a results.json comes from."""
    where = told["environment"]
    workers = "" if where["processes"] == 1 else f", {where['processes']} processes"
    small = " Small, as with `--quick`: a full run may decide otherwise." if told["quick"] else ""
    return f"`{told['command']}` on {where['device']}{workers}, torch {where['torch']}.{small}"


def section(told: Mapping[str, Any], method: str, folder: str = "") -> str:
    """All of a results.json; figures lie in `folder`, relative to the page."""
    pictures = "\n\n".join(f"![{Path(name).stem}]({folder}{name})" for name in told["figures"])
    parts = (f"## {told['experiment']}: {told['question']}", method, pictures, table(told), origin(told))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def text(folder: Path, experiments: Iterable[Experiment]) -> str:
    """The page of all results in `folder`/NAME/results.json, to stand beside that folder.

    Raises:
        ValueError: there are none, or a file is damaged.
    """
    heads, sections = [], []
    for experiment in experiments:
        path = folder / experiment.name / "results.json"
        if not path.is_file():
            heads.append(f"| {experiment.name} | {experiment.question} | not run yet | | |")
            continue
        try:
            told = json.loads(path.read_text())
            count = Counter(claim["verdict"] for claim in told["claims"])
            sections.append(section(told, experiment.method, f"{folder.name}/{experiment.name}/"))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"page: {path} is damaged, or holds no results of an experiment") from error
        counts = " | ".join(str(count[verdict]) for verdict in (REPRODUCED, NOT_REPRODUCED, UNDECIDED))
        heads.append(f"| {experiment.name} | {experiment.question} | {counts} |")
    if not sections:
        raise ValueError(f"page: there is no NAME/results.json of an experiment in {folder}")
    columns = ("experiment", "question", REPRODUCED, NOT_REPRODUCED, UNDECIDED)
    summary = "\n".join([f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|", *heads]) + "\n"
    return "\n".join([INTRODUCTION, summary, *sections])
