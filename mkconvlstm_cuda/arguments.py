"""Checks of what modules are built from."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral


def is_integer(value, least: int | None = None) -> bool:
    """Whether ``value`` is an integer, Python's or NumPy's and no bool, of at least ``least``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and (least is None or value >= least)


def check_flag(name: str, value) -> bool:
    """``value``.

    Raises:
        TypeError: it is no bool.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, wanted True or False")
    return value


def as_pair(size: int | Sequence[int], name: str = "kernel size") -> tuple[int, int]:
    """(kh, kw) of an int or a pair of ints; ``name`` is for the error.

    Raises:
        TypeError: it is neither.
    """
    pair = (size, size) if is_integer(size) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(pair) != 2 or not all(map(is_integer, pair)):
        raise TypeError(f"{name}: got {size!r}, wanted an int or a pair of ints")
    return int(pair[0]), int(pair[1])
