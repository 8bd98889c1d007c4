"""How torch traces, transforms and wraps the layer: graphs, export, torch.func, scalers, pickles, checkpoints."""

import pickle

import pytest
import torch
from problems import PROBLEMS, Problem
from torch.utils.checkpoint import checkpoint

from mkconvlstm_cuda import FlowAttention, MKConvLSTM

COMPILED = {
    "two kernel sizes": Problem(),
    "mix, tanh, peephole": Problem(options={"mix": "gate", "mix_activation": "tanh", "peephole": "channel"}),
    "bottleneck and dilation": PROBLEMS["bottleneck and dilation"],
    "two layers, bidirectional": Problem(options={"num_layers": 2, "bidirectional": True}),
    "recompute": Problem(options={"recompute": True}),
    "masks": Problem(options={"attention": FlowAttention(2), "recompute": True}),
    "group norm": PROBLEMS["group norm"],
    "no state, time first": Problem(options={"batch_first": False}, state=False),
}


def gradients(function, problem, layer, inputs):
    """Outputs of ``function``, which calls ``layer``, and the gradients of inputs and parameters."""
    outputs = problem.call(function, **inputs)
    wanted = (*inputs.values(), *layer.parameters())
    return [*outputs, *torch.autograd.grad([y.sin().sum() for y in outputs], wanted)]


def assert_compiles(problem, layer, inputs, **options):
    """One graph, and the layer's own outputs and gradients."""
    torch.compiler.reset()
    wanted = gradients(layer, problem, layer, inputs)
    compiled = torch.compile(layer, fullgraph=True, **options)
    for a, b in zip(gradients(compiled, problem, layer, inputs), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_a_graph_break(name):
    problem = COMPILED[name]
    layer = problem.layer()
    assert_compiles(problem, layer, problem.inputs(layer), backend="aot_eager")


def test_compiled_lengths_are_tensors():
    layer, x = MKConvLSTM(2, {3: 3}, bidirectional=True), torch.randn(3, 4, 2, 5, 5)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for lengths in (torch.tensor([1, 3, 4]), torch.tensor([4, 2, 1])):
        torch.testing.assert_close(compiled(x, lengths=lengths)[0], layer(x, lengths=lengths)[0])
    with pytest.raises(RuntimeError, match=r"lengths: wanted all in 1..T"):
        compiled(x, lengths=torch.tensor([1, 5, 2]))


def test_one_compiled_graph_serves_every_batch_and_length():
    layer = MKConvLSTM(2, {3: 3, 5: 2})
    torch.compiler.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for batch, steps in ((3, 4), (4, 7), (5, 3)):
        x = torch.randn(batch, steps, 2, 8, 9)
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])
    assert len(graphs) == 1


def test_inductor_trains_under_autocast():
    torch.compiler.reset()
    layer, x = MKConvLSTM(3, {3: 4}), torch.randn(2, 4, 3, 6, 5)
    compiled = torch.compile(layer, fullgraph=True)
    grads = []
    for function in (layer, compiled):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output, (_, c_n) = function(x)
        assert (output.dtype, c_n.dtype) == (torch.bfloat16, torch.float32)
        output.float().square().mean().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


def test_compiled_inference_keeps_nothing():
    torch.compiler.reset()
    layer, x = MKConvLSTM(3, {3: 4}), torch.randn(2, 4, 3, 6, 5)
    kept = []

    def spy(graph, _):
        kept.extend(n.args[-1] for n in graph.graph.nodes if n.target is torch.ops.mkconvlstm.layer)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=spy)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])
    compiled(x)
    assert kept == [False, True]


def test_traced_operation_passes_opcheck():
    x, h_0 = (torch.randn(2, 3, 2, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5, requires_grad=True))
    weights = [torch.randn(12, c, 3, 3, requires_grad=True) for c in (2, 3)]
    present = [True, *[False] * 5] * 2
    for recompute in (False, True):
        options = (present, "float32", [1, 1], False, [1, 1], False, "previous", recompute, "aten", True)
        args = (x, None, h_0, h_0.detach().cos(), None, torch.randn(12), weights, None, *options)
        torch.library.opcheck(torch.ops.mkconvlstm.layer, args)


def test_exported_program_trains_and_takes_any_batch_and_length(tmp_path):
    layer = MKConvLSTM(2, {3: 3, 5: 2}, num_layers=2)
    sizes = {"x": {0: torch.export.Dim("B", min=1, max=64), 1: torch.export.Dim("T", min=1, max=64)}}
    program = torch.export.export(layer, (torch.randn(3, 4, 2, 8, 9),), dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    x = torch.randn(2, 6, 2, 8, 9)
    torch.testing.assert_close(loaded(x)[0], layer(x)[0])
    loaded(x)[0].square().sum().backward()
    layer(x)[0].square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name).grad, p.grad)


@pytest.mark.parametrize("with_grad", [False, True])
def test_torchscript_traces_the_reference_alone(tmp_path, with_grad):
    """As docs/export.md says: one length, any batch and image size."""
    layer = MKConvLSTM(2, {3: 4, 5: 4}, backend="reference")
    with torch.set_grad_enabled(with_grad):
        torch.jit.trace(layer, torch.randn(2, 5, 2, 8, 8)).save(tmp_path / "layer.pt")
        x = torch.randn(3, 5, 2, 7, 9)
        torch.testing.assert_close(torch.jit.load(tmp_path / "layer.pt")(x)[0], layer(x)[0])
        layer.cells[0].backend = "auto"
        with pytest.raises(RuntimeError, match="unsupported input list type"):
            torch.jit.trace(layer, torch.randn(2, 5, 2, 8, 8))


def func_gradients(layer, parameters, x):
    return torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,))[0].square().mean())(parameters)


def test_functional_transforms():
    """vmap over parameters, and the gradient within it, as an ensemble; jvp and the Hessian against plain autograd."""
    layers = [MKConvLSTM(2, {3: 2, 1: 1}, dtype=torch.float64) for _ in range(3)]
    x = torch.randn(2, 3, 2, 4, 5, dtype=torch.float64)
    stacked, _ = torch.func.stack_module_state(layers)
    outputs = torch.func.vmap(lambda p: torch.func.functional_call(layers[0], p, (x,))[0])(stacked)
    grads = torch.func.vmap(lambda p: func_gradients(layers[0], p, x))(stacked)
    for k, layer in enumerate(layers):
        output, _ = layer(x)
        torch.testing.assert_close(outputs[k], output)
        output.square().mean().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(grads[name][k], p.grad)
    dx = torch.randn_like(x)
    _, tangent = torch.func.jvp(lambda x: layers[0](x)[0], (x,), (dx,))
    step = 1e-6
    torch.testing.assert_close(
        tangent, (layers[0](x + step * dx)[0] - layers[0](x - step * dx)[0]) / (2 * step), rtol=1e-6, atol=1e-8
    )


def test_forward_mode_is_right_or_refused():
    layer, x = MKConvLSTM(2, {3: 2}).requires_grad_(False), torch.randn(1, 2, 2, 4, 4)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert forward_ad.unpack_dual(layer(dual)[0]).tangent.any()
        assert layer.last_backend == "reference"
        layer.cells[0].backend = "aten"
        with pytest.raises(ValueError, match=r"'aten' cannot serve this call: .*forward-mode"):
            layer(dual)


def test_gradient_scaler_and_half_precision():
    torch.manual_seed(0)
    layer, x = MKConvLSTM(2, {3: 4}), torch.randn(2, 3, 2, 6, 5)
    layer(x)[0].square().mean().backward()
    exact = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(layer.parameters(), 0.1)
    with torch.autocast("cpu", torch.float16):
        loss = layer(x)[0].float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for p, wanted in zip(layer.parameters(), exact, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=2e-2, atol=1e-4)
    before = [p.clone() for p in layer.parameters()]
    scaler.step(optimizer)
    assert all((p != b).any() for p, b in zip(layer.parameters(), before, strict=True))
    layer.cells[0].bias.grad[0] = float("inf")
    before = [p.clone() for p in layer.parameters()]
    scaler.update()
    with torch.autocast("cpu", torch.float16):
        loss = layer(x)[0].float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # skipped: a gradient is infinite
    assert all(torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))


def test_module_pickles_with_its_options():
    layer = MKConvLSTM(2, {3: 2}, attention=FlowAttention(2), peephole="channel", recompute=True)
    x, flow = torch.randn(1, 2, 2, 4, 4), torch.randn(1, 2, 2, 4, 4)
    wanted, _ = layer(x, flow=flow)
    again = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(again(x, flow=flow)[0], wanted, rtol=0, atol=0)
    assert again.recompute


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"recompute": True, "dropout": 0.5, "num_layers": 2}], ids=str)
def test_activation_checkpointing(reentrant, options):
    layer, x = MKConvLSTM(2, {3: 3}, **options), torch.randn(2, 3, 2, 5, 4, requires_grad=True)
    grads = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        output = checkpoint(lambda x: layer(x)[0], x, use_reentrant=reentrant) if wrapped else layer(x)[0]
        output.square().sum().backward()
        grads.append([t.grad.clone() for t in (x, *layer.parameters())])
        layer.zero_grad()
        x.grad = None
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_of_the_layer_run():
    layer, x = MKConvLSTM(2, {3: 3}), torch.randn(1, 2, 2, 4, 4, requires_grad=True)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, result: (result[0] * 2, result[1]))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append(dx[0].shape))
    layer.cells[0].bias.register_post_accumulate_grad_hook(lambda p: seen.append("bias"))
    doubled, _ = layer(x)
    torch.testing.assert_close(doubled, 2 * layer.cells[0].sequence(x, None, None)[0])
    doubled.sum().backward()
    assert sorted(map(str, seen)) == ["before", "bias", str(x.shape)]
