"""Convolutions of few input channels, and gradients of wide weights, on GPUs, from unfolded images.

There the pixels under a row of the kernel are laid out as channels. cuDNN computes convolutions of half types in steps
of many channels, which few leave empty, and gradients of large weights often slowly. With a kernel of kh x kw,
u[y, x, j * C + c] = image[y, x + j - kw // 2, c], zero outside of the image, has kw times as many channels, and the
convolution is one of u with a kernel of kh x 1: the same products in sums of another order. Nothing here is
differentiated by torch's autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import layout

# Measured on an H100 in bfloat16, against cuDNN alone: 1.3 to 5 times as fast within these limits; forward with 32
# channels takes up to four times as long. Gradients of weights 7 to 11 wide, of 16 to 256 channels, 0.9 to 40 times.
MOST_CHANNELS = {"output": 16, "input": 32, "weight": 16}
WIDE, MOST_CHANNELS_OF_WIDE_WEIGHT = 7, 256
FEWEST_OUTPUTS = 1 << 21  # numbers; for fewer, launching another kernel takes as long as what it saves
MULTIPLE = 32  # of the unfolded channels
UNFOLDED_BYTES = {"input": 64 << 20, "weight": 32 << 20}  # of unfolded images, or gradients, at a time; or one image


def unfolded_channels(channels: int, kernel: int) -> int:
    """Channels that ``channels`` of ``kernel`` pixels become; the last of them may be zeros."""
    return -(-channels * kernel // MULTIPLE) * MULTIPLE


def pays(
    shape: Sequence[int],
    images: tuple[int, int, int],
    dilation: Sequence[int],
    dtype: torch.dtype,
    wanted: str = "output",
) -> bool:
    """Whether a convolution of ``images`` (N, H, W) with a weight of ``shape`` (O, C, kh, kw) is faster unfolded.

    ``wanted`` of it is the "output", or the gradient of the "input" or the "weight". Forward, unfolded images must be
    no larger than the outputs; in backward they are made of few images at a time.
    """
    outputs, channels, _, kernel = shape
    pixels = math.prod(images)
    if dtype not in (torch.float16, torch.bfloat16) or tuple(dilation) != (1, 1) or kernel < 3:
        return False
    if outputs * pixels < FEWEST_OUTPUTS or pixels > 1 << 30:  # which the kernels count in 31 bits
        return False
    if wanted == "weight" and kernel >= WIDE:
        return channels <= MOST_CHANNELS_OF_WIDE_WEIGHT
    most_unfolded = 2 * outputs if wanted == "input" else outputs
    return channels <= MOST_CHANNELS[wanted] and unfolded_channels(channels, kernel) <= most_unfolded


def serves(weight: Tensor, images: tuple[int, int, int], dilation: Sequence[int], wanted: str = "output") -> bool:
    """Whether the convolution can be unfolded, and :func:`pays`."""
    return pays(weight.shape, images, dilation, weight.dtype, wanted) and layout.has_kernels(weight)


def unfold(x: Tensor, kernel: int) -> Tensor:
    """``x`` [N, C, H, W] with ``kernel`` pixels of a row as channels: [N, Kp, H, W], channels-last."""
    from .triton_kernels import unfolding as kernels

    pixels = x.permute(0, 2, 3, 1).contiguous()
    out = x.new_empty((*pixels.shape[:3], unfolded_channels(x.shape[1], kernel)))
    with torch.cuda.device_of(x):
        kernels.unfold(pixels, out, kernel)
    return out.permute(0, 3, 1, 2)


def fold(du: Tensor, kernel: int, dx: Tensor) -> None:
    """The transpose of :func:`unfold`: ``dx`` [N, C, H, W], channels-last, from ``du`` [N, Kp, H, W]."""
    from .triton_kernels import unfolding as kernels

    with torch.cuda.device_of(du):
        kernels.fold(du.permute(0, 2, 3, 1).contiguous(), dx.permute(0, 2, 3, 1), kernel)


def unfolded_weight(weight: Tensor) -> Tensor:
    """``weight`` [O, C, kh, kw] for unfolded images, [O, Kp, kh, 1], channels-last."""
    _, channels, _, kernel = weight.shape
    rows = weight.permute(0, 2, 3, 1).flatten(2)
    rows = F.pad(rows, (0, unfolded_channels(channels, kernel) - rows.shape[2]))
    return rows[:, :, None].permute(0, 3, 1, 2)


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient [N, C, H, W] of a "same" convolution's input, channels-last, few images at a time.

    It is a sum of kw parts, each rounded to dy's dtype, in float16 to infinity where one of them passes 65504.

    ``dy`` [N, O, H, W], channels-last; ``weight`` [O, C, kh, kw].
    """
    _, channels, _, kernel = weight.shape
    count, _, *size = dy.shape
    rows = unfolded_weight(weight)
    some = images_at_a_time(dy, rows.shape[1], "input")
    dx = dy.new_empty((count, *size, channels)).permute(0, 3, 1, 2)
    u = layout.stand_in(dy, rows.shape[1], some)
    for dy_of_some, dx_of_some in zip(dy.split(some), dx.split(some), strict=True):
        du = backward(dy_of_some, u[: dy_of_some.shape[0]], rows, [True, False, False])[0]
        fold(du, kernel, dx_of_some)
    return dx


def weight_gradient(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient [O, C, kh, kw] of ``weight`` in a "same" convolution, from x [N, C, H, W] and dy [N, O, H, W].

    Of few images at a time, each time rounded to dy's dtype, in float16 to infinity past 65504, and summed in float32.
    """
    outputs, channels, height, kernel = weight.shape
    unfolded = unfolded_channels(channels, kernel)
    rows = layout.weight_stand_in(dy, (outputs, unfolded, height, 1))
    some = images_at_a_time(dy, unfolded, "weight")
    gradients = (
        backward(dy_of_some, unfold(x_of_some, kernel), rows, [False, True, False])[1]
        for x_of_some, dy_of_some in zip(x.split(some), dy.split(some), strict=True)
    )
    gradient = next(gradients)
    if some < x.shape[0]:
        gradient = sum(gradients, gradient.float()).to(dy.dtype)
    gradient = gradient[:, : kernel * channels, :, 0].unflatten(1, (kernel, channels))
    return gradient.permute(0, 2, 3, 1)


def images_at_a_time(dy: Tensor, unfolded: int, wanted: str) -> int:
    """How many images as large as those of ``dy`` [N, O, H, W] are held with so many ``unfolded`` channels."""
    image_bytes = unfolded * math.prod(dy.shape[2:]) * dy.element_size()
    return min(dy.shape[0], max(1, UNFOLDED_BYTES[wanted] // image_bytes))


def backward(dy: Tensor, u: Tensor, rows: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of ``u`` [N, Kp, H, W] and ``rows`` [O, Kp, kh, 1], as far as ``mask`` asks for each."""
    padding = [rows.shape[2] // 2, 0]
    return torch.ops.aten.convolution_backward(dy, u, rows, None, [1, 1], padding, [1, 1], False, [0, 0], 1, mask)
