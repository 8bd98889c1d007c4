"""The recurrence on Hopper with weights that stay in shared memory: its plan, and its kernels compiled for a CPU."""

import contextlib
import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hopper import TOLERANCE, equations, gradients, make, make_backward, sides

from mkconvlstm_cuda import _C, sm90

HERE = Path(__file__).parent
PLANS = {"forward": _C.plan_resident_forward, "backward": _C.plan_resident_backward}
SMALL = {"batch": 1, "height": 32, "width": 32, "branches": [(3, 3, 32), (5, 5, 32)]}

# batch, steps, (height, width), (kernel size or height and width, channels) of each branch
PROBLEMS = {
    "odd sizes": (1, 3, (9, 7), [(3, 8)]),
    "crossed kernels": (2, 3, (8, 9), [((3, 5), 8), ((7, 1), 16)]),
    "wide window": (1, 2, (3, 20), [(5, 8), (3, 8)]),
    "channels in two boxes": (1, 2, (8, 8), [(1, 16), (3, 64)]),
    "one step": (2, 1, (4, 4), [(3, 8)]),
    "one pixel": (1, 2, (1, 1), [(3, 16)]),
}
MULTIPROCESSORS = {"wide window": 4}  # fewer than windows of 8 x 8 pixels would need


def random_problem(rng):
    kernels = [(rng.choice([1, 3, 5, 7]), rng.choice([1, 3, 5])) for _ in range(rng.choice([1, 2]))]
    return {
        "batch": rng.choice([1, 1, 2, 5]),
        "height": rng.randint(1, 40),
        "width": rng.randint(1, 40),
        "branches": [(h, w, 8 * rng.randint(1, 9)) for h, w in kernels],
    }


@pytest.mark.parametrize("direction", PLANS)
def test_every_cell_has_a_thread(direction):
    rng = random.Random(0)
    served, splits, windows = 0, set(), set()
    for problem in [SMALL, *(random_problem(rng) for _ in range(600))]:
        with contextlib.suppress(ValueError):
            plan = PLANS[direction](**problem)
            served += 1
            high, wide = plan.window
            assert high * wide == 64, problem
            in_image = -(-problem["height"] // high) * -(-problem["width"] // wide)
            assert plan.windows == problem["batch"] * in_image, problem
            hidden = sum(channels for *_, channels in problem["branches"])
            assert plan.groups * 8 * plan.split >= hidden, problem
            assert (plan.groups - 1) * 8 * plan.split < hidden, problem
            assert plan.blocks == plan.windows * plan.groups * plan.split <= 132, problem
            assert plan.shared_memory <= 232448, problem
            splits.add(plan.split)
            windows.add(plan.window)
    assert served > 200
    assert splits == ({1} if direction == "forward" else {1, 2})
    assert len(windows) > 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"branches": [(3, 3, 8)] * 3}, "one or two branches"),
        ({"branches": [(3, 3, 12)]}, "multiple of 8"),
        ({"branches": [(2, 3, 16)]}, "odd"),
        ({"branches": [(33, 1, 16)]}, "kernel is too large"),
        ({"branches": [(3, 3, 4096)]}, "too many hidden channels"),
        ({"batch": 0}, "empty"),
        ({"batch": 10**7}, "too many elements"),
        ({"branches": [(9, 9, 128)]}, "do not fit"),
        ({"batch": 2}, "too few multiprocessors"),
        ({"multiprocessors": 127}, "too few multiprocessors"),
        ({"shared_memory": 65536}, "do not fit"),
    ],
)
@pytest.mark.parametrize("direction", PLANS)
def test_refusals_say_why(direction, change, reason):
    with pytest.raises(ValueError, match=reason):
        PLANS[direction](**{**SMALL, **change})


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++) found")
    here = tmp_path_factory.mktemp("resident")
    shutil.copytree(HERE.parent / "csrc", here / "csrc")
    shutil.copytree(HERE / "host_sm90", here / "csrc" / "sm90", dirs_exist_ok=True)
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    options += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment", "-fsanitize-undefined-trap-on-error"]
    folders = [f"-I{folder}" for folder in (here / "csrc", here / "csrc" / "sm90", HERE)]
    plans = [here / "csrc" / f"{name}_plan.cpp" for name in ("resident", "sequence", "tile")]
    sources = [HERE / "resident_host.cpp", *plans]
    library = here / "libresident.so"
    subprocess.run([compiler, *options, *folders, *map(str, sources), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class OnTheHost:
    """What the CUDA operations do, for CPU tensors."""

    def __init__(self, kernels, multiprocessors):
        self.kernels = kernels
        self.multiprocessors = multiprocessors
        self.calls = 0

    def operation(self, direction, kernels):
        assert kernels == "resident"
        return getattr(self, direction)

    def call(self, direction, sizes, weights, options, tensors):
        self.calls += 1
        branches = [(*w.shape[2:], w.shape[0] // 4) for w in weights if w is not None]
        call = [self.multiprocessors, *sizes, *options, len(branches), *sum(branches, ())]
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        getattr(self.kernels, f"resident_{direction}")(
            (ctypes.c_int64 * len(call))(*call), (ctypes.c_void_p * len(pointers))(*pointers)
        )

    def forward(self, z_0, z_1, weight_0, weight_1, bias, h, c, h_0, c_0, keep):
        batch, steps, _, *size = h.shape
        for result in (h, c):
            result.fill_(float("nan"))
        tensors = (z_0, z_1, weight_0, weight_1, bias, h, c, h_0, c_0)
        self.call("forward", (batch, steps, *size), (weight_0, weight_1), (keep, 0, 0, 0, 0, 0), tensors)

    def backward(self, gates_0, gates_1, weight_0, weight_1, c, c_0, dh, dc_n, lengths, dh_0, dc, dbias):
        steps, batch, *size, _ = c.shape
        for result in (dh_0, dc, dbias):
            if result is not None:
                result.fill_(float("nan"))
        strides = (0,) * 4 if dh is None else dh.stride()
        tensors = (gates_0, gates_1, weight_0, weight_1, c, c_0, dh, dc_n, lengths, dh_0, dc, dbias)
        options = (0, c.dtype != torch.float32, *strides)
        self.call("backward", (batch, steps, *size), (weight_0, weight_1), options, tensors)


@pytest.fixture
def on_the_host(problem, host_kernels, monkeypatch):
    host = OnTheHost(host_kernels, MULTIPROCESSORS.get(problem, 132))
    monkeypatch.setattr(sm90, "operation", host.operation)
    yield
    assert host.calls == 1


def close(got, want):
    return (got.double() - want).norm() <= TOLERANCE[torch.bfloat16] * want.norm()


def test_what_is_written_is_never_taken_for_absent(host_kernels):
    told = host_kernels.resident_is_told
    told.restype, told.argtypes = ctypes.c_bool, [ctypes.c_uint32]
    neighbours = (0, 0x8000, 0x3F80, 0x7FFF, 0xFFFE, 0xFFFF)
    assert all(told(half | other << 16) and told(other | half << 16) for half in range(1 << 16) for other in neighbours)


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_forward(on_the_host, problem, state):
    z, weights, h_0, c_0 = make(PROBLEMS[problem], torch.bfloat16, state, "cpu")
    want_h, want_c, want_gates = equations(z, weights, h_0, c_0)
    h, c = sm90.forward(z, weights, h_0, c_0, state, None, "resident")
    assert close(h, want_h)
    assert close(c, want_c[:, -c.shape[1] :])
    if state:
        assert all(map(close, z, want_gates))


@pytest.mark.parametrize("how", ["state", "no state", "lengths"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_backward(on_the_host, problem, how):
    z, weights, h_0, c_0 = make(PROBLEMS[problem], torch.bfloat16, how != "no state", "cpu")
    gates, c, dh, dc_n, lengths = make_backward(z, sum(weights.sizes), torch.bfloat16, how)
    want = gradients(gates, c, weights, h_0, c_0, dh, dc_n, lengths)
    dh_0, dc_0, dbias = sm90.backward(gates, c, weights, h_0, c_0, dh, dc_n, lengths, True, "resident")
    assert all(map(close, [*gates, dc_0, dbias, *([] if dh_0 is None else [dh_0])], want))


def test_every_way_to_share_out_a_gradient_is_run():
    plans = [
        PLANS["backward"](
            batch=batch,
            height=size[0],
            width=size[1],
            branches=[(*sides(kernel), channels) for kernel, channels in kernels],
            multiprocessors=MULTIPROCESSORS.get(problem, 132),
        )
        for problem, (batch, _, size, kernels) in PROBLEMS.items()
    ]
    assert {plan.split for plan in plans} == {1, 2}
    assert len({plan.window for plan in plans}) > 1
