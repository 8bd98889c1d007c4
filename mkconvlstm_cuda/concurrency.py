"""Independent work side by side, where each part alone leaves much of a GPU idle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")

MOST_PIXELS = 1 << 15  # of all images of a convolution that does not fill a GPU
_local = threading.local()


def captures(device: torch.device) -> bool:
    """Whether what runs now on ``device`` becomes a CUDA graph, and nothing has to trace or differentiate it."""
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if not torch.cuda.is_initialized():  # fake tensors
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def side_streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """This thread's and the current stream's, always the same.

    A stream can be in one capture at a time; and what one stream has let go of, another's tasks do not wait for.
    """
    streams = _local.__dict__.setdefault("streams", {}).setdefault(torch.cuda.current_stream(device), [])
    while len(streams) < count:
        streams.append(torch.cuda.Stream(device))
    return streams[:count]


def concurrently(device: torch.device, pixels: int, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of ``tasks`` on images of so many ``pixels``, which write nothing that another one reads.

    They run side by side where a CUDA graph is captured and the images are small. Elsewhere, one after another: outside
    of graphs the host is what small images wait for. A side stream's memory is used again only by later tasks of the
    same stream, which wait for all that came before them there, so that it needs no record of who else has read it.
    What several tasks read, the caller keeps until all are done.
    """
    if len(tasks) < 2 or pixels > MOST_PIXELS or not captures(device):
        return [task() for task in tasks]
    with torch.cuda.device(device):
        here = torch.cuda.current_stream()
        streams = side_streams(device, len(tasks) - 1)
        begin = here.record_event()
        results = [tasks[0]()]
        for stream, task in zip(streams, tasks[1:], strict=True):
            with torch.cuda.stream(stream):
                stream.wait_event(begin)
                results.append(task())
        for stream in streams:
            here.wait_stream(stream)
    return results
