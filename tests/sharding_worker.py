"""One of the processes of test_sharding.py: layers on some rows of the images against the same layers on all."""

import os
import sys

import torch
import torch.distributed as dist
from problems import BRANCHES, Problem

from mkconvlstm_cuda import Branch, FlowAttention
from mkconvlstm_cuda.sharding import shard_height

SIZE = {"size": (9, 4)}
HEIGHTS = {1: (9,), 2: (6, 3), 3: (2, 4, 3)}  # rows of each rank
CASES = {
    "two kernel sizes": Problem({3: 2, 5: 1}, **SIZE),
    "no state": Problem({3: 2}, state=False, **SIZE),
    "wide, other hidden kernels": Problem({(1, 3): 2}, {"hidden_kernels": {(5, 1): 2}}, **SIZE),
    "bottleneck, dilation, mix": Problem(BRANCHES, {"mix": "gate", "mix_activation": "tanh"}, **SIZE),
    "pool, peephole": Problem([Branch(3, 1, pool=True), Branch(1, 1)], {"peephole": "channel"}, **SIZE),
    "masks": Problem({1: 1, 3: 2}, {"attention": FlowAttention(2, branches=(3,), kernel_size=5)}, **SIZE),
    "two layers, bidirectional, lengths": Problem(
        {3: 2}, {"num_layers": 2, "bidirectional": True}, lengths=(3, 1), **SIZE
    ),
    "time first, no bias": Problem({3: 2}, {"batch_first": False, "bias": False}, **SIZE),
    "batch norm in eval": Problem(BRANCHES, {"norm": "batch"}, **SIZE),
    "empty batch": Problem({3: 2}, batch=0, **SIZE),
}


def results(problem, group, rows, device):
    """Outputs, gradients and gradients of the input gradient's square, of this rank's ``rows`` of all images.

    ``group`` None: the layer knows nothing of other ranks.
    """
    layer = problem.layer(device=device).eval()
    whole = problem.inputs(layer, device=device)
    inputs = {name: t.detach()[..., rows, :].clone().requires_grad_() for name, t in whole.items()}
    if group is not None:
        assert shard_height(layer, group) is layer
    outputs = dict(zip(("output", "h_n", "c_n"), problem.call(layer, **inputs), strict=True))
    parameters = dict(layer.named_parameters())
    # What rank k adds to the loss differs from what the others do, or mixed up rows would go unseen.
    height = torch.arange(problem.size[0], dtype=torch.float64, device=device)[rows, None]
    loss = sum((y * (height + y).cos()).sum() for y in outputs.values())
    grads = torch.autograd.grad(loss, [*inputs.values(), *parameters.values()], create_graph=True)
    of_inputs, of_parameters = grads[: len(inputs)], grads[len(inputs) :]
    penalty = sum(dx.square().sum() for dx in of_inputs)
    twice = torch.autograd.grad(penalty, [inputs["x"], *parameters.values()])
    by_rows = outputs | dict(zip([f"d{n}" for n in inputs], of_inputs, strict=True)) | {"ddx": twice[0]}
    summed = dict(zip([f"d{n}" for n in parameters], of_parameters, strict=True))
    summed |= dict(zip([f"dd{n}" for n in parameters], twice[1:], strict=True))
    return {n: t.detach() for n, t in by_rows.items()}, {n: t.detach() for n, t in summed.items()}


def errors(problem, group, device):
    """The largest difference of each tensor from what one process computes, on this rank."""
    rank, heights = dist.get_rank(group), HEIGHTS[dist.get_world_size(group)]
    first = sum(heights[:rank])
    mine = slice(first, first + heights[rank])
    by_rows, summed = results(problem, group, mine, device)
    wanted_by_rows, wanted_summed = results(problem, None, slice(None), device)
    found = {}
    for name, t in by_rows.items():
        found[name] = t - wanted_by_rows[name][..., mine, :]
    for name, t in summed.items():
        t = t.contiguous()  # NCCL takes no other
        dist.all_reduce(t, group=group)
        found[name] = t - wanted_summed[name]
    return {name: float(t.abs().max()) if t.numel() else 0.0 for name, t in found.items()}


def refused(problem, device):
    """What a call says in which every rank has two rows."""
    layer = shard_height(problem.layer(device=device))
    inputs = {name: t[..., :2, :] for name, t in problem.inputs(layer, device=device).items()}
    try:
        problem.call(layer, **inputs)
    except ValueError as error:
        return str(error)
    return None


def main(path):
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {"too few rows": refused(Problem({7: 1}, **SIZE), device)}
    found |= {(name, world): errors(problem, dist.group.WORLD, device) for name, problem in CASES.items()}
    if world == 3:  # and groups that are not all processes
        group = [dist.new_group([0, 1]), dist.new_group([2])][rank == 2]
        found |= {(name, 2): errors(problem, group, device) for name, problem in CASES.items()}
    everywhere = [None] * world
    dist.all_gather_object(everywhere, found)
    if rank == 0:
        torch.save(everywhere, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
