"""Where a measurement was made, and of what."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from pathlib import Path

import torch

import mkconvlstm_cuda


def environment(device: torch.device) -> dict:
    """Machine and software, with a hash of the kernels' sources, so that a stale report can be told."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = driver_version()
    else:
        name, driver = cpu_name(), None
    return {
        "device": name,
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver,
        "python": platform.python_version(),
        "mkconvlstm_cuda": mkconvlstm_cuda.__version__,
        "kernels": kernels_hash(),
    }


def driver_version() -> str | None:
    """NVIDIA's driver, as ``nvidia-smi`` names it; None where there is no such program, or it fails."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0]


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def kernels_hash(root: Path | None = None) -> str | None:
    """SHA-256 over ``csrc/`` and ``triton_kernels/`` of a source tree; None where there is no such tree."""
    root = root or Path(__file__).resolve().parent.parent
    if not (root / "csrc").is_dir():
        return None
    digest = hashlib.sha256()
    suffixes = {".py", ".cu", ".cuh", ".cpp", ".h", ".in"}
    for folder in ("csrc", "triton_kernels"):
        for path in sorted(p for p in (root / folder).rglob("*") if p.suffix in suffixes):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
