"""The ``triton`` backend's entry in the table of backends: imports Triton only where there is a GPU."""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from pathlib import Path

import torch


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, by its own switch."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def installed() -> bool:
    return find_spec("triton") is not None


@functools.cache
def finds_gpu() -> bool:
    return torch.cuda.is_available()


@functools.cache
def broken() -> str | None:
    """Why an installed Triton does not work here; None if it may. Imports it."""
    try:
        from triton import knobs

        from .triton_kernels import launch  # noqa: F401
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return f"triton cannot be imported: {error}"
    folder = Path(knobs.cache.dir)
    if folder.is_dir() and any(folder.iterdir()):
        return None  # read-only, perhaps, but with kernels in it
    existing = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    if not os.access(existing, os.W_OK):
        return f"Triton cannot write to its cache folder {folder}: TRITON_CACHE_DIR may name another"
    return None


def available() -> str | None:
    if not installed():
        return "the package triton is not installed"
    if not finds_gpu() and not interpreted():
        return "torch finds no GPU"
    return broken()


def supports(problem) -> str | None:
    """None where the kernels compute ``problem`` (:class:`dispatch.Problem`), else why not."""
    if problem.device.type != "cuda" and not interpreted():
        return f"it runs on GPUs, and the input is on {problem.device.type}"
    if problem.dtype == torch.float64:
        return "it has no float64"
    if problem.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter computes bfloat16 products wrongly"
    if problem.live_parts:
        return f"its hidden transition has {problem.live_parts}, which only 'reference' computes"
    if problem.bottlenecks:
        return "its hidden transition has 1x1 bottlenecks"
    return too_large(problem.batch, problem.height * problem.width, problem.hidden_channels)


def too_large(batch: int, pixels: int, hidden_channels: int) -> str | None:
    """Why the kernels cannot count a step's ``pixels`` an image; None if they can."""
    if max(batch * pixels, 4 * hidden_channels * pixels) >= 2**31:
        return "an image, or all pixels of a step, would need more than 31 bits to count"
    return None


def forward(z, *args):
    """See :func:`aten.forward`."""
    from .triton_kernels import launch

    with torch.cuda.device_of(z[0]):
        return launch.forward(z, *args)


def backward(gates, *args):
    """See :func:`aten.backward`, but for its last argument, whether the gradient of b is wanted, and None for that."""
    from .triton_kernels import launch

    with torch.cuda.device_of(gates[0]):
        return (*launch.backward(gates, *args[:-1]), None)
