"""The compiled code under sanitizers; writes what they found to ``bench-results/sanitizers.md``.

The host's code: the CPU library and ``_C``, built anew with AddressSanitizer and UBSan, through their tests. The
kernels, where there is a GPU: CUDA's and Triton's on small problems under the four tools of ``compute-sanitizer``.

    python -m mkconvlstm_cuda.bench.sanitize [host] [memcheck] [racecheck] [synccheck] [initcheck]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import dispatch, fuzz
from ..fuzz_problems import Kernel, Problem

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
HOST_TESTS = ("gate_step", "fourier", "plan", "sequence_plan", "exactness")
# Parts of the names of our kernels, CUDA's and Triton's: torch's own, but for a few, are not looked at.
KERNELS = (
    "forward_kernel", "backward_kernel", "finish_kernel", "gate_step_kernel",
    "pack_kernel", "copy_kernel", "sum_kernel",
)  # fmt: skip

TWO = (Kernel(3, 3, 9), Kernel(5, 5, 8))
SMALL = Problem(dtype="bfloat16", batch=2, steps=3, channels=3, height=6, width=5, kernels=TWO, state=True)
PROBLEMS = (
    SMALL,
    replace(SMALL, dtype="float16", kernels=(Kernel(3, 3, 8),), recompute=True),
    replace(SMALL, kernels=(Kernel(3, 3, 64), Kernel(5, 5, 64)), height=9, width=7),
    replace(SMALL, peephole="pixel", output_peephole="current", lengths=(1, 3), state=False),
    replace(SMALL, mix="gate", mix_activation="tanh", bias=False),
    replace(SMALL, dtype="float32", tf32=True, peephole="channel"),
    replace(SMALL, dtype="float32", kernels=(Kernel(1, 3, 17), Kernel(3, 1, 3), Kernel(7, 7, 2))),
    replace(SMALL, dtype="float64", peephole="channel", lengths=(2, 1)),
    replace(SMALL, gradients=False),
)


@dataclass(frozen=True)
class Verdict:
    """What one sanitizer said."""

    what: str
    clean: bool
    words: str
    seconds: float


def run_problems() -> None:
    """Forward and backward of PROBLEMS on every fused backend; this is what compute-sanitizer looks at."""
    device, served = torch.device("cuda"), 0
    for backend in fuzz.served_backends():
        for p in PROBLEMS:
            p = replace(p, backend=backend)
            try:
                layer = fuzz.build(p, backend, device, False)
                with torch.backends.cudnn.flags(enabled=True, allow_tf32=p.tf32):
                    fuzz.call(p, layer, fuzz.make_inputs(p, layer, device, False), False)
                served += 1
            except dispatch.Refusal as refusal:
                print(f"{backend}: {refusal}")
    torch.cuda.synchronize()
    print(f"served {served} problems")


def kernels(tool: str) -> Verdict:
    """:func:`run_problems` under one tool of compute-sanitizer."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99"]
    for name in KERNELS:
        command += ["--kernel-name", f"kns={name}"]
    # Without torch's caching a tensor ends where its memory does.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [*command, sys.executable, "-m", "mkconvlstm_cuda.bench.sanitize", "run-problems"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    summary = re.findall(r"={3,} (\w+ SUMMARY: .*)", output)
    served = re.findall(r"served \d+ problems", output)
    clean = done.returncode == 0 and bool(summary) and bool(served)
    if not clean:
        print(output[-8000:])
    words = "; ".join([*summary, *served]) or f"exit code {done.returncode}"
    return Verdict(f"compute-sanitizer {tool}", clean, words, time.monotonic() - start)


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


def main(names: list[str]) -> int:
    if not names:
        names = ["host", *(TOOLS if torch.cuda.is_available() and shutil.which("compute-sanitizer") else ())]
    verdicts = []
    for name in names:
        verdicts.append(host() if name == "host" else kernels(name))
        print(verdicts[-1], flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    rows = [f"| {v.what} | {'clean' if v.clean else 'NOT CLEAN'} | {v.words} | {v.seconds:.0f} s |" for v in verdicts]
    path = Path("bench-results") / "sanitizers.md"
    path.parent.mkdir(exist_ok=True)
    head = [
        f"{device}; torch {torch.__version__}",
        "",
        "| sanitizer | | its summary | time |",
        "| --- | --- | --- | --- |",
    ]
    path.write_text("\n".join([*head, *rows]) + "\n")
    print(f"wrote {path}")
    return 0 if all(v.clean for v in verdicts) else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["run-problems"]:
        run_problems()
    else:
        sys.exit(main(sys.argv[1:]))
