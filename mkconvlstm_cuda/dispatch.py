"""Backends and how one is chosen: each says for a problem either "yes" or why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import aten, cuda_backend, triton_backend
from .convolution import TransitionWeights


@dataclass(frozen=True)
class Problem:
    """What a backend has to know of one call to say whether it can serve it."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    height: int
    width: int
    kernels: tuple[tuple[int, int, int], ...] = ()  # height, width and F_r of each branch of the hidden transition
    plain: bool = True  # no mix, bottlenecks or dilation in the hidden transition, and no peepholes
    bottlenecks: bool = False
    live_parts: str | None = None  # parts of the hidden transition that no weight stands for, such as "batch norm"

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype, hidden: TransitionWeights, peephole: Tensor | None) -> Problem:
        """The problem of ``x`` [B, T, C, H, W] computed in ``dtype`` with a hidden transition that weights express."""
        batch, _, _, height, width = x.shape
        kernels = tuple((*b.weight.shape[2:], b.weight.shape[0] // 4) for b in hidden.branches)
        bottlenecks = any(b.bottleneck is not None for b in hidden.branches)
        dilated = any(tuple(b.dilation) != (1, 1) for b in hidden.branches)
        plain = hidden.mix is None and peephole is None and not bottlenecks and not dilated
        return cls(x.device, dtype, batch, height, width, kernels, plain, bottlenecks)

    @property
    def hidden_channels(self) -> int:
        """F."""
        return sum(channels for _, _, channels in self.kernels)


@dataclass(frozen=True)
class Backend:
    """One implementation of the recurrence.

    ``supports(problem)`` is None for "yes", else the reason why not. ``available()`` is the same for this machine.
    ``fastest(problem)``: whether "auto" takes it before those that come earlier in the table, where it serves.
    ``forward`` and ``backward`` have the signatures of :func:`aten.forward` and :func:`aten.backward`; the
    ``reference`` backend has neither, since torch differentiates it.
    """

    name: str
    available: Callable[[], str | None]
    supports: Callable[[Problem], str | None]
    forward: Callable | None = None
    backward: Callable | None = None
    fastest: Callable[[Problem], bool] = lambda problem: False
    # Whether ``forward`` takes b as one more argument (else it is in z), and ``backward`` whether the gradient of b is
    # wanted, which it returns as well, or None where the gradients of z are still to be summed.
    adds_bias: bool = False


class Refusal(ValueError):
    """A backend that was named cannot serve the call."""


def _yes(*_) -> None:
    return None


def _only_reference(live_parts: str) -> str:
    return f"its hidden transition has {live_parts}, which only 'reference' computes"


def _weights_only(problem: Problem) -> str | None:
    return _only_reference(problem.live_parts) if problem.live_parts else None


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend(
            "triton",
            triton_backend.available,
            triton_backend.supports,
            triton_backend.forward,
            triton_backend.backward,
            adds_bias=True,
        ),
        Backend(
            "cuda",
            cuda_backend.available,
            cuda_backend.supports,
            cuda_backend.forward,
            cuda_backend.backward,
            cuda_backend.fastest,
            adds_bias=True,
        ),
        Backend("aten", _yes, _weights_only, aten.forward, aten.backward),
        Backend("reference", _yes, _yes),
    )
}
"""All backends, the one that "auto" likes best first, but for what ``fastest`` says."""


def names() -> tuple[str, ...]:
    """What ``backend=`` may be."""
    return ("auto", *BACKENDS)


def check_name(backend: str) -> str:
    """``backend`` if there is such a backend.

    Raises:
        ValueError: there is none.
    """
    if backend not in names():
        raise ValueError(f"backend: got {backend!r}, wanted one of {', '.join(map(repr, names()))}")
    return backend


def refusal(backend: Backend, problem: Problem) -> str | None:
    """Why ``backend`` cannot serve ``problem`` here; None if it can."""
    return backend.available() or backend.supports(problem)


def needs_reference() -> str | None:
    """Why what runs now cannot have an operation of ours in it; None if it can."""
    if torch.onnx.is_in_onnx_export():
        return "ONNX knows torch's own operations alone, as 'reference' has them"
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func and forward-mode differentiation know torch's own operations alone, as 'reference' has them"
    return None


def choose(problem: Problem, backend: str = "auto") -> Backend:
    """The backend that serves ``problem``.

    Raises:
        ValueError: there is no backend of that name.
        Refusal: the named one cannot serve; the message has its reason.
    """
    reason = None if backend == "reference" else needs_reference()
    if check_name(backend) != "auto":
        chosen = BACKENDS[backend]
        if reason := reason or refusal(chosen, problem):
            raise Refusal(f"backend: {backend!r} cannot serve this call: {reason}")
        return chosen
    if reason:
        return BACKENDS["reference"]
    serving = [b for b in BACKENDS.values() if refusal(b, problem) is None]
    return next((b for b in serving if b.fastest(problem)), serving[0])


def choose_traced(live_parts: str | None, backend: str) -> Backend:
    """As far as it can be told while torch traces a graph: the reference, or what :func:`choose` will say in there."""
    if reason := needs_reference() or (_only_reference(live_parts) if live_parts else None):
        if check_name(backend) not in ("auto", "reference"):
            raise Refusal(f"backend: {backend!r} cannot serve this call: {reason}")
        return BACKENDS["reference"]
    return BACKENDS["reference"] if backend == "reference" else replace(BACKENDS["aten"], name=check_name(backend))
