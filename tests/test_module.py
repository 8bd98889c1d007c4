"""What people do to an ``nn.Module``, done on every backend, against the same on the reference in float64."""

import copy
import pickle

import pytest
import torch
from problems import Problem, assert_close, places
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from mkconvlstm_cuda import MKConvLSTM

PROBLEM = Problem({3: 4, 5: 8}, {"num_layers": 2, "peephole": "channel"}, state=False, batch=3, size=(6, 5))


def plain(layer, x):
    """The output, and the gradients of x and of every parameter that wants one."""
    output, (h_n, c_n) = layer(x)
    wanted = {"x": x} | {n: p for n, p in layer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(output.sin().sum() + (h_n * c_n).sum(), list(wanted.values()))
    return {"output": output} | {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}


def functional_call(layer, x):
    changed = {name: p.detach() * 0.5 for name, p in layer.named_parameters()}
    return {"output": torch.func.functional_call(layer, changed, (x,))[0]}


def copied_by_state_dict(layer, x):
    """To the reference, and back to a layer that had other weights."""
    reference = PROBLEM.layer("reference", x.dtype, seed=1)
    reference.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    layer.load_state_dict(reference.state_dict())
    return plain(layer, x)


def weight_norm(layer, x):
    for cell in layer.cells:
        for branch in (*cell.input_transition.branches, *cell.hidden_transition.branches):
            parametrizations.weight_norm(branch.conv)
            with torch.no_grad():
                branch.conv.parametrizations.weight.original0.mul_(0.7)
    return plain(layer, x)


def frozen(layer, x):
    """One part after the other; what is left is what it is when nothing is frozen."""
    found = {}
    for part in ("input_transition", "hidden_transition", "bias", "peephole", "cells.0"):
        for name, p in layer.named_parameters():
            p.requires_grad_(part not in name)
        found |= {f"without {part}: {name}": t for name, t in plain(layer, x).items()}
    return found


def accumulated(layer, x):
    for part in x.split(1):
        output, _ = layer(part)
        output.sin().sum().backward()
    return {name: p.grad for name, p in layer.named_parameters()}


def checkpointed(layer, x):
    return {
        f"reentrant {way}: {name}": t
        for way in (False, True)
        for name, t in through_backward(lambda x: checkpoint(layer, x, use_reentrant=way), layer, x).items()  # noqa: B023
    }


def through_backward(function, layer, x):
    """As :func:`plain`, by ``backward``: reentrant checkpoints know nothing else."""
    layer.zero_grad()
    x.grad = None
    output, (h_n, c_n) = function(x)
    (output.sin().sum() + (h_n * c_n).sum()).backward()
    grads = {f"d{name}": p.grad for name, p in {"x": x, **dict(layer.named_parameters())}.items()}
    return {"output": output} | {name: g.clone() for name, g in grads.items()}


def hooked(layer, x):
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, result: (result[0] * 3, result[1]))
    layer.cells[0].bias.register_hook(lambda grad: grad * 5)
    return plain(layer, x)


def differentiated_twice(layer, x):
    parameters = dict(layer.named_parameters())
    output, _ = layer(x)
    dx, *grads = torch.autograd.grad(output.sin().sum(), [x, *parameters.values()], create_graph=True)
    penalty = dx.square().sum() + sum(g.square().sum() for g in grads)
    twice = torch.autograd.grad(penalty, [x, *parameters.values()])
    return {"dx": dx} | {f"dd{name}": g for name, g in zip(["x", *parameters], twice, strict=True)}


def compiled(layer, x):
    torch.compiler.reset()
    function = torch.compile(layer, fullgraph=True, backend="aot_eager")
    return through_backward(function, layer, x)


def exported(layer, x):
    return {"output": torch.export.export(layer, (x.detach(),)).module()(x)[0]}


USES = {
    "plain": plain,
    "functional_call": functional_call,
    "deepcopy": lambda layer, x: plain(copy.deepcopy(layer), x),
    "pickle": lambda layer, x: plain(pickle.loads(pickle.dumps(layer)), x),
    "state_dict": copied_by_state_dict,
    "weight norm": weight_norm,
    "frozen parts": frozen,
    "accumulation": accumulated,
    "activation checkpointing": checkpointed,
    "hooks": hooked,
    "double backward": differentiated_twice,
    "compile": compiled,
    "export": exported,
}


@pytest.fixture(scope="module")
def wanted():
    """What each use gives on the reference in float64."""
    return {name: used(name, "reference", torch.float64, "cpu") for name in USES}


def used(name, backend, dtype, device):
    layer = PROBLEM.layer(backend, dtype, device)
    found = USES[name](layer, PROBLEM.inputs(layer, dtype, device)["x"])
    return {name: t.detach().cpu() for name, t in found.items()}


@pytest.mark.parametrize(("backend", "device"), places())
@pytest.mark.parametrize("name", USES)
def test_use(name, backend, device, wanted, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert_close(used(name, backend, torch.float32, device), wanted[name], 2e-5)


@pytest.mark.parametrize(("backend", "device"), places())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_gradient_scaler(dtype, backend, device, wanted):
    layer = PROBLEM.layer(backend, torch.float32, device)
    x = PROBLEM.inputs(layer, torch.float32, device)["x"]
    scaler, optimizer = torch.amp.GradScaler(device, init_scale=64.0), torch.optim.SGD(layer.parameters(), 0.1)
    with torch.autocast(device, dtype):
        output, (h_n, c_n) = layer(x)
        loss = output.float().sin().sum() + (h_n * c_n).sum()
    assert (output.dtype, c_n.dtype) == (dtype, torch.float32)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = {"output": output} | {f"d{name}": p.grad for name, p in layer.named_parameters()}
    exact = {name: wanted["plain"][name] for name in found}
    assert_close({name: t.detach().cpu() for name, t in found.items()}, exact, 1e-2 if dtype == torch.float16 else 6e-2)
    before = [p.detach().clone() for p in layer.parameters()]
    scaler.step(optimizer)
    assert all((p != b).any() for p, b in zip(layer.parameters(), before, strict=True))


@pytest.mark.parametrize(("backend", "device"), places())
def test_transforms_are_right_or_refused(backend, device):
    layers = [MKConvLSTM(2, {3: 2}, backend=backend, device=device) for _ in range(2)]
    x = torch.randn(1, 2, 2, 4, 4, device=device)
    parameters, _ = torch.func.stack_module_state(layers)

    def outputs():
        return torch.func.vmap(lambda p: torch.func.functional_call(layers[0], p, (x,))[0])(parameters)

    if backend != "reference":
        with pytest.raises(ValueError, match=f"'{backend}' cannot serve this call: torch.func"):
            outputs()
        return
    torch.testing.assert_close(outputs(), torch.stack([layer(x)[0] for layer in layers]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), [p for p in places() if p.values[1] == "cuda"])
@pytest.mark.parametrize("recompute", [False, True])
def test_training_in_cuda_graphs(recompute, backend, device, monkeypatch):
    """``make_graphed_callables``: replays on other inputs and weights give what eager calls give."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    layer = PROBLEM.layer(backend, torch.float32, device, recompute=recompute)
    eager = copy.deepcopy(layer)
    x = PROBLEM.inputs(layer, torch.float32, device)["x"]
    graphed = torch.cuda.make_graphed_callables(layer, (x.detach().clone().requires_grad_(),))
    for factor in (1, -0.5):
        seen = (x.detach() * factor).requires_grad_()
        with torch.no_grad():
            for p, q in zip(layer.parameters(), eager.parameters(), strict=True):
                p.mul_(factor)
                q.mul_(factor)
        got, exact = (through_backward(f, m, seen) for f, m in ((graphed, layer), (eager, eager)))
        assert_close(got, exact, 1e-5)
