"""What ``torch.utils.flop_counter`` is to count for the package's own operations, whichever backend computes them.

As torch counts convolutions: two for each product of a direct convolution, zeros of the padding included.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch.utils.flop_counter import register_flop_formula

from . import tracing
from .convolution import TransitionWeights

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
    """Of all steps, by the weights of both transitions."""
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


for _formula in (sequence_forward, sequence_backward, layer, layer_backward):
    register_flop_formula(getattr(tracing.operations, _formula.__name__))(_formula)
