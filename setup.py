"""Builds the compiled parts: calls CMake with Ninja. Everything else is in pyproject.toml and CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Puts `_C`, the CPU library and, where nvcc is found, the CUDA library into the package.

    The build directory outlives the build, so that the next one compiles only what changed.
    CMAKE_ARGS adds options, for example CMAKE_ARGS=-DMKCONVLSTM_CUDA=OFF.
    """

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = ROOT / "mkconvlstm_cuda" if in_place else Path(self.build_lib).resolve() / "mkconvlstm_cuda"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # The last build may have had other options, and an isolated one its tools at another path: start afresh.
        configure = [
            "cmake",
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-Upybind11_DIR",
            "-DMKCONVLSTM_CUDA=ON",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        with alone(build):
            for stale in package.glob("libmkconvlstm_*.so"):
                stale.unlink()
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
            subprocess.run(["cmake", "--install", str(build), "--prefix", str(package)], check=True)


@contextmanager
def alone(build: Path):
    """Waits for other processes that build in the same directory."""
    try:
        import fcntl
    except ImportError:  # not on Unix
        yield
        return
    build.mkdir(parents=True, exist_ok=True)
    with open(build / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


setup(
    ext_modules=[Extension("mkconvlstm_cuda._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
