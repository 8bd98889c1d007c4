"""Files that are either complete or not there."""

import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: Path):
    """A temporary path that becomes `path` if all goes well, and vanishes if not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
