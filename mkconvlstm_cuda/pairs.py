"""Weights' gradients of convolutions of few input channels on GPUs: two pixels of a row as one, of all their channels.

Channels-last images [N, C, H, W] are images [N, 2C, H, W/2] without a copy: channel b * C + c of pixel j is channel c
of pixel 2j + b. cuDNN's tiles are fuller then, at the price of some products that nobody needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import layout

# Of convolutions of more than 32 channels.
FEWEST_OUTPUT_CHANNELS, FEWEST_PIXELS = 256, 1 << 15


def pays(shape: Sequence[int], images: tuple[int, int, int], dilation: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the gradient of a weight of ``shape`` (O, C, kh, kw) over ``images`` (N, H, W) is faster from pairs.

    Measured on an H100 in bfloat16, over 20,000 to 740,000 pixels and 128 to 512 outputs: with kernels 5 wide and up to
    32 channels 1.1 to 3 times as fast, with 64 and 256 outputs or more 0.9 to 7 times, but over 20,000 pixels once 0.4,
    with kernels 3 wide and 24 or 32 channels 0.9 to 2 times. 64 channels and kernels 7 wide can take ten times as long.
    """
    outputs, channels, _, kernel = shape
    if dtype not in (torch.float16, torch.bfloat16) or tuple(dilation) != (1, 1) or images[2] % 2:
        return False
    if kernel == 3:
        return 16 < channels <= 32
    large = outputs >= FEWEST_OUTPUT_CHANNELS and math.prod(images) >= FEWEST_PIXELS
    return kernel == 5 and channels <= (64 if large else 32)


def serves(weight: Tensor, images: tuple[int, int, int], dilation: Sequence[int]) -> bool:
    """Whether the gradient can be computed from pairs, and :func:`pays`."""
    return weight.is_cuda and pays(weight.shape, images, dilation, weight.dtype)


def paired(x: Tensor) -> Tensor:
    """``x`` [N, C, H, W], W even, as [N, 2C, H, W/2]: a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).flatten(3).permute(0, 3, 1, 2)


def weight_gradient(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient [O, C, kh, kw] of ``weight`` in a "same" convolution, from x [N, C, H, W] and dy [N, O, H, W].

    Each tap is the sum of two, from the left and from the right pixels of dy's pairs, each rounded to dy's dtype; in
    float16 infinite, or NaN, where one of them passes 65504.
    """
    outputs, channels, height, width = weight.shape
    reach = (width // 2 + 1) // 2  # pairs to each side
    of_pairs = layout.weight_stand_in(dy, (2 * outputs, 2 * channels, height, 2 * reach + 1))
    padding, mask = [height // 2, reach], [False, True, False]
    gradient = torch.ops.aten.convolution_backward(
        paired(dy), paired(x), of_pairs, None, [1, 1], padding, [1, 1], False, [0, 0], 1, mask
    )[1]
    # In a row of taps, pair by pair, pixel b's tap for x's pixel d away lies at 2 * reach + d + b.
    left, right = gradient.permute(0, 2, 3, 1).unflatten(3, (2, -1)).flatten(2, 3).chunk(2)
    first = 2 * reach - width // 2
    taps = left[:, :, first : first + width] + right[:, :, first + 1 : first + 1 + width]
    return taps.permute(0, 3, 1, 2)
