"""The Triton backend: plans, kernels in Triton's interpreter, compilation ahead of time, and runs on a GPU."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from problems import PROBLEMS, Problem, assert_as_close, assert_close

from mkconvlstm_cuda import Branch, dispatch
from mkconvlstm_cuda.convolution import BranchWeights, TransitionWeights

triton = pytest.importorskip("triton")
launch = pytest.importorskip("mkconvlstm_cuda.triton_kernels.launch")
plan = launch.plan
layout = pytest.importorskip("mkconvlstm_cuda.triton_kernels.layout")

INTERPRETED = launch.INTERPRETED
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_kernels_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")]

PAPER = plan.Problem(10, 14, 14, (plan.Kernel(128, 3, 3), plan.Kernel(128, 5, 5)), 2, True)
RADAR = plan.Problem(4, 96, 96, (plan.Kernel(32, 3, 3), plan.Kernel(32, 5, 5)), 2, True)
SMALL = plan.Problem(1, 32, 32, (plan.Kernel(32, 3, 3), plan.Kernel(32, 5, 5)), 2, True)
ODD = plan.Problem(3, 13, 7, (plan.Kernel(5, 1, 3), plan.Kernel(40, 7, 5, (2, 1)), plan.Kernel(1, 1, 1)), 4, True)
EXACT = plan.Problem(2, 9, 9, (plan.Kernel(12, 3, 3),), 4, False)
PLANS = {"paper": PAPER, "radar": RADAR, "small": SMALL, "odd": ODD, "exact": EXACT}
DEVICES = {"H100": (132, 232448), "A100": (108, 166912), "consumer": (36, 101376)}

SMALL_TILES = {
    "whole tiles": plan.Config(32, 16, 16, split=False, warps=4),
    "cut tiles": plan.Config(16, 16, 16, split=True, warps=4),
}
REFUSED = {
    "bottleneck and dilation": "bottleneck",
    "recompute, bottleneck": "bottleneck",
    "mix gate": "mix",
    "mix gate, tanh": "mix",
    "mix full": "mix",
    "mix full, tanh": "mix",
    "recompute, mix, peephole": "mix",
    "group norm": "norm",
    "layer norm": "norm",
    "batch norm": "norm",
    "layer norm by pixel": "norm",
    "norm of the gates": "norm",
    "inception": "norm",
    "pool": "pool",
}
SERVED = [name for name in PROBLEMS if name not in REFUSED] + ["dilation"]
PROBLEMS_HERE = PROBLEMS | {"dilation": Problem([Branch(1, 1), Branch(3, 2, dilation=2)])}


def schedule(problem, backward, device):
    config = plan.choose(problem, backward, *DEVICES[device])
    tiles = (plan.backward_tiles if backward else plan.forward_tiles)(problem, config)
    programs = DEVICES[device][0] * config.programs_per_sm
    return config, tiles, programs, plan.schedule(problem, config, tiles, programs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", PLANS)
def test_a_schedule_does_everything_once(name, backward, device):
    config, tiles, programs, s = schedule(PLANS[name], backward, device)
    done = Counter((x.m_tile, x.channel_first, x.weight + k) for x in s.segments for k in range(x.k_first, x.k_last))
    m_tiles = -(-PLANS[name].rows // config.block_m)
    parts = [part for tile in tiles for part in tile]
    assert len(done) == m_tiles * sum(part.iterations(config.block_k) for part in parts)
    assert set(done.values()) == {1}
    assert len(s.programs) <= programs + 1
    assert s.programs[0] == 0
    assert s.programs[-1] == len(s.segments)
    finishes = [f for tile in tiles for f in plan.finishes(PLANS[name], tile)]
    assert Counter(c for f in finishes for c in range(f.channel_first, f.channel_end)) == Counter(
        range(PLANS[name].hidden)
    )
    for f in finishes:
        assert 0 <= f.channel_first - f.branch_first < f.channel_end - f.branch_first <= f.branch_channels
        assert f.branch_channels == PLANS[name].kernels[f.branch].channels
    assert {(f.branch, f.channel_first, f.column_first) for f in s.finishes} == {
        (f.branch, f.channel_first, f.column_first) for f in finishes
    }


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["paper", "radar", "small"])
def test_cut_tiles_are_summed_from_their_own_slots(name, backward):
    config = plan.Config(128, 64, 64, split=True)
    tiles = (plan.backward_tiles if backward else plan.forward_tiles)(PLANS[name], config)
    s = plan.schedule(PLANS[name], config, tiles, 132)
    writers = {}
    for program, (first, last) in enumerate(zip(s.programs, s.programs[1:], strict=False)):
        for n, x in enumerate(s.segments[first:last]):
            assert bool(x.is_first) == (x.slot not in writers)
            following = s.segments[first + n + 1] if first + n + 1 < last else None
            assert bool(x.is_last) == (following is None or following.slot != x.slot)
            assert writers.setdefault(x.slot, (program, x.m_tile, x.channel_first)) == (
                program,
                x.m_tile,
                x.channel_first,
            )
    summed = dict.fromkeys((f.m_tile, f.slot, f.slots, f.channel_first - f.column_first) for f in s.finishes)
    slots = [(slot, m, channel) for m, first, count, channel in summed for slot in range(first, first + count)]
    assert [slot for slot, _, _ in slots] == list(range(s.slots))
    assert all(writers[slot][1:] == (m, channel) for slot, m, channel in slots)


@pytest.mark.parametrize(
    ("name", "backward", "most"), [("paper", False, 1.1), ("paper", True, 1.1), ("radar", True, 1.1)]
)
def test_programs_have_even_shares(name, backward, most):
    _, _, _, s = schedule(PLANS[name], backward, "H100")
    loads = [
        sum(x.k_last - x.k_first for x in s.segments[a:b]) for a, b in zip(s.programs, s.programs[1:], strict=False)
    ]
    assert max(loads) <= most * sum(loads) / len(loads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PLANS)
def test_a_configuration_fits_the_device(name, device):
    for backward in (False, True):
        config = plan.choose(PLANS[name], backward, *DEVICES[device])
        stage = (config.block_m + config.block_n) * config.block_k * PLANS[name].element_size
        assert stage * config.stages * config.programs_per_sm <= DEVICES[device][1]


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
    problem = dispatch.Problem(torch.device("cuda"), torch.float16, 1, 2048, 2048, hidden_sizes=(128,))
    assert "31 bits" in supports(problem)
    assert supports(dispatch.Problem(torch.device("cuda"), torch.float16, 1, 2048, 2048, hidden_sizes=(64,))) is None


def test_a_second_launch_of_the_like_reuses_the_compiled_kernel(monkeypatch):
    launches = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: launches.append(("again", grid, args))

    class Kernel:
        arg_names = ("a", "n", "X", "Y")

        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(("first", grid, args, options)) or Compiled()

    monkeypatch.setattr(triton.compiler, "CompiledKernel", Compiled)
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
    """The interpreter has to be switched on before Triton is imported: another process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@interpreted
@pytest.mark.parametrize(
    ("name", "tiles"),
    [
        (name, "cut tiles")
        for name in SERVED
        if not any(word in name for word in ("two layers", "bidirectional", "mask"))
    ]
    + [(name, "whole tiles") for name in ("two kernel sizes", "no state", "peephole pixel, current", "dilation")],
)
def test_interpreted_float32_agrees_with_float64(name, tiles, monkeypatch):
    set_tiles(monkeypatch, SMALL_TILES[tiles])
    problem = PROBLEMS_HERE[name]
    assert_close(problem.run("triton", torch.float32), problem.run("reference"), 1e-5)


@interpreted
@pytest.mark.parametrize("name", ["two kernel sizes", "peephole pixel, current", "lengths"])
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


def images(shape, order, dtype=torch.float32):
    """Random [B, T, C, H, W] that lies in memory as ``order`` says, for example (1, 0, 3, 4, 2)."""
    t = torch.randn([shape[d] for d in order]).to(dtype)
    return t.permute([order.index(d) for d in range(5)])


CHANNELS_LAST, CHANNELS_FIRST, TIME_MAJOR = (0, 1, 3, 4, 2), (0, 1, 2, 3, 4), (1, 0, 3, 4, 2)


def check_layouts(device) -> None:
    for shape in ((2, 3, 5, 7, 3), (1, 2, 16, 4, 8), (3, 1, 70, 9, 10), (2, 2, 1, 5, 5), (2, 3, 4, 1, 1)):
        for source, target, dtype in (
            (CHANNELS_FIRST, TIME_MAJOR, torch.float32),
            (TIME_MAJOR, CHANNELS_FIRST, torch.float16),
            (CHANNELS_LAST, TIME_MAJOR, torch.float32),
            (CHANNELS_FIRST, CHANNELS_FIRST, torch.float32),
        ):
            x = images((shape[0], shape[1] + 1, *shape[2:]), source).to(device)[:, 1:]
            y = torch.full_like(images(shape, target, dtype), float("nan"), device=device)
            assert layout.copy(y, x)
            torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0)
        flat = images(shape, TIME_MAJOR).to(device).transpose(0, 1).flatten(0, 1)
        torch.testing.assert_close(layout.channel_sums(flat), flat.sum((0, 2, 3)), rtol=1e-5, atol=1e-5)
    odd = images((2, 3, 5, 7, 3), (0, 1, 3, 2, 4)).to(device)
    assert not layout.copy(torch.empty_like(odd), odd)


@interpreted
def test_interpreted_layouts():
    check_layouts("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
def test_layouts_on_a_gpu():
    check_layouts("cuda")


@compiled
@pytest.mark.parametrize("capability", [80, 90])
def test_layout_kernels_compile_without_a_gpu(capability, monkeypatch):
    launches = []
    monkeypatch.setattr(layout, "launch", lambda kernel, _, args, options: launches.append((kernel, args, options)))
    for dtype in (torch.bfloat16, torch.float32):
        x = images((2, 3, 32, 14, 14), CHANNELS_FIRST, dtype)
        layout.copy(images(x.shape, TIME_MAJOR, dtype), x)
        layout.copy(x, images(x.shape, TIME_MAJOR, dtype))
        layout.channel_sums(images(x.shape, TIME_MAJOR, dtype).transpose(0, 1).flatten(0, 1))
    for kernel, args, options in launches:
        assert "ptx" in compile_launch(kernel, args, options, capability).asm


def set_tiles(monkeypatch, config) -> None:
    monkeypatch.setattr(plan, "choose", lambda *_: config)
    launch.make_pass.cache_clear()
    monkeypatch.setattr(launch.make_pass, "cache_clear", launch.make_pass.cache_clear, raising=False)


@pytest.fixture(autouse=True)
def fresh_passes():
    yield
    launch.make_pass.cache_clear()


class Recorder:
    """Stands for a kernel: keeps its launches instead of running them."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def launches_of(problem, dtype, backward, monkeypatch, everything=False) -> list:
    """The launches of one pass of ``problem`` for an H100, on tensors without data."""
    launches = []
    for name in ("pack_kernel", "forward_kernel", "backward_kernel"):
        monkeypatch.setattr(launch, name, Recorder(getattr(launch, name), launches))
    monkeypatch.setattr(launch, "device_limits", lambda _: DEVICES["H100"])
    monkeypatch.setattr(launch, "tensor_cores_allowed", lambda _: problem.tensor_cores)

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def states(*shape, dtype=dtype):
        return empty(*shape, dtype=dtype).permute(1, 0, 4, 2, 3)

    b, t, f, h, w = problem.batch, 4, problem.hidden, problem.height, problem.width
    weights = TransitionWeights(
        tuple(BranchWeights(empty(4 * k.channels, f, k.height, k.width), dilation=k.dilation) for k in problem.kernels)
    )
    h_0 = empty(b, f, h, w) if everything else None
    c_0 = empty(b, f, h, w, dtype=torch.float32) if everything else None
    peephole = empty(3, f, h, w, dtype=torch.float32) if everything else None
    z = [states(t, b, h, w, 4 * k.channels) for k in problem.kernels]
    if backward:
        c = states(t, b, h, w, f, dtype=torch.float32)
        lengths = empty(b, dtype=torch.int64) if everything else None
        launch.backward(
            z, empty(b, t, f, h, w), c, weights, h_0, c_0, peephole, "current", empty(b, t, f, h, w), c_0, lengths
        )
    else:
        launch.forward(z, weights, h_0, c_0, peephole, "current", True, empty(4 * f) if everything else None)
    return launches


def compile_launch(kernel, args, options, capability: int):
    """The launch's kernel, compiled without a device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.float32: "fp32",
        torch.int32: "i32",
        torch.int64: "i64",
    }
    known = {"num_warps", "num_stages", "maxnreg"}
    compiler_options = {k: v for k, v in options.items() if k in known}
    constants = {k: v for k, v in options.items() if k.isupper()}
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    values = {name: values[name] for name in kernel.arg_names}
    signature, constexprs, attributes = {}, {}, {}
    unspecialised = {p.name for p in kernel.params if p.do_not_specialize}
    for n, (name, v) in enumerate(values.items()):
        if isinstance(v, torch.Tensor):
            signature[name] = f"*{kinds[v.dtype]}"
            attributes[(n,)] = [["tt.divisibility", 16]]
        elif isinstance(v, tuple):
            signature[name] = tuple(f"*{kinds[t.dtype]}" for t in v)
            attributes |= {(n, i): [["tt.divisibility", 16]] for i in range(len(v))}
        elif hasattr(v, "block_shape"):
            signature[name] = f"tensordesc<{kinds[v.base.dtype]}{list(v.block_shape)}>"
        elif name in constants or (v == 1 and name not in unspecialised):
            signature[name], constexprs[(n,)] = "constexpr", v
        else:
            signature[name] = "i32" if abs(v) < 2**31 else "i64"
            if v % 16 == 0 and name not in unspecialised:
                attributes[(n,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=compiler_options)


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("paper", torch.bfloat16), ("radar", torch.float16), ("odd", torch.float32), ("exact", torch.float32)],
    ids=str,
)
def test_kernels_compile_without_a_gpu(name, dtype, backward, capability, monkeypatch):
    launches = launches_of(PLANS[name], dtype, backward, monkeypatch, everything=name in ("odd", "exact"))
    assert [kernel.__name__ for kernel, *_ in launches][-1] == ("backward_kernel" if backward else "forward_kernel")
    for kernel, args, options in launches[-2:]:
        binary = compile_launch(kernel, args, options, capability)
        assert binary.metadata.shared <= DEVICES["H100" if capability == 90 else "A100"][1]
        if capability == 90 and name in ("paper", "radar") and kernel.__name__ != "pack_kernel":
            assert "wgmma" in binary.asm["ptx"]


LARGE = {
    "paper": Problem({3: 128, 5: 128}, batch=3, steps=5, channels=16, size=(14, 14)),
    "odd": Problem(
        {3: 24, (5, 7): 40}, {"peephole": "channel"}, (7, 1, 4), batch=3, steps=7, channels=3, size=(13, 37)
    ),
    "many tiles": Problem({3: 32, 5: 32}, batch=5, steps=2, channels=4, size=(96, 90), state=False),
    "long": Problem({3: 8, 5: 8}, batch=2, steps=100, channels=4, size=(10, 10)),
    "one pixel": Problem({1: 64}, batch=1, steps=4, channels=4, size=(1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*SERVED, *LARGE])
class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.usefixtures("poisoned")
    def test_as_close_to_float64_as_torch(self, name, dtype, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        assert_as_close((PROBLEMS_HERE | LARGE)[name], "triton", dtype, "cuda")


@pytest.mark.parametrize("name", ["paper", "odd", "many tiles"])
class TestMoreOnGpu:
    pytestmark = gpu

    @pytest.mark.usefixtures("poisoned")
    def test_tf32(self, name, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        assert_as_close(LARGE[name], "triton", torch.float32, "cuda", floor=1e-3)

    def test_without_gradients_and_again(self, name):
        """No gates are kept: the same outputs; and the same bits every time."""
        problem = LARGE[name]
        layer = problem.layer("triton", torch.bfloat16, "cuda")
        inputs = problem.inputs(layer, torch.bfloat16, "cuda")
        kept = problem.call(layer, **inputs)
        with torch.no_grad():
            dropped = problem.call(layer, **inputs)
        assert all(torch.equal(a, b) for a, b in zip(kept, dropped, strict=True))
        first, second = (problem.run("triton", torch.bfloat16, "cuda") for _ in range(2))
        recurrent = [n for n in first if n in ("output", "h_n", "c_n", "dh_0", "dc_0")]
        assert all(torch.equal(first[n], second[n]) for n in recurrent)

    def test_in_a_cuda_graph(self, name):
        problem = LARGE[name]
        layer = problem.layer("triton", torch.bfloat16, "cuda")
        x = problem.inputs(layer, torch.bfloat16, "cuda")["x"].detach()
        with torch.no_grad():
            wanted = layer(x)[0]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = layer(x)[0]
            output.zero_()
            graph.replay()
        assert torch.equal(output, wanted)
