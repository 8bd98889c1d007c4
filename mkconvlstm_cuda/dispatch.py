"""Backends and how one is chosen: each says for a problem either "yes" or why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import aten, cuda_backend, triton_backend


@dataclass(frozen=True)
class Problem:
    """What a backend has to know of one call to say whether it can serve it."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    height: int
    width: int
    hidden_sizes: tuple[int, ...] = ()  # F_r of each branch of the hidden transition
    bottlenecks: bool = False
    mix: bool = False  # a 1x1 mix, after a tanh or not
    live_parts: str | None = None  # parts of the hidden transition that no weight stands for, such as "batch norm"


@dataclass(frozen=True)
class Backend:
    """One implementation of the recurrence.

    ``supports(problem)`` is None for "yes", else the reason why not. ``available()`` is the same for this machine.
    ``forward`` and ``backward`` have the signatures of :func:`aten.forward` and :func:`aten.backward`; the
    ``reference`` backend has neither, since torch differentiates it.
    """

    name: str
    available: Callable[[], str | None]
    supports: Callable[[Problem], str | None]
    forward: Callable | None = None
    backward: Callable | None = None
    adds_bias: bool = False  # whether ``forward`` takes b as one more argument; else it is in z


class Refusal(ValueError):
    """A backend that was named cannot serve the call."""


def _yes(*_) -> None:
    return None


def _weights_only(problem: Problem) -> str | None:
    if problem.live_parts:
        return f"its hidden transition has {problem.live_parts}, which only 'reference' computes"
    return None


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
        Backend("cuda", cuda_backend.available, cuda_backend.supports, cuda_backend.forward, cuda_backend.backward),
        Backend("aten", _yes, _weights_only, aten.forward, aten.backward),
        Backend("reference", _yes, _yes),
    )
}
"""All backends, the one that "auto" likes best first."""


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


def choose(problem: Problem, backend: str = "auto") -> Backend:
    """The backend that serves ``problem``.

    Raises:
        ValueError: there is no backend of that name.
        Refusal: the named one cannot serve; the message has its reason.
    """
    if check_name(backend) != "auto":
        chosen = BACKENDS[backend]
        if reason := refusal(chosen, problem):
            raise Refusal(f"backend: {backend!r} cannot serve this call: {reason}")
        return chosen
    return next(b for b in BACKENDS.values() if refusal(b, problem) is None)
