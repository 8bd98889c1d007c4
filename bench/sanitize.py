"""The compiled code under sanitizers; writes what they found to ``sanitizers.json`` and ``sanitizers.md``.

The host's code: the CPU library and ``_C``, built anew with AddressSanitizer and UBSan, through their tests. The
kernels, where there is a GPU: CUDA's and Triton's on small problems under the four tools of ``compute-sanitizer``.

    python -m mkconvlstm_cuda.bench.sanitize [host] [memcheck] [racecheck] [synccheck] [initcheck] [--output FOLDER]

Tools that are not named keep what the files say of them, with the device and the kernels that it was said of.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from .. import dispatch, fuzz, fuzz_calls, sm90
from ..fuzz_problems import Kernel, Problem
from .machine import kernels_hash

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("bench-results")
HOST_TESTS = ("gate_step", "fourier", "plan", "sequence_plan", "resident", "exactness")
# Parts of the mangled names of our kernels, CUDA's and Triton's: torch's own, but for a few, are not looked at.
KERNELS = (
    "forward_kernel", "backward_kernel", "finish_kernel", "gate_step_kernel",
    "pack_kernel", "copy_kernel", "sum_kernel", "fold_kernel",
)  # fmt: skip
TWO = (Kernel(3, 3, 9), Kernel(5, 5, 8))
EVEN = (Kernel(3, 3, 9), Kernel(5, 5, 7))
SMALL = Problem(dtype="bfloat16", batch=2, steps=3, channels=3, height=6, width=5, kernels=TWO, state=True)
PATCHES = replace(SMALL, batch=1, height=16, width=48, kernels=(Kernel(3, 3, 40), Kernel(5, 5, 56)))
PROBLEMS = (
    SMALL,
    replace(SMALL, dtype="float16", kernels=(Kernel(3, 3, 8),), recompute=True),
    replace(SMALL, kernels=(Kernel(3, 3, 64), Kernel(5, 5, 64)), height=9, width=7),
    replace(SMALL, kernels=(Kernel(3, 3, 16), Kernel(5, 5, 8)), lengths=(1, 3)),  # weights stay in shared memory
    replace(SMALL, peephole="pixel", output_peephole="current", lengths=(1, 3), state=False),
    replace(SMALL, mix="gate", mix_activation="tanh", bias=False),
    replace(SMALL, dtype="float32", tf32=True, peephole="channel"),
    replace(SMALL, dtype="float32", kernels=(Kernel(1, 3, 17), Kernel(3, 1, 3), Kernel(7, 7, 2))),
    replace(SMALL, dtype="float64", peephole="channel", lengths=(2, 1)),
    replace(SMALL, gradients=False),
    # Hopper's streamed kernels: tiles that are patches, with neighbours; a tile without pixels, and tiles that go to
    # other blocks at each step; no gates to keep.
    PATCHES,
    replace(PATCHES, kernels=(Kernel(3, 3, 8),), height=104, width=176, steps=2),
    replace(PATCHES, gradients=False),
)


@dataclass(frozen=True)
class Tool:
    """How one tool of compute-sanitizer runs."""

    all_kernels: bool = False  # torch's, too
    left_out: str | None = None  # part of a kernel's mangled name
    caching: bool = True  # torch's of memory; without it a tensor ends where its memory does
    cudnn: bool = True
    problems: tuple[Problem, ...] = PROBLEMS
    note: str = ""  # what is left out, and why


TOOLS = {
    "memcheck": Tool(caching=False),
    "racecheck": Tool(
        cudnn=False,
        problems=tuple(replace(p, frozen=("x", "transition")) if p.width >= PATCHES.width else p for p in PROBLEMS),
        note="without cuDNN, and of the larger images without gradients of x and weights: in torch's convolutions "
        "alone, too, the tool fails under cuDNN's kernels and under some of cuBLAS",
    ),
    "synccheck": Tool(
        left_out="sm9015backward_kernel",
        note="without sm90::backward_kernel: the tool takes threads that wait at one named barrier, but in two places "
        "of the code, for divergent, in a kernel of nothing else, too",
    ),
    "initcheck": Tool(
        all_kernels=True,  # it has to see every write
        caching=False,
        cudnn=False,
        problems=tuple(
            replace(p, batch=2, kernels=EVEN if p.kernels == TWO else p.kernels) for p in PROBLEMS if p.mix is None
        ),
        note="without cuDNN, and of two images each: the tool sees no writes of the copy engine; without a mix: torch "
        "makes its gradient with an operand that nobody writes or uses; channels fill whole 16 bytes: the tool takes "
        "an asynchronous copy of fewer for one of 16",
    ),
}


@dataclass(frozen=True)
class Verdict:
    """What one sanitizer said."""

    what: str
    clean: bool
    words: str
    seconds: float


def run_problems(tool: Tool) -> None:
    """Forward and backward of a tool's problems on every backend; this is what it looks at."""
    sm90.fills = lambda *_: True  # Hopper's kernels wherever they serve, not only where they are the fastest
    device, served = torch.device("cuda"), 0
    for backend in fuzz.served_backends():
        for p in tool.problems:
            p = replace(p, backend=backend)
            print(f"{backend}: {p.to_json()}", flush=True)
            try:
                layer = fuzz_calls.build(p, backend, device, False)
                with torch.backends.cudnn.flags(enabled=tool.cudnn, allow_tf32=p.tf32):
                    fuzz_calls.call(p, layer, fuzz_calls.make_inputs(p, layer, device, False), False)
                torch.cuda.synchronize()  # so that what goes wrong is this problem's
                served += 1
            except dispatch.Refusal as refusal:
                print(refusal)
    print(f"served {served} problems")


def kernels(name: str) -> Verdict:
    """:func:`run_problems` under one tool of compute-sanitizer; all it says goes to ``bench-results``."""
    tool = TOOLS[name]
    command = ["compute-sanitizer", "--tool", name, "--error-exitcode", "99"]
    if not tool.all_kernels:
        command += [word for part in KERNELS for word in ("--kernel-name", f"kns={part}")]
    if tool.left_out:
        command += ["--kernel-name-exclude", f"kns={tool.left_out}"]
    command += [sys.executable, "-m", "mkconvlstm_cuda.bench.sanitize", "run-problems", name]
    environment = os.environ | ({} if tool.caching else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    log = RESULTS / f"sanitizer-{name}.log"
    start = time.monotonic()
    with open(log, "w") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    output = log.read_text(errors="replace")
    summary = re.findall(r"={3,} (\w+ SUMMARY: .*)", output)
    served = re.findall(r"served [1-9]\d* problems", output)
    clean = done.returncode == 0 and bool(summary) and bool(served)
    if not clean:
        print(f"{output[:8000]}\n... all of it in {log}")
    words = "; ".join([*summary, *served]) or f"exit code {done.returncode}"
    words = f"{words}; {tool.note}" if tool.note else words
    return Verdict(f"compute-sanitizer {name}", clean, words, time.monotonic() - start)


def host() -> Verdict:
    """The tests of the host's code on a build of it with AddressSanitizer and UBSan."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("csrc", "tests", "mkconvlstm_cuda", "pyproject.toml", "CMakeLists.txt"):
            one = ROOT / name
            if one.is_dir():
                shutil.copytree(one, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                shutil.copy(one, copy / name)
        for name in ("triton_kernels", "bench"):
            shutil.copytree(ROOT / name, copy / "mkconvlstm_cuda" / name, ignore=shutil.ignore_patterns("reports"))
        # pip puts cmake and ninja beside the interpreter.
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        configure = [
            "cmake", "-S", folder, "-B", f"{folder}/build", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
            "-DMKCONVLSTM_CUDA=OFF", "-DMKCONVLSTM_SANITIZE=address,undefined",
        ]  # fmt: skip
        install = ["cmake", "--install", f"{folder}/build", "--prefix", f"{folder}/mkconvlstm_cuda"]
        for command in (configure, ["cmake", "--build", f"{folder}/build"], install):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        # First in the process, or what the sanitizers intercept is bound already.
        preloaded = [which_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
        environment |= {
            "LD_PRELOAD": " ".join(preloaded),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep memory until the process ends
        }
        tests = [f"tests/test_{name}.py" for name in HOST_TESTS]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print((done.stdout + done.stderr)[-8000:])
    words = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"exit code {done.returncode}"
    return Verdict("AddressSanitizer and UBSan, host", done.returncode == 0, words, time.monotonic() - start)


def which_library(name: str) -> str:
    """The path of the compiler's library ``name``."""
    command = ["c++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main(
    names: Annotated[Optional[list[str]], typer.Argument(help="host, memcheck, ...; default: what runs here.")] = None,  # noqa: UP045
    output: Annotated[Path, typer.Option(help="Folder of sanitizers.json and sanitizers.md.")] = RESULTS,
) -> None:
    """The compiled code under sanitizers; fails where one is not clean."""
    if not names:
        names = ["host", *(TOOLS if torch.cuda.is_available() and shutil.which("compute-sanitizer") else ())]
    for name in names:
        if name != "host" and name not in TOOLS:
            raise typer.BadParameter(f"no sanitizer {name}; there are host, {', '.join(TOOLS)}")
    RESULTS.mkdir(exist_ok=True)
    verdicts = []
    for name in names:
        verdicts.append(host() if name == "host" else kernels(name))
        print(verdicts[-1], flush=True)
    print(f"wrote {write(verdicts, output)}")
    if not all(v.clean for v in verdicts):
        raise typer.Exit(1)


def write(verdicts: list[Verdict], folder: Path) -> Path:
    """Adds ``verdicts`` to what ``folder`` already has, in the place of earlier ones of the same sanitizer."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sanitizers.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for v in verdicts:
        on_gpu = v.what.startswith("compute-sanitizer")
        device = torch.cuda.get_device_name() if on_gpu else "no GPU"
        found[v.what] = asdict(v) | {"device": device, "torch": torch.__version__, "kernels": kernels_hash()}
    path.write_text(json.dumps(found, indent=1) + "\n")
    table = ["| sanitizer | | its summary | time | where | kernels |", "| --- | --- | --- | --- | --- | --- |"]
    for v in found.values():
        verdict, where = "clean" if v["clean"] else "NOT CLEAN", f"{v['device']}, torch {v['torch']}"
        table.append(f"| {v['what']} | {verdict} | {v['words']} | {v['seconds']:.0f} s | {where} | {v['kernels']} |")
    path = path.with_suffix(".md")
    path.write_text("\n".join(table) + "\n")
    return path


if __name__ == "__main__":
    if sys.argv[1:2] == ["run-problems"]:
        run_problems(TOOLS[sys.argv[2]])
    else:
        typer.run(main)
