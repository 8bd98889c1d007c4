"""The recurrence on the tensor cores of any NVIDIA GPU from sm_80 on: float16, bfloat16, and float32 as TF32.

A step is one kernel in each direction; see ``csrc/sm80``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .convolution import TransitionWeights, tensor_cores_allowed
from .step import Family, padding, shape_refusal

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refusal(parts: Sequence[Tensor], hidden: TransitionWeights) -> str | None:
    """None where the kernels are to compute the recurrence over ``parts`` [B, T, 4*F_r, H, W], else why not."""
    dtype = parts[0].dtype
    if dtype not in DTYPES:
        return f"tensor cores do not compute in {dtype}"
    if not tensor_cores_allowed(dtype):
        return "torch does not allow TF32 for convolutions"
    if any(p.data_ptr() % 8 for p in parts):
        return "pre-activations do not begin at multiples of 8 bytes"
    limits = device_limits(parts[0].device)
    if isinstance(limits, str):
        return limits
    return shape_refusal(parts, hidden, functools.partial(plan_refusal, dtype.itemsize, *limits))


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int] | str:
    """Multiprocessors, and bytes of shared memory that a block may have; or why the kernels do not run there."""
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return "its tensor cores are those of sm_80 and newer"
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


@functools.lru_cache(maxsize=256)
def plan_refusal(
    element_bytes: int,
    multiprocessors: int,
    shared_memory: int,
    batch: int,
    height: int,
    width: int,
    branches: tuple[tuple[int, ...], ...],
) -> str | None:
    from . import _C

    limits = {"multiprocessors": multiprocessors, "shared_memory": shared_memory}
    try:
        _C.plan_sm80(batch=batch, height=height, width=width, branches=branches, element_bytes=element_bytes, **limits)
    except ValueError as error:
        return str(error)
    return None


def pack_forward(weight: Tensor) -> Tensor:
    """``weight`` [4*F_r, F, kh, kw]: columns are gates, a block of them the four gates of some channels; F is depth."""
    from . import _C

    channels = _C.STEP_COLUMNS // 4
    columns = weight.unflatten(0, (4, -1))
    columns = F.pad(columns, (0, 0, 0, 0, 0, 0, *padding(columns.shape[1], channels)))
    return pack(columns.unflatten(1, (-1, channels)).transpose(0, 1).flatten(1, 2))


def pack_backward(weight: Tensor) -> Tensor:
    """``weight`` [4*F_r, F, kh, kw]: columns are hidden channels, and gates are the depth; taps are in reverse."""
    from . import _C

    columns = weight.flip(2, 3).transpose(0, 1)
    columns = F.pad(columns, (0, 0, 0, 0, 0, 0, *padding(columns.shape[0], _C.STEP_COLUMNS)))
    return pack(columns.unflatten(0, (-1, _C.STEP_COLUMNS)))


def pack(columns: Tensor) -> Tensor:
    """``columns`` [blocks, STEP_COLUMNS, depth, kh, kw] as [blocks, slices * taps, STEP_COLUMNS, slice]."""
    from . import _C

    depth = _C.SM80_ROW_BYTES // columns.dtype.itemsize
    columns = F.pad(columns, (0, 0, 0, 0, *padding(columns.shape[2], depth))).unflatten(2, (-1, depth))
    packed = columns.permute(0, 2, 4, 5, 1, 3).contiguous().flatten(1, 3)
    return round_to_tf32(packed) if packed.dtype == torch.float32 else packed


def round_to_tf32(x: Tensor) -> Tensor:
    """``x`` float32 to the nearest with 10 bits of mantissa, ties away from zero, as the GPU's conversion has it."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def aligned(dtype: torch.dtype) -> int:
    """Elements at multiples of which a pixel's hidden states begin."""
    from . import _C

    return _C.SM80_CHUNK_BYTES // dtype.itemsize


_family = Family("sm80", pack_forward, pack_backward, aligned)
forward = _family.forward
backward = _family.backward
