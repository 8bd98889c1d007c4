"""Weak scaling over processes: ``torchrun --nproc-per-node 2 -m mkconvlstm_cuda.bench.scaling paper_mk35``.

Every process, with a GPU of its own where there are any, has as much to do as one alone: a batch of its own, or its
rows of images that are so many times taller. Efficiency is the time of one process alone over that of all together.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Annotated, Optional

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

from mkconvlstm_cuda import MKConvLSTM
from mkconvlstm_cuda.sharding import shard_height

from .contestants import Contestant
from .machine import environment
from .timing import stopwatch
from .workloads import WORKLOADS, Workload

WARM_UP = 2  # rounds that do not count
# What all processes do together, and what it is compared with.
ALONE = {"batches shared out": "alone", "rows shared out": "alone, reference"}


def contestants(workload: Workload, device: torch.device, dtype: torch.dtype) -> dict[str, Contestant]:
    """This process's part in each, all with the same weights; None where it waits for the first."""
    torch.manual_seed(0)
    x = torch.randn(workload.shape, device=device, dtype=dtype)
    dy = torch.randn(*x.shape[:2], workload.hidden_channels, *x.shape[3:], device=device, dtype=dtype)

    def layer(backend: str = "auto") -> MKConvLSTM:
        torch.manual_seed(0)
        return MKConvLSTM(workload.channels, workload.kernels, mix=workload.mix, backend=backend).to(device, dtype)

    modules = {
        "alone": layer(),
        "batches shared out": DistributedDataParallel(layer()),
        "alone, reference": layer("reference"),
        "rows shared out": DistributedDataParallel(shard_height(layer())),
    }
    first = dist.get_rank() == 0
    return {n: Contestant(m, x, dy) if first or n in ALONE else None for n, m in modules.items()}


def take_turns(runs: dict[str, Contestant], device: torch.device, rounds: int) -> dict[str, float]:
    """Milliseconds of a training step of each, the slowest process's; medians over ``rounds``."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(WARM_UP + rounds):
        for name, run in runs.items():
            took = torch.zeros(1, dtype=torch.float64, device=device)
            dist.all_reduce(took)  # all start together
            if run is not None:
                took += stopwatch(run.train, device)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            times[name].append(took.item())
    return {name: statistics.median(counted[WARM_UP:]) for name, counted in times.items()}


def main(
    workload: Annotated[str, typer.Argument(help="A name that `mkconvlstm bench --list` shows.")] = "paper_mk35",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, ...")] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Training steps of each that count.")] = 20,
    output: Annotated[Optional[Path], typer.Option(help="JSON file to write.")] = None,  # noqa: UP045
) -> None:
    """Weak scaling efficiency of training, with batches and with rows of images shared out."""
    if workload not in WORKLOADS:
        raise typer.BadParameter(f"no workload {workload}; there are {', '.join(WORKLOADS)}")
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    runs = contestants(WORKLOADS[workload], device, getattr(torch, dtype))
    times = take_turns(runs, device, rounds)
    del runs  # or DDP would be the last to have the process group, and gloo's threads now and then hang when it lets go
    if dist.get_rank() == 0:
        efficiency = {name: times[alone] / times[name] for name, alone in ALONE.items()}
        processes = dist.get_world_size()
        table = Table("", "ms a step", "efficiency", title=f"{workload}, {dtype}, {processes} processes")
        for name, ms in times.items():
            table.add_row(name, f"{ms:.3g}", f"{efficiency[name]:.0%}" if name in efficiency else "")
        Console().print(table)
        if output is not None:
            found = {"workload": workload, "dtype": dtype, "processes": processes}
            found |= {"environment": environment(device), "milliseconds": times, "efficiency": efficiency}
            output.write_text(json.dumps(found, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
