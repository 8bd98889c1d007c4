"""The Triton backend: what it refuses, how it launches, and its kernels in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import PROBLEMS, Problem, assert_as_close, assert_close
from triton_problems import (
    INTERPRETED,
    PROBLEMS_HERE,
    REFUSED,
    SERVED,
    check_biases_around_a_mix,
    compiled,
    interpreted,
    launch,
    plan,
)

from mkconvlstm_cuda import dispatch

SMALL_TILES = {
    "whole tiles": plan.Config(32, 16, 16, split=False, warps=4),
    "cut tiles": plan.Config(16, 16, 16, split=True, warps=4),
}


@compiled
@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_serve_is_refused_with_a_reason(name, monkeypatch):
    monkeypatch.setattr("mkconvlstm_cuda.triton_backend.interpreted", lambda: True)
    problem = PROBLEMS[name]
    layer = problem.layer("triton", torch.float32)
    with pytest.raises(ValueError, match=f"backend: 'triton' cannot serve this call: .*{REFUSED[name]}"):
        problem.call(layer, **problem.inputs(layer, torch.float32))


def test_float64_and_tensors_elsewhere_are_refused():
    problem = Problem()
    layer = problem.layer("triton")
    with pytest.raises(ValueError, match="float64" if INTERPRETED else "no GPU|runs on GPUs"):
        problem.call(layer, **problem.inputs(layer))
    assert dispatch.choose(dispatch.Problem(torch.device("cpu"), torch.float64, 1, 1, 1)).name != "triton"


def test_images_too_large_are_refused():
    supports = dispatch.BACKENDS["triton"].supports
    problem = dispatch.Problem(torch.device("cuda"), torch.float16, 1, 2048, 2048, kernels=((3, 3, 128),))
    assert "31 bits" in supports(problem)
    assert supports(dispatch.Problem(torch.device("cuda"), torch.float16, 1, 2048, 2048, kernels=((3, 3, 64),))) is None


def test_a_second_launch_of_the_like_reuses_the_compiled_kernel(monkeypatch):
    launches = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: launches.append(("again", grid, args))

    class Kernel:
        arg_names = ("a", "n", "X", "Y")

        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(("first", grid, args, options)) or Compiled()

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "LAUNCHED", {})
    kernel, t, u = Kernel(), torch.zeros(8), torch.ones(8)
    options = {"Y": 2, "X": 1, "num_warps": 4}
    launch.launch(kernel, (5, 1, 1), (t, 3), options)
    launch.launch(kernel, (6, 1, 1), (u, 3), options)
    launch.launch(kernel, (6, 1, 1), (u[1:], 3), options)  # other alignment
    launch.launch(kernel, (6, 1, 1), (u, 4), options)
    assert [kind for kind, *_ in launches] == ["first", "again", "first", "first"]
    assert launches[1][1:] == ((6, 1, 1), (u, 3, 1, 2))


@compiled
def test_kernels_in_the_interpreter():
    """The interpreter has to be switched on before Triton is imported: another process, for all test_triton*.py."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "interpreted"]
    files = map(str, sorted(Path(__file__).parent.glob("test_triton*.py")))
    done = subprocess.run([*command, *files], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def set_tiles(monkeypatch, config, multiprocessors=3) -> None:
    monkeypatch.setattr(plan, "choose", lambda *_: config)
    monkeypatch.setattr(launch, "make_pass", launch.make_pass.__wrapped__)  # the like may have been made with others
    monkeypatch.setattr(launch, "device_limits", lambda _: (multiprocessors, 1 << 17))


@interpreted
@pytest.mark.parametrize(
    ("name", "tiles"),
    [
        (name, "cut tiles")
        for name in SERVED
        if not any(word in name for word in ("two layers", "bidirectional", "mask"))
    ]
    + [(name, "whole tiles") for name in ("two kernel sizes", "no state", "peephole pixel, current", "dilation")]
    + [(name, "whole tiles") for name in ("mix gate, tanh", "mix full")],
)
def test_interpreted_float32_agrees_with_float64(name, tiles, monkeypatch):
    set_tiles(monkeypatch, SMALL_TILES[tiles])
    problem = PROBLEMS_HERE[name]
    assert_close(problem.run("triton", torch.float32), problem.run("reference"), 1e-5)


@interpreted
@pytest.mark.parametrize("tiles", SMALL_TILES)
@pytest.mark.parametrize("mix", ["gate", "full"])
def test_interpreted_mix_of_several_tiles(mix, tiles, monkeypatch):
    """19 channels are two tiles of a gate, with pieces of both branches; 17 programs share them out."""
    set_tiles(monkeypatch, SMALL_TILES[tiles], 17)
    problem = Problem({1: 7, 3: 12}, {"mix": mix, "mix_activation": "tanh"}, steps=2, channels=1)
    assert_close(problem.run("triton", torch.float32), problem.run("reference"), 1e-5)


@interpreted
@pytest.mark.parametrize("block_n", [32, 128])
def test_interpreted_halves_of_whole_tiles(block_n, monkeypatch):
    """Gates from the product itself: channels end within a tile, pixels within its second half."""
    set_tiles(monkeypatch, plan.Config(32, block_n, 16, split=False, warps=4))
    options = {"peephole": "pixel", "image_size": (5, 9), "output_peephole": "current"}
    problem = Problem({1: 9, 3: 21}, options, steps=2, channels=1, size=(5, 9))
    assert_close(problem.run("triton", torch.float32), problem.run("reference"), 1e-5)


@interpreted
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("tanh", [False, True])
def test_interpreted_biases_before_and_after_a_mix(tanh, groups):
    check_biases_around_a_mix(groups, tanh, "cpu")


@interpreted
@pytest.mark.parametrize(
    "name", ["two kernel sizes", "peephole pixel, current", "lengths", "mix gate, tanh", "mix full"]
)
def test_interpreted_float16_is_as_close_as_torch(name):
    problem = PROBLEMS_HERE[name]
    assert_as_close(problem, "triton", torch.float16)


@interpreted
def test_interpreted_empty_batch_and_folded_norm():
    layer = Problem().layer("triton", torch.float32)
    output, (h_n, c_n) = layer(torch.empty(0, 3, 2, 4, 3))
    assert output.shape == (0, 3, 3, 4, 3)
    assert h_n.shape == c_n.shape == (1, 0, 3, 4, 3)
    problem = Problem(options={"norm": "batch"})
    ours, torchs = (problem.layer(backend, torch.float32).eval() for backend in ("triton", "reference"))
    with torch.no_grad():
        inputs = problem.inputs(ours, torch.float32)
        for a, b in zip(problem.call(ours, **inputs), problem.call(torchs, **inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture
def bounded(monkeypatch):
    """In the interpreter, loads and stores fail outside of the tensors that the kernel was given."""
    import numpy
    from triton.runtime import interpreter

    ranges, native, take_arguments = [], interpreter._interpreter, interpreter.GridExecutor._init_args_hst

    def ranges_of(argument):
        if isinstance(argument, tuple):
            for one in argument:
                yield from ranges_of(one)
        elif hasattr(argument, "block_shape"):
            yield from ranges_of(argument.base)
        elif isinstance(argument, torch.Tensor):
            extent = sum((n - 1) * s for n, s in zip(argument.shape, argument.stride(), strict=True)) + 1
            yield argument.data_ptr(), argument.data_ptr() + (extent if argument.numel() else 0) * argument.itemsize

    def arguments(*args):
        on_host, named = take_arguments(*args)
        ranges[:] = ranges_of((*on_host, *named.values()))
        return on_host, named

    def check(pointers, mask, size):
        at = pointers[mask].astype(numpy.int64)
        inside = numpy.zeros(at.shape, bool)
        for first, end in ranges:
            inside |= (first <= at) & (at + size <= end)
        assert inside.all(), "an access outside of all tensors"

    class Memory:
        @staticmethod
        def load(pointers, mask, other, dtype):
            check(pointers, mask, numpy.dtype(dtype).itemsize)
            return native.load(pointers, mask, other, dtype)

        @staticmethod
        def store(pointers, values, mask):
            check(pointers, mask, values.dtype.itemsize)
            return native.store(pointers, values, mask)

        def __getattr__(self, name):
            return getattr(native, name)

    monkeypatch.setattr(interpreter, "_interpreter", Memory())
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", arguments)


@interpreted
@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("tiles", SMALL_TILES)
@pytest.mark.parametrize("mix", [None, "gate", "full"])
def test_interpreted_kernels_stay_within_their_tensors(mix, tiles, monkeypatch):
    """Of the one tile, 5 channels after 9 others are finished, 16 columns at a time."""
    set_tiles(monkeypatch, SMALL_TILES[tiles])
    Problem({1: 9, 3: 5}, {"mix": mix, "mix_activation": "tanh" if mix else None}, steps=2, channels=1).run(
        "triton", torch.float32
    )
