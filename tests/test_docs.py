"""Every Python block of docs/ runs as it stands, in a directory of its own."""

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from processes import torchrun

from mkconvlstm_cuda import backward

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?:<!-- (?P<how>[^>]*) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = [
    pytest.param(
        match["how"] or "",
        match["code"],
        id=f"{page.stem}-{n}",
        marks=[pytest.mark.gpu] if match["how"] == "needs: a GPU" else [],
    )
    for page in sorted((ROOT / "docs").glob("*.md"))
    for n, match in enumerate(BLOCK.finditer(page.read_text()))
]


# Ahead of a script: notes steps of rank 1, and kills it in the fifth, but once.
KILLED = """
import os, signal
from torch.optim.optimizer import register_optimizer_step_pre_hook

def die(*_):
    if os.environ["RANK"] == "1":
        notes = "steps-" + os.environ["TORCHELASTIC_RESTART_COUNT"]
        with open(notes, "a") as file:
            file.write(".")
        if notes == "steps-0" and os.path.getsize(notes) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

register_optimizer_step_pre_hook(die)
"""


def skip_what_is_missing(how):
    """``needs: a, b``: modules, a C++ compiler, or a GPU."""
    for need in how.removeprefix("needs: ").split(", "):
        if need == "a C++ compiler":
            if shutil.which(os.environ.get("CXX", "g++")) is None:
                pytest.skip("needs a C++ compiler")
        elif need == "a GPU":
            if not torch.cuda.is_available():
                pytest.skip("needs a GPU")
        elif importlib.util.find_spec(need) is None:
            pytest.skip(f"{need} is not installed")


def run_processes(code, script, processes, **options):
    """``code`` in ``script``, run by torchrun; the weights that it leaves."""
    Path(script).write_text(code)
    torchrun(script, processes=processes, **options)
    return torch.load("weights.pt", weights_only=True)


def check_processes(how, code, monkeypatch, gpus, **tolerance):
    """``run: SCRIPT with 2 processes``, which leave the weights that one leaves, or two when none of them is killed."""
    script, killed = re.fullmatch(r"run: (\S+) with 2 processes(, one of which is killed)?", how).groups()
    wanted = run_processes(code, script, 2 if killed else 1, gpus=gpus)
    if killed:
        Path("checkpoint.pt").unlink()
        monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as the page says
        code = KILLED + code
    weights = run_processes(code, script, 2, gpus=gpus, restarts=1 if killed else 0)
    torch.testing.assert_close(weights, wanted, **tolerance)
    if killed:  # not from the start again, but from the last checkpoint
        assert {path.name: len(path.read_text()) for path in Path().glob("steps-*")} == {"steps-0": 5, "steps-1": 5}


@pytest.mark.parametrize(("how", "code"), BLOCKS)
def test_block_runs(how, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backward, "SPAN_BYTES", backward.SPAN_BYTES)
    torch.manual_seed(0)
    if how.startswith("run: "):
        tolerance = {"rtol": 0, "atol": 0} if "killed" in how else {"rtol": 1e-5, "atol": 1e-6}
        check_processes(how, code, monkeypatch, gpus=False, **tolerance)
        return
    if how:
        skip_what_is_missing(how)
    exec(compile(code, "docs", "exec"), {"__name__": "docs"})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize(("how", "code"), [block for block in BLOCKS if block.values[0].startswith("run: ")])
def test_block_runs_on_two_gpus(how, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_processes(how, code, monkeypatch, gpus=True, rtol=1e-3, atol=1e-4)  # convolutions in TF32


def test_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in readme]
