"""The SIMT kernels: their plans, the kernels themselves run on a CPU by simt_host.cpp, and runs on a GPU."""

import random

import pytest
import torch
from problems import PROBLEMS, Problem, assert_as_close, assert_close, assert_graph_replays, assert_repeats
from step_kernels import LARGE, SERVED, OnTheHost, build, passes

from mkconvlstm_cuda import _C, Branch, check, cuda_backend, library, simt

gpu = [pytest.mark.gpu, pytest.mark.skipif(library.load("cuda") is not None, reason=str(library.load("cuda")))]


def blocks(pixels, pixels_per_thread):
    return -(-pixels // (8 * pixels_per_thread))


def test_random_plans():
    rng = random.Random(0)
    for _ in range(3000):
        batch, height, width = (rng.choice([1, 2, rng.randint(1, 200)]) for _ in range(3))
        branches = [
            (rng.randint(1, 600), *(rng.randrange(1, 12, 2) for _ in range(2)), rng.randint(1, 4), rng.randint(1, 4))
            for _ in range(rng.randint(1, 6))
        ]
        multiprocessors = rng.choice([1, 20, 108, 132])
        plan = _C.plan_simt(batch=batch, height=height, width=width, branches=branches, multiprocessors=multiprocessors)
        context = f"{batch, height, width, branches, multiprocessors} -> {plan}"
        pixels, hidden = batch * height * width, sum(b[0] for b in branches)

        # Every branch has its blocks of 16 channels, in the order of the taps; backward has blocks of 64 channels.
        assert sorted(plan.order) == list(range(len(branches))), context
        taps = [branches[r][1] * branches[r][2] for r in plan.order]
        assert taps == sorted(taps, reverse=True), context
        ends = [first + -(-branches[r][0] // 16) for r, first in zip(plan.order, plan.first_blocks, strict=True)]
        assert [0, *ends] == [*plan.first_blocks, plan.forward.blocks_y], context
        assert plan.backward.blocks_y == -(-hidden // 64), context

        # Pixels are covered, and a smaller tile is taken only where a larger one would leave multiprocessors idle.
        for p in (plan.forward, plan.backward):
            assert p.pixels_per_thread in (2, 4, 8), context
            assert p.blocks_x == blocks(pixels, p.pixels_per_thread), context
            enough = 8 * p.blocks_x * p.blocks_y >= 7 * multiprocessors
            larger = 8 * blocks(pixels, 2 * p.pixels_per_thread) * p.blocks_y >= 7 * multiprocessors
            assert enough or p.pixels_per_thread == 2, context
            assert not larger or p.pixels_per_thread == 8, context


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ({"batch": -1}, "batch must not be negative"),
        ({"height": 0}, "height and width positive"),
        ({"batch": 2**15, "height": 2**8, "width": 2**8}, r"batch \* height \* width must be below 2\^31"),
        ({"batch": 2**62, "height": 2}, r"must be below 2\^31"),
        ({"branches": []}, "1 to 32 hidden branches, got 0"),
        ({"branches": [(1, 1, 1, 1, 1)] * 33}, "1 to 32 hidden branches, got 33"),
        ({"branches": [(0, 3, 3, 1, 1)]}, "a branch must have 1 to .* channels, got 0"),
        ({"branches": [(4, 2, 3, 1, 1)]}, "kernel sizes must be odd and at most 32768, got 2x3"),
        ({"branches": [(4, 3, 3, 0, 1)]}, "dilations must be 1 to 32768, got 0x1"),
        ({"branches": [(2**20 + 1, 1, 1, 1, 1)]}, "at most 65535 blocks of 16 hidden channels, got 65537"),
        ({"branches": [(2**18, 101, 101, 1, 1)]}, r"taps \* channels of a convolution must be below 2\^31"),
        ({"multiprocessors": 0}, "multiprocessor"),
    ],
)
def test_refusals(problem, message):
    with pytest.raises(ValueError, match=message):
        _C.plan_simt(**{"batch": 2, "height": 4, "width": 5, "branches": [(4, 3, 3, 1, 1)], **problem})


def test_paper_size():
    plan = _C.plan_simt(batch=10, height=14, width=14, branches=[(128, 3, 3, 1, 1), (128, 5, 5, 1, 1)])
    assert plan.order == [1, 0]
    assert plan.first_blocks == [0, 8]
    assert repr(plan.forward) == "SimtPass(pixels_per_thread=8, blocks_x=31, blocks_y=16)"
    assert repr(plan.backward) == "SimtPass(pixels_per_thread=8, blocks_x=31, blocks_y=4)"
    assert repr(plan) == f"SimtPlan(forward={plan.forward}, backward={plan.backward})"
    assert _C.plan_simt(batch=0, height=4, width=4, branches=[(4, 3, 3, 1, 1)]).forward.blocks_x == 0


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory):
    return build("simt", tmp_path_factory.mktemp("simt"))


@pytest.fixture(params=[8, 4, 2])
def on_the_host(request, host_kernels, monkeypatch):
    """The ``cuda`` backend in the place of ``aten``, on CPU tensors, by the kernels in simt_host.cpp alone."""

    def launch(_, pixels):
        return blocks(pixels, request.param), (request.param, 0, 0, 0)

    host = OnTheHost(host_kernels, "simt", lambda _, **problem: _C.plan_simt(**problem), launch)
    host.take_over(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return host


@pytest.mark.parametrize("name", SERVED)
def test_kernels_on_the_host(name, on_the_host):
    problem = SERVED[name]
    assert_close(problem.run("aten"), problem.run("reference"), 1e-10)
    assert on_the_host.calls == passes(problem)


@pytest.mark.parametrize("name", ["two kernel sizes", "many pixels", "slices of depth"])
def test_float32_on_the_host(name, on_the_host):
    problem = SERVED[name]
    assert_close(problem.run("aten", torch.float32), problem.run("reference"), 3e-6)


def test_without_gradients_on_the_host(on_the_host):
    """No gates are kept, and of c the last alone; the hidden branches have biases of their own, from folded norms."""
    problem = Problem({1: 1, 3: 18}, {"norm": "batch"}, state=False)
    wanted, ours = (problem.layer(backend).eval() for backend in ("reference", "aten"))
    x = problem.inputs(wanted)["x"]
    with torch.no_grad():
        for a, b in zip(problem.call(wanted, x), problem.call(ours, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert on_the_host.calls == 1


def test_expanded_gradients_on_the_host(on_the_host):
    """dh as `output.sum().backward()` brings it: one element with strides of zero."""
    problem = SERVED["many pixels"]
    grads = []
    for backend in ("reference", "aten"):
        layer = problem.layer(backend)
        x = problem.inputs(layer)["x"]
        grads.append(torch.autograd.grad(problem.call(layer, x)[0].sum(), (x, *layer.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("two kernel sizes", torch.bfloat16, "torch.bfloat16 is neither float64"),
        ("mix gate", torch.float64, "1x1 convolutions"),
        ("bottleneck and dilation", torch.float32, "1x1 convolutions"),
        ("33 branches", torch.float64, "1 to 32 hidden branches, got 33"),
    ],
)
def test_what_the_kernels_cannot_serve(name, dtype, reason, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert_refused(name, dtype, reason)


def test_float32_on_tensor_cores_is_left_to_cudnn(monkeypatch):
    for allowed, reason in ((True, "torch allows TF32"), (False, None)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert_refused("two kernel sizes", torch.float32, reason)
        assert_refused("two kernel sizes", torch.float64, None)


def assert_refused(name, dtype, reason):
    problem = (PROBLEMS | {"33 branches": Problem([Branch(1, 1)] * 33)})[name]
    hidden = problem.layer(dtype=dtype).cells[0].hidden_transition.weights()
    parts = [torch.empty(1, 1, 4 * size, 2, 3, dtype=dtype) for size in hidden.parts]
    got = simt.refusal(parts, hidden)
    assert got is None if reason is None else reason in got


@pytest.fixture
def kernels_alone(monkeypatch):
    """The ``cuda`` backend serves by the SIMT kernels, or fails."""
    monkeypatch.setattr(cuda_backend, "aten", None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.usefixtures("poisoned", "kernels_alone")
@pytest.mark.parametrize("name", [*SERVED, *LARGE])
class TestOnGpu:
    pytestmark = gpu

    def test_float64(self, name):
        problem = (SERVED | LARGE)[name]
        assert_close(problem.run("cuda", device="cuda"), problem.run("reference", device="cuda"), 1e-10)

    def test_float32(self, name):
        assert_as_close((SERVED | LARGE)[name], "cuda", torch.float32, "cuda")


@pytest.mark.usefixtures("kernels_alone")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
class TestMoreOnGpu:
    pytestmark = gpu

    def test_without_gradients_and_again(self, dtype):
        assert_repeats(LARGE["odd"], "cuda", dtype, "cuda", times=20)

    def test_in_a_cuda_graph(self, dtype):
        assert_graph_replays(LARGE["odd"], "cuda", dtype)


class TestOpsOnGpu:
    pytestmark = gpu

    @pytest.mark.usefixtures("kernels_alone")
    def test_gradcheck(self):
        result = check.gradcheck_result("cuda", torch.device("cuda"))
        assert result.passed, result.note

    @pytest.mark.parametrize("name", ["mix gate, tanh", "bottleneck and dilation"])
    def test_the_rest_is_served_by_the_loop(self, name):
        problem = PROBLEMS[name]
        assert_close(problem.run("cuda", device="cuda"), problem.run("reference", device="cuda"), 1e-10)

    def test_refusals_name_the_argument(self):
        def step(z=(1, 2, 3, 3, 8), dtype=torch.float32, **other):
            sizes = {"weights": (9, 16, 64), "kernels": [3, 3, 1, 1], "state": (2, 2, 3, 3, 2), "c": (1, 2, 3, 3, 2)}
            sizes |= other
            made = {n: torch.zeros(s, device="cuda") for n, s in sizes.items() if n != "kernels"}
            torch.ops.mkconvlstm.simt_forward(
                [torch.zeros(z, dtype=dtype, device="cuda")], [made["weights"]], sizes["kernels"], None, None, None,
                None, False, True, made["state"], torch.zeros(2, 1, 2, 3, 3, device="cuda"), made["c"],
            )  # fmt: skip

        step()
        with pytest.raises(RuntimeError, match="parts must be a non-empty list of float64 or float32 tensors, got"):
            step(dtype=torch.float16)
        with pytest.raises(RuntimeError, match=r"parts must be \[steps, batch, height, width, 4 \* channels\]"):
            step(z=(2, 3, 3, 8))
        with pytest.raises(
            RuntimeError, match=r"weights\[0\] must be \[9, 16, 64\] float32 on cuda:0, got \[9, 2, 64\]"
        ):
            step(weights=(9, 2, 64))
        with pytest.raises(RuntimeError, match="a list of 1 tensors and kernels of 4 numbers, got 1 and 3"):
            step(kernels=[3, 3, 1])
        with pytest.raises(ValueError, match="kernel sizes must be odd"):
            step(kernels=[3, 2, 1, 1])
        with pytest.raises(RuntimeError, match=r"c must be \[1, 2, 3, 3, 2\] float32 .* got \[2, 2, 3, 3, 2\]"):
            step(c=(2, 2, 3, 3, 2))
