"""The ``cuda`` backend: the loop of ``aten``, with each step's gates and state update in one CUDA kernel a part."""

from __future__ import annotations

from . import aten, compiled, library


def available() -> str | None:
    """None where the CUDA library is loaded, else why it is not."""
    return library.load("cuda")


def supports(problem) -> str | None:
    """None where the kernels compute ``problem`` (:class:`dispatch.Problem`), else why not."""
    if problem.device.type != "cuda":
        return f"it runs on NVIDIA GPUs, and the input is on {problem.device.type}"
    if problem.live_parts:
        return f"its hidden transition has {problem.live_parts}, which only 'reference' computes"
    return None


def forward(*args):
    """See :func:`aten.forward`."""
    return aten.forward(*args, gate_step=compiled.gate_step)


def backward(*args):
    """See :func:`aten.backward`."""
    return aten.backward(*args, gate_step_backward=compiled.gate_step_backward)
