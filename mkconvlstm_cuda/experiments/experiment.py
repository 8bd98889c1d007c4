"""What an experiment is: settings, independent runs, claims judged from them, figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .claims import Claim

Settings = Mapping[str, Any]
"""JSON values. Always has `seeds`, a list of ints, and `variants`, {name: options of this variant}."""


@dataclass(frozen=True)
class Measured:
    """What one run, of one variant with one seed, found: `numbers` are JSON values, `tensors` what figures are drawn
    from, on any device."""

    numbers: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Results(dict[str, list[Measured]]):
    """What the runs found: {variant: one `Measured` a seed, in the order of `settings["seeds"]`}."""

    def over_seeds(self, variant: str, number: str) -> np.ndarray:
        """`number` of the runs of `variant`, [seeds] float64."""
        return np.array([run.numbers[number] for run in self[variant]], dtype=float)


Progress = Callable[[float], None]
"""Called with the share of a run that is done, 0 to 1."""


@dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments.

    Attributes:
        name: on the command line.
        question: what it is about, in a line.
        full, quick: settings for a GPU and for a minute on a CPU.
        measure: `measure(settings, variant, seed, device, progress)` does one run; runs know nothing of each other,
            may be shared out to several processes, and a run that is done is not done again. `seed` decides weights
            and data; the same variant and seed on the same machine find the same.
        judge: `judge(settings, results)` tells what has become of the paper's claims.
        draw: `draw(settings, results, folder)` writes figures and gives their paths.
        method: how it is done and where it departs from the paper, in Markdown.
    """

    name: str
    question: str
    full: Settings
    quick: Settings
    measure: Callable[[Settings, str, int, torch.device, Progress], Measured]
    judge: Callable[[Settings, Results], list[Claim]]
    draw: Callable[[Settings, Results, Path], list[Path]]
    method: str = ""
