"""What CPUs have beyond torch's own convolutions: weights laid out once for many uses, and the Fourier transform.

Nothing here is differentiated by torch's autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import fourier, library

LEAST_PACKED_USES = 3  # to pack a weight takes as long as what that saves one or two convolutions


@dataclass(frozen=True)
class PackedConvolution:
    """A "same" convolution by oneDNN with its weight in the layout that oneDNN wants for certain images."""

    weight: Tensor  # opaque
    bias: Tensor | None
    padding: list[int]
    dilation: list[int]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, self.padding, [1, 1], self.dilation, 1, "none", [], ""
        )


def prepare(
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    dilation: Sequence[int],
    images: tuple[int, int, int],
    uses: int,
    gradient: bool = False,
) -> Callable[[Tensor], Tensor] | None:
    """The "same" convolution with ``weight`` [O, C, kh, kw] and ``bias`` [O], ``uses`` times on ``images`` (N, H, W).

    With ``gradient`` its input's gradient from [N, O, H, W] in its place. None where torch's own is as fast.
    """
    if (m := tile_size(weight, dilation, images, uses)) is not None:
        return fourier.FourierConvolution(weight, bias, m, keep=uses > 1, gradient=gradient)
    if uses < LEAST_PACKED_USES or 0 in images or not runs_in_onednn(weight):
        return None
    if gradient:  # the convolution with the mirrored weight, channels exchanged
        weight = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
    shape = [images[0], weight.shape[1], *images[1:]]
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, [1, 1], list(dilation), 1, shape)
    return PackedConvolution(packed, bias, padding, list(dilation))


def tile_size(weight: Tensor, dilation: Sequence[int], images: tuple[int, int, int], uses: int = 1) -> int | None:
    """Outputs along a tile's side where the Fourier transform is faster for ``weight`` [O, C, kh, kw], else None."""
    outputs, channels, height, width = weight.shape
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or height != width or tuple(dilation) != (1, 1):
        return None
    if torch.compiler.is_compiling() or library.load("cpu") is not None or not exact_products():
        return None
    return fourier.plan(fourier.Problem(images, channels, outputs, height, uses))


def exact_products() -> bool:
    """Whether torch multiplies float32 matrices exactly on CPUs, as by default; convolutions have another switch."""
    switches = (torch.backends.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
    return all(precision in ("none", "ieee") for precision in switches)


def runs_in_onednn(weight: Tensor) -> bool:
    """Whether torch computes convolutions with ``weight`` in oneDNN."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return weight.dtype == torch.float32
