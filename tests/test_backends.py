"""Every backend computes what the reference does: output, states and every gradient."""

import weakref
from dataclasses import replace

import pytest
import torch
from mkconvlstm_cuda.bench.contestants import Contestant
from mkconvlstm_cuda.bench.measure import kept_bytes
from problems import LIVE, PROBLEMS, Problem, assert_close, backends_here

from mkconvlstm_cuda import Branch, FlowAttention, MKConvLSTM, aten, backward, compiled, dispatch, library
from mkconvlstm_cuda.check import ROUNDING

WEIGHTS_ONLY = [name for name in PROBLEMS if name not in LIVE]
TOLERANCES = {torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_float64_agrees_to_1e10(name, backend):
    problem = PROBLEMS[name]
    assert_close(problem.run(backend), problem.run("reference"), 1e-10)


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_aten_computes_the_same_without_the_cpu_library(name, monkeypatch):
    monkeypatch.setattr(library, "load", lambda kind: f"no {kind} library today")
    assert aten.steps_on(torch.device("cpu")) == (aten.gate_step, aten.gate_step_backward)
    problem = PROBLEMS[name]
    assert_close(problem.run("aten"), problem.run("reference"), 1e-10)


def test_aten_takes_the_cpu_library():
    assert aten.steps_on(torch.device("cpu")) == (compiled.gate_step, compiled.gate_step_backward)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_backward_in_many_spans_agrees(name, recompute, monkeypatch):
    monkeypatch.setattr("mkconvlstm_cuda.backward.SPAN_BYTES", 1)
    problem = PROBLEMS[name]
    assert_close(problem.run("aten", recompute=recompute), problem.run("reference"), 1e-10)


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"norm": "batch", "attention": FlowAttention(1)}], ids=str)
@pytest.mark.parametrize("pool", [False, True])
def test_one_image_through_a_live_input_transition(options, pool):
    """torch's batch norm in eval takes odd strides of a gradient's single image for what they are not."""
    problem = Problem([Branch(1, 2, pool=pool)], {"hidden_kernels": {3: 2}, **options}, None, False, 1, 1, 1, (6, 3))
    grads = []
    for backend in ("reference", "aten"):
        layer = problem.layer(backend).eval()
        inputs = problem.inputs(layer)
        y = problem.call(layer, **inputs)[0]
        wanted = (*inputs.values(), *layer.parameters())
        grads.append(torch.autograd.grad(y.sin().sum(), wanted, allow_unused=True))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_spans_are_even_and_complete():
    for steps, count in ((1, 1), (20, 3), (7, 9), (5, 0)):
        pieces = backward.spans(steps, count)
        assert len(pieces) == max(1, min(steps, count))
        assert [t for piece in pieces for t in range(piece.start, piece.stop)] == list(range(steps))
        sizes = {piece.stop - piece.start for piece in pieces}
        assert max(sizes) - min(sizes) <= 1


def test_the_last_of_many_pieces_is_twice_a_share():
    cases = (
        ((1, 20, 3, 8, 8), 16, [20]),
        ((10, 20, 512, 14, 14), 256, [3, 3, 3, 3, 8]),
        ((8, 4, 8, 96, 96), 64, [1, 1, 2]),
        ((8, 2, 64, 96, 96), 64, [1, 1]),
    )
    for shape, hidden, wanted in cases:
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        pieces = backward.pieces(x, hidden, torch.bfloat16)
        assert [piece.stop - piece.start for piece in pieces] == wanted
        assert [t for piece in pieces for t in range(piece.start, piece.stop)] == list(range(shape[1]))


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "name", ["two kernel sizes", "mix gate, tanh", "peephole pixel, current", "recompute", "lengths"]
)
def test_low_precision_is_as_close_as_torch(name, dtype, backend):
    """Each tensor at most twice as far from float64 as the reference's, torch's own arithmetic, in the same dtype."""
    problem = PROBLEMS[name]
    exact, torchs, ours = problem.run("reference"), problem.run("reference", dtype), problem.run(backend, dtype)

    def errors(results):
        return {n: float((r.double() - exact[n]).norm() / exact[n].norm()) for n, r in results.items()}

    assert max(errors(torchs).values()) < TOLERANCES[dtype]
    for n, error in errors(ours).items():
        assert error <= max(2 * errors(torchs)[n], ROUNDING[dtype]), n


@pytest.mark.parametrize("name", [*LIVE, "inception"])
def test_live_parts_fall_back_with_a_reason(name):
    problem = PROBLEMS[name]
    layer = problem.layer("auto")
    problem.call(layer, **problem.inputs(layer))
    assert layer.last_backend == "reference"
    named = problem.layer("aten")
    with pytest.raises(
        ValueError, match=r"backend: 'aten' cannot serve this call: its hidden transition has .*(norm|pool)"
    ):
        problem.call(named, **problem.inputs(named))


def test_batch_norm_folds_into_the_weights_in_eval():
    problem = Problem([*PROBLEMS["bottleneck and dilation"].kernels], {"norm": "batch", "mix": "gate"})
    wanted = problem.layer("reference").eval()
    folded = problem.layer("aten").eval()
    inputs = problem.inputs(wanted)
    for a, b in zip(problem.call(wanted, **inputs), problem.call(folded, **inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert folded.last_backend == "aten"


@pytest.mark.parametrize("backend", ["reference", *backends_here()])
@pytest.mark.parametrize("keep_state", [False, True])
def test_only_what_is_asked_for_gets_a_gradient(backend, keep_state):
    problem = Problem(options={"peephole": "channel"}, state=keep_state)
    layer = problem.layer(backend)
    inputs = problem.inputs(layer)
    tensors = inputs | dict(layer.named_parameters())
    for name in tensors:
        for other, t in tensors.items():
            t.grad = None
            t.requires_grad_(other == name)
        output, _, c_n = problem.call(layer, **inputs)
        (output.sum() + c_n.sum()).backward()
        assert [other for other, t in tensors.items() if t.grad is not None] == [name]


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.parametrize("recompute", [False, True])
def test_a_retained_graph_gives_the_same_gradients_again(backend, recompute):
    problem = Problem(options={"recompute": recompute, "peephole": "channel"})
    layer = problem.layer(backend)
    inputs = problem.inputs(layer)
    outputs = problem.call(layer, **inputs)
    wanted = (*inputs.values(), *layer.parameters())
    first = torch.autograd.grad([y.sum() for y in outputs], wanted, retain_graph=True)
    second = torch.autograd.grad([y.sum() for y in outputs], wanted)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_backward_lets_go_of_the_input():
    """An output that is kept after backward, in a list of losses say, holds no more than torch's own would."""
    layer, x = MKConvLSTM(2, {3: 2}, backend="aten"), torch.randn(1, 3, 2, 4, 4, requires_grad=True)
    seen = x * 2
    alive = weakref.ref(seen)
    output, _ = layer(seen)
    del seen
    output.sum().backward()
    assert alive() is None


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kernels", [{3: 2}, {1: 1, 3: 1}], ids=str)
def test_backends_get_time_major_channels_last_parts(channels, kernels, monkeypatch):
    layouts = []

    def spy(z, *args):
        layouts.append(all(p.permute(1, 0, 3, 4, 2).is_contiguous() for p in z))
        return aten.forward(z, *args)

    monkeypatch.setitem(dispatch.BACKENDS, "aten", replace(dispatch.BACKENDS["aten"], forward=spy))
    MKConvLSTM(channels, kernels, backend="aten")(torch.randn(2, 3, channels, 4, 5))
    assert layouts == [True]


@pytest.mark.parametrize("output", [0, 1, 2])
def test_each_output_alone_has_gradients(output):
    problem = PROBLEMS["lengths"]
    grads = []
    for backend in ("reference", "aten"):
        layer = problem.layer(backend)
        inputs = problem.inputs(layer)
        y = problem.call(layer, **inputs)[output]
        grads.append(torch.autograd.grad(y.sin().sum(), (*inputs.values(), *layer.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.parametrize("batch", [0, 2])
def test_a_gradient_cut_out_of_wider_images(batch, backend):
    """Outputs side by side: each one's gradient has rows that lie apart."""
    problem = Problem(batch=batch)
    grads = []
    for name in ("reference", backend):
        layer = problem.layer(name)
        inputs = problem.inputs(layer)
        y = problem.call(layer, **inputs)[0]
        wide = torch.cat([y, y.detach()], dim=-1)
        grads.append(torch.autograd.grad(wide, (*inputs.values(), *layer.parameters()), wide.detach().cos()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_an_input_changed_before_backward_is_an_error():
    for frozen in (False, True):
        layer = MKConvLSTM(2, {3: 2}, backend="aten", recompute=True)
        layer.cells[0].input_transition.requires_grad_(not frozen)
        x = torch.randn(1, 2, 2, 4, 4)
        output, _ = layer(x)
        x.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recompute_keeps_h_and_a_few_c_alone(dtype, monkeypatch):
    monkeypatch.setattr("mkconvlstm_cuda.backward.SPAN_BYTES", 1)
    layer = MKConvLSTM(3, {3: 8, 5: 8}, recompute=True, backend="aten", dtype=dtype)
    h, c_t = dtype.itemsize * 2 * 10 * 16 * 8 * 8, 4 * 2 * 16 * 8 * 8
    contestant = Contestant(layer, torch.randn(2, 10, 3, 8, 8, dtype=dtype), None)
    assert kept_bytes(contestant) == h + (backward.MOST_PIECES - 1) * c_t
    layer.recompute = False
    assert kept_bytes(contestant) == 5 * h + 10 * c_t


def test_operation_passes_opcheck():
    z = [torch.randn(3, 2, 4, 5, 8).permute(1, 0, 4, 2, 3)]
    hidden = [torch.randn(8, 2, 3, 3), None, None, None, None, None]
    h_0, c_0 = torch.randn(2, 2, 4, 5), torch.randn(2, 2, 4, 5)
    for keep in (True, False):
        args = (z, hidden, [1, 1], False, h_0, c_0, None, "previous", None, keep, "aten")
        torch.library.opcheck(torch.ops.mkconvlstm.sequence_forward, args)
    gates = [torch.rand(3, 2, 4, 5, 8).permute(1, 0, 4, 2, 3)]
    h, c = torch.randn(2, 3, 2, 4, 5), torch.randn(3, 2, 4, 5, 2).permute(1, 0, 4, 2, 3)
    args = (gates, h, c, hidden, [1, 1], False, h_0, c_0, None, "previous", torch.randn_like(h), c_0, None)
    for needs_bias in (True, False):
        torch.library.opcheck(torch.ops.mkconvlstm.sequence_backward, (*args, needs_bias, "aten"))


def test_operation_is_opaque_to_autograd_and_export():
    z, weight = torch.randn(2, 1, 4, 5, 8).permute(1, 0, 4, 2, 3), torch.randn(8, 2, 3, 3, requires_grad=True)
    args = ([z], [weight, *[None] * 5], [1, 1], False, None, None, None, "previous", None, True, "aten")
    torch.library.opcheck(torch.ops.mkconvlstm.sequence_forward, args, test_utils=("test_schema", "test_faketensor"))
    layer = MKConvLSTM(2, {3: 2, 5: 1}, backend="aten")
    x = torch.randn(1, 2, 2, 4, 5)
    exported = torch.export.export(layer, (x,))
    called = {
        str(n.target) for m in exported.graph_module.modules() for n in getattr(m, "graph", torch.fx.Graph()).nodes
    }
    assert "mkconvlstm.layer.default" in called
    torch.testing.assert_close(exported.module()(x)[0], layer(x)[0])


def test_every_backend_is_listed_and_gives_reasons():
    for backend in dispatch.BACKENDS.values():
        reason = backend.available()
        assert reason is None or (isinstance(reason, str) and len(reason) > 10)
    with pytest.raises(ValueError, match="backend: got 'cudnn', wanted one of 'auto'"):
        MKConvLSTM(1, {3: 1}, backend="cudnn")
