"""The tensor-core kernels: their plans, the kernels themselves run on a CPU by sm80_host.cpp, and runs on a GPU."""

import random

import pytest
import torch
from problems import PROBLEMS, Problem, assert_as_close, assert_close, assert_graph_replays, assert_repeats
from step_kernels import LARGE, SERVED, OnTheHost, build, passes

from mkconvlstm_cuda import _C, Branch, cuda_backend, library, sm80, sm90

gpu = [pytest.mark.gpu, pytest.mark.skipif(library.load("cuda") is not None, reason=str(library.load("cuda")))]

# Slices of depth that are not full, several splits' worth of products, and rows of a kernel in several bands.
MORE = {
    "two slices": Problem({3: 40, 1: 30}, batch=1, steps=2, size=(5, 7)),
    "dilated": Problem([Branch((1, 5), 3, dilation=7), Branch(3, 5, dilation=20)], steps=2, size=(9, 21)),
    "wide": Problem({(1, 19): 2, (3, 1): 3}, batch=2, steps=2, size=(5, 31)),
}


def test_random_plans():
    rng = random.Random(0)
    for _ in range(3000):
        batch, height, width = (rng.choice([1, 2, rng.randint(1, 200)]) for _ in range(3))
        branches = [
            (rng.randint(1, 600), *(rng.randrange(1, 25, 2) for _ in range(2)), rng.randint(1, 4), rng.randint(1, 20))
            for _ in range(rng.randint(1, 6))
        ]
        element_bytes = rng.choice([2, 4])
        multiprocessors, shared_memory = rng.choice([(1, 101376), (84, 101376), (108, 166912), (132, 232448)])
        plan = _C.plan_sm80(
            batch=batch, height=height, width=width, branches=branches, element_bytes=element_bytes,
            multiprocessors=multiprocessors, shared_memory=shared_memory,
        )  # fmt: skip
        context = f"{batch, height, width, branches, element_bytes, multiprocessors} -> {plan}"
        pixels, hidden = batch * height * width, sum(b[0] for b in branches)
        assert sorted(plan.order) == list(range(len(branches))), context
        ends = [first + -(-branches[r][0] // 16) for r, first in zip(plan.order, plan.first_blocks, strict=True)]
        assert [0, *ends] == [*plan.first_blocks, plan.forward.blocks_y], context
        assert plan.backward.blocks_y == -(-hidden // 64), context

        slices = -(-hidden * element_bytes // 128)
        work = {
            "forward": [(b[1] * b[2] * slices, -(-b[0] // 16)) for b in branches],
            "backward": [(sum(b[1] * b[2] * -(-4 * b[0] * element_bytes // 128) for b in branches), -(-hidden // 64))],
        }
        for name, tiles in work.items():
            p = getattr(plan, name)
            assert p.block_pixels in (64, 128), context
            assert p.blocks_x == -(-pixels // p.block_pixels), context
            assert p.shared_memory <= shared_memory, context
            # Products are shared out among as many blocks as run at once, and no block has only a few.
            splits = [max(1, (2 * products + p.share) // (2 * p.share)) for products, _ in tiles]
            assert p.splits == max(splits) <= 8, context
            blocks = sum(p.blocks_x * n * count for (_, n), count in zip(tiles, splits, strict=True))
            at_once = multiprocessors * max(1, min(3, shared_memory // p.shared_memory))
            assert p.splits == 1 or (blocks <= at_once and p.share >= 8), context
            # The smaller tile only where the larger one would leave multiprocessors idle, or does not fit.
            if p.block_pixels == 64 and p.shared_memory + p.band_slots * 64 * 128 <= shared_memory:
                assert 8 * -(-pixels // 128) * p.blocks_y < 7 * multiprocessors, context
            check_bands(branches, p, context)


def check_bands(branches, p, context):
    """In any run of products that are in flight together, wherever it begins, no band is overwritten too early."""
    rows = 0
    for _, _, width, _, dilation in branches:
        taps = min(width, 16 // dilation + 1)
        rows = max(rows, p.block_pixels + (taps - 1) * dilation)
        bands = [n // taps for n in range(width)]
        sequence = [(row, band) for row in range(6) for band in bands]
        for first in range(len(sequence) - 3):
            assert len(set(sequence[first : first + 4])) <= p.band_slots, context
    assert p.band_rows == -(-rows // 8) * 8, context


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ({"batch": -1}, "batch must not be negative"),
        ({"branches": [(1, 1, 1, 1, 1)] * 33}, "1 to 32 hidden branches, got 33"),
        ({"branches": [(4, 2, 3, 1, 1)]}, "kernel sizes must be odd and at most 32768, got 2x3"),
        ({"shared_memory": 49152}, "too little shared memory"),
    ],
)
def test_refusals(problem, message):
    with pytest.raises(ValueError, match=message):
        _C.plan_sm80(**{"batch": 2, "height": 4, "width": 5, "branches": [(4, 3, 3, 1, 1)], **problem})


def test_paper_size():
    plan = _C.plan_sm80(batch=10, height=14, width=14, branches=[(128, 3, 3, 1, 1), (128, 5, 5, 1, 1)])
    assert plan.order == [1, 0]
    common = "band_slots=2, band_rows=136, shared_memory=67840)"
    assert repr(plan.forward) == f"Sm80Pass(block_pixels=128, blocks_x=16, blocks_y=16, splits=2, share=50, {common}"
    assert repr(plan.backward) == f"Sm80Pass(block_pixels=128, blocks_x=16, blocks_y=4, splits=6, share=46, {common}"
    assert _C.plan_sm80(batch=0, height=4, width=4, branches=[(4, 3, 3, 1, 1)]).forward.blocks_x == 0


def test_packed_weights():
    """Products of packed weights with a slice of channels for each tap, against the convolution that they stand for."""
    weight = torch.arange(4 * 18 * 70 * 3 * 1, dtype=torch.float32).reshape(4 * 18, 70, 3, 1).to(torch.bfloat16)
    forward, backward = sm80.pack_forward(weight), sm80.pack_backward(weight)
    assert forward.shape == backward.shape == (2, 2 * 3, 64, 64)
    gate, channel, depth, tap = 2, 17, 65, 1
    assert forward[1, 3 + tap, 16 * gate + channel - 16, depth - 64] == weight[18 * gate + channel, depth, tap, 0]
    assert backward[1, tap, depth - 64, 18 * gate + channel] == weight[18 * gate + channel, depth, 2 - tap, 0]
    for padding in (forward[1, :, 2:16], forward[:, 3:, :, 6:], backward[1, :, 6:], backward[:, 3:, :, 8:]):
        assert not padding.any()


def test_rounding_to_tf32():
    x = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-11 - 2**-23, -1 - 2**-11, 3.0e38, 0.0])
    wanted = torch.tensor([1.0, 1 + 2**-10, 1.0, -1 - 2**-10, 3.0e38, 0.0])
    torch.testing.assert_close(sm80.round_to_tf32(x), wanted, rtol=2**-11, atol=0)
    assert torch.equal(sm80.round_to_tf32(x)[:4], wanted[:4])


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory):
    return build("sm80", tmp_path_factory.mktemp("sm80"))


@pytest.fixture(params=[(128, 10**6), (64, 4)], ids=["large tile", "small tile, shared out"])
def on_the_host(request, host_kernels, monkeypatch):
    """The ``cuda`` backend in the place of ``aten``, on CPU tensors, by the kernels in sm80_host.cpp alone."""
    block_pixels, share = request.param

    def launch(pass_, pixels):
        band_rows = pass_.band_rows - pass_.block_pixels + block_pixels
        return -(-pixels // block_pixels), (block_pixels, share, pass_.band_slots, band_rows)

    host = OnTheHost(host_kernels, "sm80", lambda n, **problem: _C.plan_sm80(element_bytes=n, **problem), launch)
    host.take_over(monkeypatch)
    monkeypatch.setattr(sm90, "device_limits", lambda _: "no GPU")
    monkeypatch.setattr(sm80, "device_limits", lambda _: (132, 232448))
    return host


@pytest.mark.parametrize("name", [*SERVED, *MORE])
def test_kernels_on_the_host(name, on_the_host, monkeypatch):
    """In float32: on the host no precision is lost to TF32, but for the weights'."""
    monkeypatch.setattr(sm80, "round_to_tf32", lambda x: x)
    problem = (SERVED | MORE)[name]
    assert_close(problem.run("aten", torch.float32), problem.run("reference"), 3e-6)
    assert on_the_host.calls == passes(problem)


@pytest.mark.parametrize("name", ["two kernel sizes", "two slices", "dilated", "peephole pixel, current"])
def test_bfloat16_on_the_host(name, on_the_host):
    problem = (SERVED | MORE)[name]
    assert_close(problem.run("aten", torch.bfloat16), problem.run("reference"), 2e-2)
    assert on_the_host.calls == 2


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("two kernel sizes", torch.float64, "tensor cores do not compute in torch.float64"),
        ("mix gate", torch.bfloat16, "1x1 convolutions"),
        ("bottleneck and dilation", torch.float16, "1x1 convolutions"),
        ("33 branches", torch.bfloat16, "1 to 32 hidden branches, got 33"),
        ("two kernel sizes", torch.bfloat16, None),
        ("two kernel sizes", torch.float32, None),
    ],
)
def test_what_the_kernels_serve(name, dtype, reason, monkeypatch):
    monkeypatch.setattr(sm80, "device_limits", lambda _: (108, 166912))
    problem = (PROBLEMS | {"33 branches": Problem([Branch(1, 1)] * 33)})[name]
    hidden = problem.layer(dtype=dtype).cells[0].hidden_transition.weights()
    parts = [torch.empty(1, 1, 4 * size, 2, 3, dtype=dtype) for size in hidden.parts]
    got = sm80.refusal(parts, hidden)
    assert got is None if reason is None else reason in got
    if dtype == torch.float32:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        assert "does not allow TF32" in sm80.refusal(parts, hidden)


@pytest.fixture
def kernels_alone(monkeypatch):
    """The ``cuda`` backend serves by the tensor-core kernels, or fails."""
    for other in ("aten", "triton_backend"):
        monkeypatch.setattr(cuda_backend, other, None)
    monkeypatch.setattr(sm90, "device_limits", lambda _: "not under test")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


ON_GPU = SERVED | MORE | LARGE
FLOORS = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-10}


@pytest.mark.usefixtures("poisoned", "kernels_alone")
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("name", ON_GPU)
    def test_as_close_as_torch(self, name, dtype):
        assert_as_close(ON_GPU[name], "cuda", dtype, "cuda", FLOORS[dtype])

    def test_without_gradients_and_again(self, dtype):
        assert_repeats(LARGE["odd"], "cuda", dtype, "cuda", times=20)

    def test_in_a_cuda_graph(self, dtype):
        assert_graph_replays(LARGE["odd"], "cuda", dtype)
