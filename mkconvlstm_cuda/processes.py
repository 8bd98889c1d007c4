"""The processes of one training run, as torchrun starts them; or one process alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# While one process decodes the last of its videos, the others wait in a collective.
_PATIENCE = timedelta(hours=12)


class Processes:
    """`rank` of `world`, and the `device` that is this process's own."""

    def __init__(self, rank: int, world: int, device: torch.device):
        self.rank, self.world, self.device = rank, world, device

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor on `device`."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def share_buffers(self, model: torch.nn.Module) -> None:
        """The first process's buffers, such as a batch norm's statistics, to all."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def gather(self, value: Any) -> list:
        """What every process has, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextmanager
def join(device: torch.device) -> Iterator[Processes]:
    """Meets the other processes, if torchrun started several; each takes the GPU of its local rank.

    Raises:
        ValueError: there are more processes on this host than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"device: got local rank {local} with {torch.cuda.device_count()} GPUs, wanted one each")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), world, device)
    finally:
        dist.destroy_process_group()
