"""The recurrence in float64 and full-precision float32 on any NVIDIA GPU: CUDA kernels without tensor cores.

A step is one kernel in each direction; see ``csrc/simt``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .convolution import TransitionWeights, tensor_cores_allowed
from .step import Family, padding, shape_refusal


def refusal(parts: Sequence[Tensor], hidden: TransitionWeights) -> str | None:
    """None where the kernels are to compute the recurrence over ``parts`` [B, T, 4*F_r, H, W], else why not."""
    dtype = parts[0].dtype
    if dtype not in (torch.float64, torch.float32):
        return f"{dtype} is neither float64 nor float32"
    if dtype == torch.float32 and tensor_cores_allowed(dtype):
        return "torch allows TF32 for convolutions: tensor cores are faster"
    return shape_refusal(parts, hidden, plan_refusal)


def fastest(problem) -> bool:
    """Whether these kernels compute ``problem`` (:class:`dispatch.Problem`) faster than Triton's.

    Measured on an H100 in full float32, paper_mk35's layer takes half the time; smaller ones have not been timed.
    """
    if problem.batch == 0 or problem.dtype != torch.float32 or tensor_cores_allowed(problem.dtype) or not problem.plain:
        return False
    branches = tuple((channels, *kernel, 1, 1) for *kernel, channels in problem.kernels)
    return plan_refusal(problem.batch, problem.height, problem.width, branches) is None


@functools.lru_cache(maxsize=256)
def plan_refusal(batch: int, height: int, width: int, branches: tuple[tuple[int, ...], ...]) -> str | None:
    from . import _C

    try:
        _C.plan_simt(batch=batch, height=height, width=width, branches=branches)
    except ValueError as error:
        return str(error)
    return None


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


_family = Family("simt", pack_forward, pack_backward)
forward = _family.forward
backward = _family.backward
