"""What long runs share: checkpoints, Ctrl-C between steps only, fast precision."""

import json
import signal
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .files import atomic, load_tensors


def save_checkpoint(path: Path, settings: Mapping[str, Any], **state: Any) -> None:
    """Writes a checkpoint that is either complete or not there. `settings` must be what JSON can hold."""
    with atomic(path) as temporary:
        torch.save({"settings": json.dumps(settings), **state}, temporary)


def load_checkpoint(path: Path, settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The state that was saved.

    Raises:
        ValueError: there is none, it is damaged, or it was saved with other settings. OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"resume: there is no checkpoint at {path}")
    state = load_tensors(path, "resume", device)
    if not isinstance(state, dict) or not isinstance(state.get("settings"), str):
        raise ValueError(f"resume: {path} is no checkpoint of this program: it holds no settings")
    theirs, ours = json.loads(state["settings"]), json.loads(json.dumps(settings))
    differing = [f"{k} = {theirs.get(k)}, not {ours[k]}" for k in ours if theirs.get(k) != ours[k]]
    if differing:
        raise ValueError(f"resume: {path} was made with {'; '.join(differing)}")
    return state


def check_choice(kept: Path | None, resume: bool, overwrite: bool) -> None:
    """Raises ValueError if both are asked for, or neither where an earlier run has `kept` something."""
    if resume and overwrite:
        raise ValueError("overwrite: got resume too, wanted one of the two")
    if kept is not None and not resume and not overwrite:
        raise ValueError(f"output: an earlier run has left {kept}: --resume continues it, --overwrite throws it away")


def how_to_resume(overwrite: bool) -> str:
    """How a command that was stopped is continued, for people."""
    return f"the same command and --resume{' in place of --overwrite' if overwrite else ''}"


@contextmanager
def deferred_interrupt():
    """Yields an Event that the first Ctrl-C sets, so that no step is cut in two; the second acts as it always does."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def note(signum, frame):
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Tensor cores from Ampere on, or a CPU with matrix units for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch we support
    return device.type == "cpu" and bool(capabilities.get("amx_bf16"))
