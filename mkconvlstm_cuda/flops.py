"""What ``torch.utils.flop_counter`` is to count for the package's own operations, whichever backend computes them.

As torch counts convolutions: two for each product of a direct convolution, zeros of the padding included.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from math import prod

from . import tracing
from .convolution import TransitionWeights

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def products(images: Shape, tensors: Sequence[Shape | None]) -> int:
    """Of "same" convolutions of ``images`` [B, T, C, H, W] by those of ``tensors`` that are weights [O, I, kh, kw]."""
    pixels = prod(images[:2]) * prod(images[3:])
    return 2 * pixels * sum(prod(shape) for shape in tensors if shape is not None and len(shape) == 4)


def before(images: Shape, h_0: Shape | None) -> list[int]:
    """``images`` [B, T, C, H, W] of the steps that have a state before them: without ``h_0`` all but the first."""
    batch, steps, *rest = images
    return [batch, steps - (h_0 is None), *rest]


def sequence_forward(z, hidden, *_, **__) -> int:
    """Of all steps, also of the first one's product with zeros, as ``reference`` computes it."""
    return products(z[0], hidden)


def sequence_backward(gates, h, c, hidden, dilations, mix_tanh, h_0, *_, **__) -> int:
    """Of the gradients of h; those of weights are convolutions of torch's own, which it counts."""
    return products(before(h, h_0), hidden)


def layer(x, z, h_0, c_0, peephole, bias, given, *_, **__) -> int:
    return products(x, given)


def layer_backward(x, z, h_0, c_0, peephole, bias, given, lengths, present, *settings, **_) -> int:
    """Of the gradients of h, and of x and each weight that ``needs`` one; with ``recompute`` of forward once more."""
    _, _, _, dilations, _, _, recompute, *_, needs = settings
    of_hidden = sum(present[-TransitionWeights.tensor_count(len(dilations) // 2) :])
    of_input = len(given) - of_hidden
    inputs, hidden = given[:of_input], given[of_input:]
    needed = [shape if need else None for shape, need in zip(given, needs[6:], strict=True)]
    total = products(before(x, h_0), hidden) + products(before(x, h_0), needed[of_input:])
    total += products(x, needed[:of_input]) + (products(x, inputs) if needs[0] else 0)
    return total + (products(x, given) if recompute else 0)


class Finder:
    """Has :func:`register` run right after the counter is imported, which alone takes longer than this package."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == COUNTER else None
        if spec is not None:
            execute = spec.loader.exec_module

            def and_register(module):
                execute(module)
                register(module)

            spec.loader.exec_module = and_register
        return spec


def register(counter) -> None:
    """Make the formulas known to ``counter``, the module."""
    for formula in (sequence_forward, sequence_backward, layer, layer_backward):
        counter.register_flop_formula(getattr(tracing.operations, formula.__name__))(formula)


def register_when_imported() -> None:
    """:func:`register` now if the counter has been imported, else once it is."""
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, Finder)
