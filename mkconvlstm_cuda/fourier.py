"""Convolutions with large kernels through the discrete Fourier transform: several times fewer multiplications.

Images are cut into tiles that overlap (overlap-save): ``P x P`` pixels of input give ``m x m`` outputs, P = m + K - 1,
that no wrap-around has reached. On a tile, y[p] = sum_k w[k] x[p + k] is Y = X * conj(W): a product of complex
matrices for each of the P * P / 2 + 2 frequencies (P even) that tell the rest, as pixels are real. The transforms are
the CPU library's, the products ``torch.bmm``. Rounding errors are smaller than a direct convolution's, whose sums are
longer; they are relative to what is largest in a tile, and a pixel that is not finite spoils its tile.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_SIDE = 32  # of the CPU library
CHUNK_BYTES = 16 << 20  # of a weight's spectrum at a time, where it is not kept
KEPT_BYTES = 32 << 20  # of a spectrum that is kept; a larger one is read from memory at each use, which takes as long
# What things cost, in multiplications and additions of a direct convolution; fitted on two cores with AVX-512. A number
# of a spectrum costs its transform and, more, memory that has not been touched before.
FLOPS_PER_PRODUCT, FLOPS_PER_NUMBER, FLOPS_PER_READ, FLOPS_PER_CALL = 1.3, 300, 40, 20_000_000


@dataclass(frozen=True)
class Problem:
    """``images`` (N, H, W) of C ``channels`` to ``outputs``, "same", K x K ``kernel``; its weight serves ``uses``."""

    images: tuple[int, int, int]
    channels: int
    outputs: int
    kernel: int
    uses: int = 1

    @property
    def direct_flops(self) -> int:
        return 2 * math.prod(self.images) * self.kernel**2 * self.channels * self.outputs

    def flops(self, m: int) -> float:
        """What a convolution, its input's or its weight's gradient costs with ``m`` x ``m`` outputs a tile."""
        count, height, width = self.images
        side = m + self.kernel - 1
        numbers = 2 * frequencies(side)
        tiles = count * math.ceil(height / m) * math.ceil(width / m)
        weights = self.channels * self.outputs
        products = FLOPS_PER_PRODUCT * 4 * numbers * tiles * weights
        computed = FLOPS_PER_NUMBER * numbers * (tiles * (self.channels + self.outputs) + weights / self.uses)
        return products + computed + FLOPS_PER_READ * numbers * weights + FLOPS_PER_CALL


def frequencies(side: int) -> int:
    """How many of ``side`` * ``side`` frequencies tell the rest."""
    return (side**2 + (1 if side % 2 else 4)) // 2


@functools.lru_cache
def plan(problem: Problem) -> int | None:
    """Outputs m along the side of a tile, or None where the direct convolution is cheaper."""
    if 0 in problem.images:
        return None
    fits = range(2, min(max(problem.images[1:]), MOST_SIDE + 1 - problem.kernel) + 1)
    if problem.uses > 1:
        weights = problem.channels * problem.outputs
        fits = [m for m in fits if 8 * frequencies(m + problem.kernel - 1) * weights <= KEPT_BYTES]
    best = min(fits, key=problem.flops, default=None)
    return best if best and problem.flops(best) < problem.direct_flops else None


def count_tiles(images: Tensor, m: int) -> int:
    return images.shape[0] * math.ceil(images.shape[2] / m) * math.ceil(images.shape[3] / m)


def analyze(images: Tensor, m: int, before: int, extent: int, side: int, spectrum: Tensor) -> None:
    """Fill ``spectrum`` [frequencies, 2, tiles, C], any strides but the last, from ``images`` [N, C, H, W].

    Tiles of ``side`` are ``m`` pixels apart and begin ``before`` pixels up and left; all but the first ``extent``
    pixels of each, along both axes, are taken for zero.
    """
    if images.stride(1) != 1:
        images = images.contiguous(memory_format=torch.channels_last)
    torch.ops.mkconvlstm.fourier_analyze(images, m, before, extent, side, spectrum)


def chunks(outputs: int, inputs: int, side: int) -> tuple[int, list[slice]]:
    """``outputs`` in slices whose spectra, with ``inputs`` each, keep to CHUNK_BYTES; and the most in a slice."""
    most = min(outputs, max(32, CHUNK_BYTES // (8 * frequencies(side) * inputs) // 32 * 32))
    return most, [slice(first, min(first + most, outputs)) for first in range(0, outputs, most)]


class FourierConvolution:
    """The "same" convolution with ``weight`` [O, C, K, K]; with ``gradient`` that of its input, [N, O, H, W] -> C.

    With ``keep`` the weight's spectrum is kept for many uses, else computed in each, a chunk of outputs at a time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, m: int, keep: bool, gradient: bool = False):
        self.kernel, self.m, self.bias = weight.shape[2], m, None if bias is None else bias.contiguous()
        self.side = m + self.kernel - 1
        if gradient:  # the mirrored weight, channels-last
            self.taps = weight.permute(0, 2, 3, 1).contiguous().flip(1, 2).permute(0, 3, 1, 2)
        else:
            self.taps = weight.transpose(0, 1)
        self.inputs, self.outputs = self.taps.shape[:2]
        self.most, self.slices = chunks(self.outputs, self.inputs, self.side)
        self.kept = None
        if keep:
            self.most, self.slices = self.outputs, [slice(0, self.outputs)]
            self.kept = self.spectrum(self.slices[0], self.buffer())

    def buffer(self) -> Tensor:
        return self.taps.new_empty(frequencies(self.side) * self.inputs * 2 * self.most)

    def spectrum(self, part: slice, buffer: Tensor) -> Tensor:
        """[frequencies, inputs, 2 * outputs], real and imaginary part, for the outputs in ``part``, in ``buffer``."""
        taps = self.taps[:, part]
        shape = (frequencies(self.side), self.inputs, 2, taps.shape[1])
        spectrum = buffer[: math.prod(shape)].view(shape)
        analyze(taps, self.kernel, 0, self.kernel, self.side, spectrum.transpose(1, 2))
        return spectrum.flatten(2)

    def __call__(self, x: Tensor) -> Tensor:
        seen = x.new_empty((frequencies(self.side), 2, count_tiles(x, self.m), self.inputs))
        analyze(x, self.m, self.kernel // 2, self.side, self.side, seen)
        out = x.new_empty((x.shape[0], *x.shape[2:], self.outputs)).permute(0, 3, 1, 2)
        buffer = self.buffer() if self.kept is None else None
        for part in self.slices:
            w = self.spectrum(part, buffer) if self.kept is None else self.kept
            y = torch.bmm(seen.flatten(1, 2), w).unflatten(1, (2, -1)).unflatten(3, (2, -1))
            bias = None if self.bias is None else self.bias[part]
            torch.ops.mkconvlstm.fourier_synthesize(y.transpose(2, 3), bias, self.m, self.side, out[:, part])
        return out


def weight_gradient(x: Tensor, dy: Tensor, kernel: int, m: int) -> Tensor:
    """dL/dw [O, C, K, K] = sum_p dy[p] x[p + k] of a "same" convolution, from x [N, C, H, W] and dy [N, O, H, W]."""
    channels, outputs, side = x.shape[1], dy.shape[1], m + kernel - 1
    count = count_tiles(x, m)
    seen, wanted = (x.new_empty((frequencies(side), count, 2, size)) for size in (channels, outputs))
    analyze(x, m, kernel // 2, side, side, seen.transpose(1, 2))
    analyze(dy, m, 0, m, side, wanted.transpose(1, 2))
    gradient = x.new_empty((outputs, kernel, kernel, channels)).permute(0, 3, 1, 2)
    most, slices = chunks(outputs, 2 * channels, side)
    buffer = x.new_empty(frequencies(side) * most * 4 * channels)
    for part in slices:
        dy_part = wanted[..., part].flatten(2).mT
        shape = (*dy_part.shape[:2], 2 * channels)
        products = torch.bmm(dy_part, seen.flatten(2), out=buffer[: math.prod(shape)].view(shape))
        products = products.unflatten(1, (2, -1)).unflatten(3, (2, -1)).permute(0, 3, 1, 2, 4)
        torch.ops.mkconvlstm.fourier_synthesize(products, None, kernel, side, gradient[part])
    return gradient
