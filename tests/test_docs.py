"""Every Python block of docs/ runs as it stands, in a directory of its own."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?:<!-- (?P<how>[^>]*) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = [
    pytest.param(match["how"] or "", match["code"], id=f"{page.stem}-{n}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    for n, match in enumerate(BLOCK.finditer(page.read_text()))
]


def skip_what_is_missing(how):
    """``needs: a, b``: modules, or a C++ compiler."""
    for need in how.removeprefix("needs: ").split(", "):
        if need == "a C++ compiler":
            if shutil.which(os.environ.get("CXX", "g++")) is None:
                pytest.skip("needs a C++ compiler")
        elif importlib.util.find_spec(need) is None:
            pytest.skip(f"{need} is not installed")


def run_processes(code, script, processes, gpus):
    """``code`` in ``script``, as torchrun would run it; the weights that it leaves."""
    # torch's gloo now and then aborts in a process's last breath, a model without this layer too: leave without it.
    Path(script).write_text(code + "\nos._exit(0)\n")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    told |= {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    running = []
    for rank in range(processes):
        environment = {name: str(value) for name, value in (told | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        command = [sys.executable, script]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment))
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert not any(process.returncode for process in running), errors
    return torch.load("weights.pt", weights_only=True)


@pytest.mark.parametrize(("how", "code"), BLOCKS)
def test_block_runs(how, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if match := re.fullmatch(r"run: (\S+) with 2 (processes|GPUs)", how):
        gpus = match[2] == "GPUs"
        if gpus and torch.cuda.device_count() < 2:
            pytest.skip("needs 2 GPUs")
        one, two = (run_processes(code, match[1], n, gpus) for n in (1, 2))
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if gpus else {"rtol": 1e-5, "atol": 1e-6}  # convolutions in TF32
        torch.testing.assert_close(two, one, **tolerance)
        return
    if how:
        skip_what_is_missing(how)
    exec(compile(code, "docs", "exec"), {"__name__": "docs"})


def test_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in readme]
