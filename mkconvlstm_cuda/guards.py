"""Memory that gives wrong accesses away: everything that is allocated holds NaN, between zones of NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

GUARD_BYTES = 512  # before and after each tensor; a multiple of every alignment that torch's allocators keep to

# Every way by which this package allocates what its kernels write, and what the memory then holds.
ALLOCATORS: tuple[tuple[object, str, float | None], ...] = (
    (torch, "empty", None),
    (torch, "empty_like", None),
    (torch, "empty_strided", None),
    (torch, "zeros", 0.0),
    (torch, "zeros_like", 0.0),
    (Tensor, "new_empty", None),
    (Tensor, "new_zeros", 0.0),
)


class Guards:
    """The zones around all tensors that were allocated within :func:`guarded`."""

    def __init__(self):
        self.zones: list[Tensor] = []

    def broken(self) -> int:
        """How many zones somebody has written to since."""
        count = 0
        for device in {zone.device for zone in self.zones}:  # one transfer for each
            count += int(torch.stack([(~z.isnan()).any() for z in self.zones if z.device == device]).sum())
        return count

    def allocate(self, like: Tensor, device: torch.device, fill: float | None) -> Tensor:
        """A tensor of the sizes, strides and dtype of ``like`` between two zones; full of NaN, or of ``fill``."""
        extent = sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True)) + 1
        extent, margin = extent if like.numel() else 0, GUARD_BYTES // like.element_size()
        memory = torch.full((margin + extent + margin,), float("nan"), dtype=like.dtype, device=device)
        if fill is not None:
            memory[margin : margin + extent] = fill
        self.zones += [memory[:margin], memory[margin + extent :]]
        # Not a view: what is allocated may become the output of an autograd Function.
        inner = torch.tensor([], dtype=like.dtype, device=device)
        return inner.set_(memory.untyped_storage(), margin, like.shape, like.stride())

    def guarding(self, allocator: Callable[..., Tensor], fill: float | None) -> Callable[..., Tensor]:
        """``allocator`` with zones around floating-point tensors; others are as they were."""

        def allocate(*args, **kwargs) -> Tensor:
            of = next((a for a in args if isinstance(a, Tensor)), None)
            device = kwargs.pop("device", None) or (torch.get_default_device() if of is None else of.device)
            with torch.no_grad():
                like = allocator(*args, **kwargs, device="meta")
                if not like.is_floating_point() or torch.device(device).type == "meta":
                    return allocator(*args, **kwargs, device=device)
                return self.allocate(like, torch.device(device), fill).requires_grad_(like.requires_grad)

        return allocate


@contextmanager
def guarded() -> Iterator[Guards]:
    """Within it, floating-point tensors that Python code allocates lie between zones, and hold NaN until written.

    It replaces torch's functions for the whole process: for checks, not for production.
    """
    guards = Guards()
    patches = [
        mock.patch.object(owner, name, guards.guarding(getattr(owner, name), fill)) for owner, name, fill in ALLOCATORS
    ]
    try:
        for patch in patches:
            patch.start()
        yield guards
    finally:
        for patch in reversed(patches):
            patch.stop()
