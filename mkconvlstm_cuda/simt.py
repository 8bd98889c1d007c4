"""The recurrence in float64 and full-precision float32 on any NVIDIA GPU: CUDA kernels without tensor cores.

A step is one kernel in each direction; see ``csrc/simt``. Here their weights are packed and their memory is allocated.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .convolution import TransitionWeights, tensor_cores_allowed, whole_bias


def refusal(parts: Sequence[Tensor], hidden: TransitionWeights) -> str | None:
    """None where the kernels are to compute the recurrence over ``parts`` [B, T, 4*F_r, H, W], else why not."""
    dtype = parts[0].dtype
    if dtype not in (torch.float64, torch.float32):
        return f"{dtype} is neither float64 nor float32"
    if dtype == torch.float32 and tensor_cores_allowed(dtype):
        return "torch allows TF32 for convolutions: tensor cores are faster"
    if hidden.mix is not None or any(b.bottleneck is not None for b in hidden.branches):
        return "the hidden transition has 1x1 convolutions"
    batch, _, _, height, width = parts[0].shape
    branches = zip(hidden.sizes, kernels_of(hidden), strict=True)
    return plan_refusal(batch, height, width, tuple((size, *kernel) for size, kernel in branches))


@functools.lru_cache(maxsize=256)
def plan_refusal(batch: int, height: int, width: int, branches: tuple[tuple[int, ...], ...]) -> str | None:
    from . import _C

    try:
        _C.plan_simt(batch=batch, height=height, width=width, branches=branches)
    except ValueError as error:
        return str(error)
    return None


def kernels_of(hidden: TransitionWeights) -> list[tuple[int, int, int, int]]:
    """Height, width and dilations of each branch's kernel."""
    return [(*b.weight.shape[2:], *b.dilation) for b in hidden.branches]


def pack_forward(weight: Tensor) -> Tensor:
    """``weight`` [4*F_r, F, kh, kw] as [taps, F, F_r, 4], F and F_r padded with zeros to blocks: [taps, F', 4*F_r']."""
    from . import _C

    taps = weight.unflatten(0, (4, -1)).permute(3, 4, 2, 1, 0)
    taps = F.pad(taps, (0, 0, *padding(taps.shape[3], _C.SIMT_LANES), *padding(taps.shape[2], _C.SIMT_DEPTH)))
    return taps.contiguous().flatten(3).flatten(0, 1)


def pack_backward(weight: Tensor) -> Tensor:
    """``weight`` [4*F_r, F, kh, kw] as [taps in reverse, 4*F_r', F'], padded as forward's.

    Within a block of F' the columns that one thread takes, SIMT_LANES apart, follow one another.
    """
    from . import _C

    block = (_C.SIMT_COLUMNS, _C.SIMT_LANES)
    taps = weight.flip(2, 3).permute(2, 3, 0, 1)
    taps = F.pad(taps, (*padding(taps.shape[3], block[0] * block[1]), *padding(taps.shape[2], _C.SIMT_DEPTH)))
    return taps.unflatten(3, (-1, *block)).transpose(-1, -2).contiguous().flatten(3).flatten(0, 1)


def padding(size: int, block: int) -> tuple[int, int]:
    """Zeros before and after ``size`` that complete its last block."""
    return 0, -size % block


def in_memory_order(states: Tensor) -> Tensor:
    """``states`` [B, T, C, H, W] as [T, B, H, W, C]: a view where they lie so in memory."""
    return states.permute(1, 0, 3, 4, 2)


def pixels(state: Tensor | None) -> Tensor | None:
    """``state`` [B, F, H, W] as contiguous [B, H, W, F]."""
    return None if state is None else state.permute(0, 2, 3, 1).contiguous()


def forward(
    z: Sequence[Tensor],
    hidden: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    output_peephole: str,
    keep: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence forward; see :func:`mkconvlstm_cuda.ops.sequence_forward`."""
    batch, steps, _, height, width = z[0].shape
    state = (batch, height, width, sum(hidden.sizes))
    h = z[0].new_empty((batch, steps, state[-1], height, width))
    c = z[0].new_empty((steps if keep else 1, *state))
    bias = whole_bias(hidden, bias)
    torch.ops.mkconvlstm.simt_forward(
        list(map(in_memory_order, z)),
        [pack_forward(b.weight) for b in hidden.branches],
        sum(kernels_of(hidden), ()),
        pixels(h_0),
        pixels(c_0),
        None if bias is None else bias.to(h.dtype),
        None if peephole is None else peephole.contiguous(),
        output_peephole == "current",
        keep,
        z[0].new_empty((2, *state)),
        h,
        c,
    )
    return h, c.permute(1, 0, 4, 2, 3)


def backward(
    gates: Sequence[Tensor],
    h: Tensor,
    c: Tensor,
    hidden: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    output_peephole: str,
    dh: Tensor | None,
    dc_n: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """The recurrence backward; see :func:`mkconvlstm_cuda.ops.sequence_backward`."""
    batch, _, channels, height, width = h.shape
    dc = h.new_empty((batch, height, width, channels))
    dh_0 = None if h_0 is None else torch.empty_like(dc)
    torch.ops.mkconvlstm.simt_backward(
        list(map(in_memory_order, gates)),
        [pack_backward(b.weight) for b in hidden.branches],
        sum(kernels_of(hidden), ()),
        pixels(c_0),
        in_memory_order(c).contiguous(),
        None if peephole is None else peephole.contiguous(),
        output_peephole == "current",
        dh,
        pixels(dc_n),
        None if lengths is None else lengths.contiguous(),
        dh_0,
        dc,
    )
    return None if dh_0 is None else dh_0.permute(0, 3, 1, 2), dc.permute(0, 3, 1, 2)
