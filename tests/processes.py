"""Several processes that talk to each other by torch.distributed, started as torchrun starts them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import uuid
from pathlib import Path

import torch

# Every process is a fork of one that has done the slow imports. It ends without Python's and C++'s last rites, in which
# torch's gloo now and then aborts, a model without this layer too.
multiprocessing.set_forkserver_preload(["torch._dynamo", "mkconvlstm_cuda"])


def run_script(folder: str, path: str, arguments: list[str], environment: dict[str, str]) -> None:
    """What each process does, for at most two minutes."""
    signal.alarm(120)
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def torchrun(path: str | Path, *arguments: str, processes: int, gpus: bool = False, restarts: int = 0) -> None:
    """Run the script at ``path`` in as many ``processes``, in the current directory.

    Without ``gpus`` they see none. Raises torch's ChildFailedError if one fails more than ``restarts`` times.
    """
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        start_method="forkserver",
    )
    environment = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in handled}  # torchrun's own would stay
    try:
        elastic_launch(config, run_script)(os.getcwd(), str(path), list(arguments), environment)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
