"""What contestants compute in: a dtype, and whether float32's products may round their factors to TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """A dtype, and the largest ||y - y64|| / ||y64|| with which a contestant may be timed, of output and gradient."""

    name: str
    dtype: torch.dtype
    tolerance: float
    tf32: bool = False  # on GPUs

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """torch's switches for TF32, of cuDNN and of matrix products, as this precision wants them."""
        switches = torch.backends.cudnn, torch.backends.cuda.matmul
        before = [switch.allow_tf32 for switch in switches]
        try:
            for switch in switches:
                switch.allow_tf32 = self.tf32
            yield
        finally:
            for switch, allowed in zip(switches, before, strict=True):
                switch.allow_tf32 = allowed


PRECISIONS = {
    p.name: p
    for p in (
        Precision("float32", torch.float32, 1e-4),
        Precision("tf32", torch.float32, 5e-3, tf32=True),
        Precision("float16", torch.float16, 1e-2),
        Precision("bfloat16", torch.bfloat16, 5e-2),
    )
}


def defaults(device: torch.device) -> list[str]:
    """Names of what is timed where nothing else is asked for."""
    return ["float32", "tf32", "bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"]
