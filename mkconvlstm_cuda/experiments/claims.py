"""Means over seeds with their intervals, and verdicts by rules that stand before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "undecided"


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values and the 95% interval of the mean by Student's t; of one value, the interval has no ends."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Of one value a seed. Raises ValueError if there is none, or one that is not finite."""
    x = np.asarray(values, dtype=float)
    if not x.size or not np.isfinite(x).all():
        raise ValueError(f"values: got {list(values)}, wanted finite numbers, at least one")
    if x.size == 1:
        return Interval(float(x[0]), -math.inf, math.inf, 1)
    from scipy.stats import t

    half = t.ppf(0.975, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), x.size)


@dataclass(frozen=True)
class Claim:
    """What the paper says, and what came out.

    Attributes:
        words: of the paper, shortened.
        where: section, figure or table.
        measured: the quantity that decides, in words, with its unit.
        values: the quantity, one a seed.
        interval: of its mean.
        rule: how the verdict follows, in words.
        verdict: "reproduced", "not reproduced" or "undecided".
    """

    words: str
    where: str
    measured: str
    values: tuple[float, ...]
    interval: Interval
    rule: str
    verdict: str

    @classmethod
    def positive(cls, words: str, where: str, measured: str, values: Sequence[float]) -> Claim:
        """A claim that comes down to the sign of a quantity: judged by whether its 95% interval reaches 0."""
        found = interval(values)
        verdict = REPRODUCED if found.low > 0 else NOT_REPRODUCED if found.high < 0 else UNDECIDED
        rule = f"{REPRODUCED} if the 95% interval lies above 0, {NOT_REPRODUCED} if below, else {UNDECIDED}"
        return cls(words, where, measured, tuple(map(float, values)), found, rule, verdict)

    @classmethod
    def within(cls, words: str, where: str, measured: str, values: Sequence[float], low: float, high: float) -> Claim:
        """A claim of a number, which the paper gives rounded: judged by whether the 95% interval (the number itself
        where it is counted and no seed changes it) lies in [low, high], the numbers that round to it."""
        found = interval(values)
        if len(set(values)) == 1:
            found = Interval(found.mean, found.mean, found.mean, found.n)
        inside, outside = low <= found.low <= found.high <= high, found.high < low or found.low > high
        verdict = REPRODUCED if inside else NOT_REPRODUCED if outside else UNDECIDED
        rule = (
            f"{REPRODUCED} if the 95% interval lies in [{low:g}, {high:g}], {NOT_REPRODUCED} if outside, "
            f"else {UNDECIDED}"
        )
        return cls(words, where, measured, tuple(map(float, values)), found, rule, verdict)

    def as_json(self) -> dict[str, Any]:
        """All of it in plain numbers; ends that are not there are None."""
        told = {**asdict(self), "values": list(self.values)}
        told["interval"] = {k: v if math.isfinite(v) else None for k, v in told["interval"].items()}
        return told
