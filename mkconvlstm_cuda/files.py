"""Files that are either complete or not there, and files that somebody else has written."""

import os
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def atomic(path: Path):
    """A temporary path that becomes `path` if all goes well, and vanishes if not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: str | os.PathLike, name: str, device: torch.device | str = "cpu") -> object:
    """What torch.save has written there; nothing in the file is executed.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds anything else; the message begins with ``name``.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever torch's unpickler makes of bytes that nobody wrote for it
        first_line = str(error).partition("\n")[0]
        why = f"{type(error).__name__}: {first_line}"
        raise ValueError(f"{name}: {os.fspath(path)} is damaged, or holds more than tensors ({why})") from error
