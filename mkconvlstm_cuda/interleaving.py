"""Branches side by side in every gate: whole tensors of 4F channels, and their parts of 4*F_r (the paper's Fig. 4b)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """``x`` [N, C, H, W] with channels innermost in memory; as it is under vmap, which cannot tell what lies where."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return x
    return x.contiguous(memory_format=torch.channels_last)


def widened(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors with contiguous last dimensions as tensors of the widest elements, up to 16 bytes, that fit them all.

    A copy moves element by element where dimensions are permuted; so it moves up to eight half-precision numbers at
    once. Where autograd or TorchScript has to see the copy, and where nothing fits, ``parts`` themselves.
    """
    size = parts[0].element_size()
    if torch.jit.is_tracing() or (torch.is_grad_enabled() and any(p.requires_grad for p in parts)):
        return parts
    for wide in (torch.complex128, torch.int64, torch.int32):
        many = wide.itemsize // size
        if many > 1 and all(
            p.stride(-1) == 1
            and p.storage_offset() % many == p.shape[-1] % many == 0
            and all(stride % many == 0 for stride in p.stride()[:-1])
            for p in parts
        ):
            return [p.view(wide) for p in parts]
    return parts


def split_gates(values: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """``values`` [4F], gate-major, as one such [4*F_p] for each of ``sizes``."""
    return [part.flatten() for part in values.view(4, -1).split(list(sizes), dim=1)]


def join_gates(parts: Sequence[Tensor]) -> Tensor:
    """Inverse of :func:`split_gates`."""
    return torch.cat([part.view(4, -1) for part in parts], dim=1).flatten()


def narrowed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` seen as ``dtype`` again; on torch 2.11 even a view of the same dtype has no gradient."""
    return t if t.dtype == dtype else t.view(dtype)


def interleave(outputs: Sequence[Tensor]) -> Tensor:
    """Join branch outputs [N, 4*F_r, H, W] gate by gate into [N, 4F, H, W], channels-last (the paper's Fig. 4b)."""
    if len(outputs) == 1:
        return channels_last(outputs[0])  # a convolution of one input channel may answer channels-first
    split = [o.permute(0, 2, 3, 1).unflatten(-1, (4, -1)) for o in outputs]  # [N, H, W, 4, F_r]
    joined = narrowed(torch.cat(tuple(widened(split)), dim=-1), split[0].dtype)
    return joined.flatten(-2).permute(0, 3, 1, 2)


def deinterleave(z: Tensor, sizes: Sequence[int]) -> Iterator[Tensor]:
    """Inverse of :func:`interleave`: [..., 4F, H, W] -> [..., 4*F_r, H, W] for each of ``sizes``, made one by one."""
    if len(sizes) == 1:
        yield z
        return
    for part in z.movedim(-3, -1).unflatten(-1, (4, -1)).split(list(sizes), dim=-1):
        (wide,) = widened([part])
        yield narrowed(wide.flatten(-2).contiguous(), part.dtype).movedim(-1, -3)


def repart(parts: list[Tensor], sizes: Sequence[int], wanted: Sequence[int]) -> list[Tensor]:
    """Parts of ``sizes`` hidden channels each as parts of ``wanted``: the same tensors where nothing changes."""
    return parts if list(sizes) == list(wanted) else list(deinterleave(interleave(parts), wanted))
