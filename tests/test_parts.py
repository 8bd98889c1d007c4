"""Parts that are missing or broken: a slower backend works, or one sentence says what is wrong."""

import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import setuptools
import torch

from mkconvlstm_cuda import _C, MKConvLSTM, cuda_backend, dispatch, library, triton_backend, triton_kernels

ROOT = Path(__file__).resolve().parent.parent
X = torch.randn(2, 3, 2, 5, 4)


def assert_serves_without(backend, words):
    """ "auto" works without ``backend``, which, named, says why it does not."""
    layer = MKConvLSTM(2, {3: 2, 5: 1})
    output, _ = layer(X)
    output.sum().backward()
    assert layer.last_backend not in (None, backend)
    with pytest.raises(dispatch.Refusal, match=rf"backend: '{backend}' cannot serve this call: .*{words}"):
        MKConvLSTM(2, {3: 2, 5: 1}, backend=backend)(X)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(triton_backend, "installed", lambda: False)
    assert_serves_without("triton", "the package triton is not installed")


def test_with_a_triton_that_cannot_be_imported(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delattr(triton_kernels, "launch", raising=False)
    monkeypatch.setitem(sys.modules, "mkconvlstm_cuda.triton_kernels.launch", None)
    monkeypatch.setattr(triton_backend, "broken", triton_backend.broken.__wrapped__)
    monkeypatch.setattr(triton_backend, "finds_gpu", lambda: True)
    assert_serves_without("triton", "triton cannot be imported: .*launch")


@pytest.mark.parametrize("state", ["missing", "empty", "filled"])
def test_with_a_cache_folder_that_cannot_be_written(state, tmp_path, monkeypatch):
    """What other processes have left in it serves."""
    pytest.importorskip("triton")
    folder = tmp_path / "read" / "only"
    if state != "missing":
        folder.mkdir(parents=True)
    if state == "filled":
        (folder / "kernel").mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # to the root user everything is writable
    monkeypatch.setattr(triton_backend, "broken", triton_backend.broken.__wrapped__)
    monkeypatch.setattr(triton_backend, "finds_gpu", lambda: True)
    if state == "filled":
        assert triton_backend.available() is None
    else:
        assert_serves_without("triton", f"Triton cannot write to its cache folder {folder}: TRITON_CACHE_DIR")


@pytest.mark.parametrize(
    ("architectures", "runs_on", "not_on"),
    [
        ("80;90a-real", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
        ("80-real;90a-real", [(8, 0), (8, 9), (9, 0)], [(7, 0), (10, 0)]),
        ("90a-real", [(9, 0)], [(8, 0), (10, 0)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("75", [(7, 5), (8, 0), (12, 1)], [(7, 0)]),
    ],
)
def test_a_library_for_other_gpus(architectures, runs_on, not_on):
    assert [library.without_code_for(architectures, gpu) for gpu in runs_on] == [None] * len(runs_on)
    for major, minor in not_on:
        reason = library.without_code_for(architectures, (major, minor))
        assert reason == f"the CUDA library was built for {architectures}, and the GPU is sm_{major}{minor}"


def test_the_cuda_backend_refuses_a_gpu_that_its_library_has_no_code_for(monkeypatch):
    monkeypatch.setattr(library, "refusal", lambda device: f"built for others than {device}")
    problem = dispatch.Problem(torch.device("cuda:0"), torch.float32, 1, 4, 4)
    assert cuda_backend.supports(problem) == "built for others than cuda:0"


@pytest.mark.parametrize("kind", ["no library", "for another machine", "for another torch"])
def test_a_cpu_library_that_cannot_be_loaded(kind, tmp_path, monkeypatch):
    path = tmp_path / _C.build_info()["cpu_library"]
    if kind == "no library":
        path.write_text("not a library")
    elif kind == "for another machine":
        elf = bytearray(Path(_C.__file__).with_name(path.name).read_bytes())
        elf[18:20] = (8).to_bytes(2, sys.byteorder)  # MIPS
        path.write_bytes(elf)
    else:
        compiler = shutil.which("c++")
        if compiler is None:
            pytest.skip("no C++ compiler (c++) found")
        source = 'extern "C" int aoti_torch_of_next_year(); int use = aoti_torch_of_next_year();'
        command = [compiler, "-x", "c++", "-", "-shared", "-fPIC", "-o", str(path)]
        subprocess.run(command, input=source, text=True, check=True)
    monkeypatch.setattr(_C, "__file__", str(tmp_path / "_C.so"))
    reason = library._load.__wrapped__("cpu")
    assert reason.startswith(f"{path.name} cannot be loaded: ")
    assert kind != "for another torch" or "undefined symbol: aoti_torch_of_next_year" in reason
    monkeypatch.setattr(library, "_load", lambda device_type: reason)
    layer = MKConvLSTM(2, {3: 2, 5: 1})
    layer(X)[0].sum().backward()
    assert layer.last_backend == "aten"


def configure(folder, *options, path=None):
    """CMake's own output for this source tree."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake or ninja not found")
    environment = os.environ | ({} if path is None else {"PATH": str(path)})
    environment = {k: v for k, v in environment.items() if k not in ("CUDACXX", "CUDA_HOME", "CUDA_PATH")}
    command = [shutil.which("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options]
    command.append(f"-DPython_EXECUTABLE={sys.executable}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_build_without_nvcc(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "g++", "cc", "gcc", "as", "ld", "ar", "ranlib", "nm", "objcopy", "objdump", "strip", "ninja"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    code, output = configure(tmp_path / "build", path=tools)
    assert code == 0, output
    assert "Building without CUDA: nvcc not found" in output


def test_a_build_with_a_torch_that_has_no_headers(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, output = configure(tmp_path / "build", "-DMKCONVLSTM_CUDA=OFF")
    assert code != 0
    assert "torch >= 2.11 with its headers is needed" in output


def test_two_builds_wait_for_each_other(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    alone = runpy.run_path(str(ROOT / "setup.py"))["alone"]
    order = []

    def build(name):
        with alone(tmp_path / "build"):
            order.append(f"{name} starts")
            time.sleep(0.2)
            order.append(f"{name} ends")

    threads = [threading.Thread(target=build, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = order[0][0]
    second = "b" if first == "a" else "a"
    assert order == [f"{first} starts", f"{first} ends", f"{second} starts", f"{second} ends"]
