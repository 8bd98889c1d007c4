"""Processes forked from one that has computed on a CPU: GNU OpenMP's threads stay behind, and torch waits for them."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

_has_computed = False
_stranded = False


def _after_fork() -> None:
    global _stranded
    _stranded = _has_computed


if hasattr(os, "register_at_fork"):  # where there is fork
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def has_gnu_openmp() -> bool:
    """Whether this process runs GNU's OpenMP, as torch's own wheels do; others start new threads after a fork."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "libgomp" in maps.read_text()


def check_fork(device: torch.device) -> None:
    """Called before anything is computed on ``device``.

    Raises:
        RuntimeError: it would wait forever.
    """
    global _has_computed
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return
    if _stranded and has_gnu_openmp():
        raise RuntimeError(
            "this process was forked from one that has computed with several threads, and torch would wait for them "
            "forever: call torch.set_num_threads(1) in it first, or start it by multiprocessing's 'spawn'"
        )
    _has_computed = True
