"""What the build made: the host module's facts, the CPU library, and the CUDA library where nvcc was there."""

import importlib.metadata
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from mkconvlstm_cuda import _C, library

INFO = _C.build_info()


@pytest.fixture
def cuda_library():
    if INFO["cuda_missing"]:
        pytest.skip(f"built without CUDA: {INFO['cuda_missing']}")
    return Path(_C.__file__).with_name(INFO["cuda_library"])


def run(tool, *arguments):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} not found")
    return subprocess.run([tool, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def test_build_info():
    assert re.match(r"\w+ \d+\.", INFO["compiler"])
    assert INFO["build_type"]
    assert INFO["torch"].startswith("2.")
    if INFO["cuda_missing"]:
        assert INFO["cuda"] is INFO["cuda_library"] is INFO["cuda_architectures"] is None
    else:
        assert INFO["cuda"].count(".") >= 1
        assert INFO["cuda_architectures"]


def test_version_is_kept_once():
    assert re.match(r"\d+\.\d+\.\d+", importlib.metadata.version("mkconvlstm_cuda"))


def test_library_holds_code_for_each_architecture(cuda_library):
    if shutil.which("cuobjdump"):
        found = re.findall(r"\.(sm_\w+)\.cubin", run("cuobjdump", "--list-elf", cuda_library))
    else:  # each cubin keeps the options that made it in a note
        found = [arch.decode() for arch in re.findall(rb"-arch (sm_\w+)", cuda_library.read_bytes())]
        if not found:
            pytest.skip("the cubins are compressed, and there is no cuobjdump to look into them")
    assert set(found) == {f"sm_{arch.removesuffix('-real')}" for arch in INFO["cuda_architectures"].split(";")}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_library_depends_on_torch_and_the_system_alone(kind):
    if INFO[f"{kind}_library"] is None:
        pytest.skip(f"built without CUDA: {INFO['cuda_missing']}")
    dynamic = run("readelf", "-d", Path(_C.__file__).with_name(INFO[f"{kind}_library"]))
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    assert f"libtorch_{kind}.so" in needed
    assert needed - {f"libtorch_{kind}.so"} <= {
        "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
    }  # fmt: skip
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_cpu_library_loads():
    assert library.load("cpu") is None


def test_load_says_why_not():
    results = []
    threads = [threading.Thread(target=lambda: results.append(library.load("cuda"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1
    if results[0] is None:
        assert torch.cuda.is_available()
    else:
        assert results[0]


def test_a_library_that_is_not_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(_C, "build_info", lambda: {**INFO, "cpu_library": "libnothing.so"})
    assert "libnothing.so is missing" in library._load.__wrapped__("cpu")
