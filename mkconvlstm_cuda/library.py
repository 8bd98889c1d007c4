"""Finds and loads the CUDA library, which holds the CUDA kernels of `torch.ops.mkconvlstm`."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import torch

_lock = threading.Lock()


def load() -> str | None:
    """Loads the CUDA library, at most once in a process.

    Returns:
        None where its operations are there; otherwise the reason why not, in words for the user. Never raises.
    """
    with _lock:
        return _load()


@functools.cache
def _load() -> str | None:
    try:
        from mkconvlstm_cuda import _C
    except ImportError as error:
        return f"the host module mkconvlstm_cuda._C cannot be imported: {error}"
    info = _C.build_info()
    if info["cuda_missing"]:
        return f"built without CUDA: {info['cuda_missing']}"
    path = Path(_C.__file__).with_name(info["cuda_library"])
    if not path.exists():
        return f"{path} is missing"
    # The library needs libtorch_cuda.so, which only a CUDA build of torch brings, and a driver, which comes with a GPU.
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    return None
