"""The ``triton`` backend's ``forward`` and ``backward``, one launch for all T; :mod:`..aten` has their contract."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..aten import Parts, empty_states, previous
from ..convolution import (
    TransitionWeights,
    branch_bias,
    channels_last,
    premix,
    tensor_cores_allowed,
    whole_bias,
)
from . import plan
from . import schedule as schedules
from .backward import backward_kernel
from .forward import forward_kernel
from .pack import pack_kernel

PACKED_TAPS = 8  # of one program of pack_kernel
INTERPRETED = triton.knobs.runtime.interpret


LAUNCHED: dict[tuple, tuple] = {}  # compiled kernels, and the options that are arguments of theirs


def launch(kernel, grid: tuple[int, int, int], arguments: tuple, options: dict) -> None:
    """``kernel[grid](*arguments, **options)``, several times faster on the host where the like was launched before."""
    if INTERPRETED:
        kernel[grid](*arguments, **options)
        return
    key = (id(kernel), torch.cuda.current_device(), traits(arguments), *options.values())
    known = LAUNCHED.get(key)
    if known is not None:
        compiled, constants = known
        compiled[grid](*arguments, *constants)
        return
    compiled = kernel[grid](*arguments, **options)
    if len(LAUNCHED) > 1000:
        LAUNCHED.clear()
    LAUNCHED[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(arguments) :])


def traits(arguments: tuple) -> tuple:
    """What of each argument a kernel may have been specialised for."""
    return tuple(
        (a.dtype, a.data_ptr() % 16)
        if isinstance(a, Tensor)
        else a
        if isinstance(a, int)
        else traits(a)
        if isinstance(a, tuple)
        else None
        for a in arguments
    )


@dataclass(frozen=True)
class Pass:
    """Everything about one pass that depends on the problem's shape alone."""

    problem: plan.Problem
    backward: bool
    config: plan.Config
    packed_blocks: int  # blocks of packed weights
    segments: Tensor  # [segments, convolve.SEGMENT] int32
    programs: Tensor  # [programs * stages + 1] int32
    finishes: Tensor  # [finished, convolve.FINISH] int32
    ends: tuple[int, ...]  # of each stage's rows of finishes
    split: tuple[bool, ...]  # whether each stage's tiles are cut
    slots: int

    @property
    def rounds(self) -> bool:
        """Whether float32 is rounded to TF32 before it meets the tensor cores, which would cut the other bits off."""
        return self.problem.element_size == 4 and self.problem.tensor_cores

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.programs.shape[0] - 1) // len(self.ends), 1, 1

    def scratch(self) -> tuple[Tensor, Tensor]:
        """Partial sums [slots, BLOCK_M, BLOCK_N] and the grid barrier's counter."""
        config, device = self.config, self.segments.device
        partial = torch.empty((self.slots, config.block_m, config.block_n), dtype=torch.float32, device=device)
        return partial, torch.zeros(1, dtype=torch.int32, device=device)

    @cached_property
    def constants(self) -> dict:
        """Arguments that both kernels take from the problem and its configuration."""
        config, problem = self.config, self.problem
        channels = [k.channels for k in problem.kernels]
        finish_n = schedules.finish_n(problem, config, self.backward)
        counts = [end - start for start, end in pairwise((0, *self.ends))]
        fewest = min((n for n, split in zip(counts, self.split, strict=True) if split), default=self.grid[0])
        finish_m = config.finish_m(finish_n, fewest * config.block_m // self.grid[0])
        if not (self.backward or any(self.split)):  # halves of each product, from registers
            finish_m = config.block_m // 2
        depths = [4 * n for n in channels] if self.backward else [problem.hidden]
        depths += [problem.mix_depth] if problem.mix else []
        return {
            "ROUND": self.rounds,
            "PRECISION": "tf32" if problem.tensor_cores else "ieee",
            "DEPTH_RUN": plan.run_of(16, *depths, *([problem.hidden] if problem.mix else [])),
            "EVEN_K": all(depth % config.block_k == 0 for depth in depths),
            "PIXEL_RUN": plan.run_of(16, problem.height * problem.width, finish_m),
            "CHANNEL_RUN": plan.run_of(16, finish_n, *channels),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "FINISH_M": finish_m,
            "FINISH_N": finish_n,
            "num_warps": config.warps,
            "num_stages": config.stages,
            "maxnreg": config.registers,
        }

    def launch(self, kernel, arguments: tuple, rounds: int, steps: int, **flags) -> None:
        """Run ``kernel`` for ``rounds`` of a sequence of ``steps`` steps: in one launch, in the interpreter in many."""
        problem, stages = self.problem, len(self.ends)
        units = [end * (self.config.block_m // self.constants["FINISH_M"]) for end in (self.ends[0], self.ends[-1])]
        sizes = (steps, problem.rows, problem.height, problem.width, problem.hidden, *units)
        options = {"STAGES": stages, "SPLIT": self.config.split, **flags, **self.constants}
        if not INTERPRETED:
            phases = {"STAGE_FIRST": 0, "STAGE_LAST": stages, "CONVOLVE": True, "UPDATE": True, "PERSISTENT": True}
            options |= phases | {"launch_cooperative_grid": True}
            launch(kernel, self.grid, (*arguments, 0, rounds, *sizes), options)
            return
        for first in range(rounds):  # programs run one after another and cannot wait for each other
            for stage, split in enumerate(self.split):
                for convolve in (True, False) if split else (True,):
                    kernel[self.grid](
                        *arguments, first, first + 1, *sizes, STAGE_FIRST=stage, STAGE_LAST=stage + 1,
                        CONVOLVE=convolve, UPDATE=not convolve, PERSISTENT=False, **options,
                    )  # fmt: skip


def device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that one program may have."""
    if INTERPRETED:
        return 3, 1 << 17  # programs run one after another there
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


@lru_cache(maxsize=256)
def make_pass(problem: plan.Problem, backward: bool, device: torch.device) -> Pass:
    sms, shared_memory = device_limits(device)
    config = plan.choose(problem, backward, sms, shared_memory)
    stages = schedules.stages(problem, config, backward)
    programs = sms * config.programs_per_sm
    of_stages = [schedules.schedule(problem, config, stage, programs) for stage in stages]
    t = schedules.tables(of_stages)
    tables = [torch.tensor(n, dtype=torch.int32).to(device) for n in (t.segments, t.programs, t.finishes)]
    packed = sum(stage.gates * schedules.blocks(stage.tiles, config.block_k) for stage in stages)
    split = tuple(stage.split for stage in stages)
    slots = max((s.slots for s, cut in zip(of_stages, split, strict=True) if cut or backward), default=0)
    return Pass(problem, backward, config, packed, *tables, t.ends, split, slots)


def problem_of(parts: Parts, hidden: TransitionWeights) -> plan.Problem:
    z = parts[0]
    kernels = tuple(
        plan.Kernel(b.weight.shape[0] // 4, *b.weight.shape[2:], dilation=tuple(b.dilation)) for b in hidden.branches
    )
    tensor_cores = tensor_cores_allowed(z.dtype) and not INTERPRETED
    mix = 0 if hidden.mix is None else hidden.mix_groups
    return plan.Problem(z.shape[0], *z.shape[3:], kernels, z.element_size(), tensor_cores, mix)


@dataclass(frozen=True)
class Packing:
    """Where one convolution's weights lie, in elements of a tap: see :func:`pack_kernel`."""

    weight: Tensor  # [outputs, inputs, kernel_h, kernel_w]
    channels: int  # columns of a group in a tile
    groups_stride: int
    n_stride: int
    n_count: int
    k_stride: int
    k_count: int
    runs: int = 1
    run_stride: int = 0
    quads: bool = False  # columns are in the order of convolve.take_gates


def packings(hidden: TransitionWeights, p: Pass) -> list[Packing]:
    """The branches, then the mix.

    Forward, columns are four gates of BLOCK_N / 4 channels, and k runs over h's channels. Backward, columns are
    channels of h, and k runs over the rows of a branch's weights. Of the mix, columns are one gate's channels.
    """
    n, total, out = p.config.block_n, p.problem.hidden, []
    for b, k in zip(hidden.branches, p.problem.kernels, strict=True):
        if p.backward:
            out.append(Packing(b.weight, n, 0, 1, total, total, 4 * k.channels))
        else:
            out.append(Packing(b.weight, n // 4, k.channels * total, total, k.channels, 1, total, quads=not p.split[0]))
    if hidden.mix is not None:
        depth = p.problem.mix_depth
        n_stride, k_stride = (1, depth) if p.backward else (depth, 1)
        gate_stride = total if p.backward and p.problem.mix == 1 else total * depth
        out.append(Packing(hidden.mix, n, 0, n_stride, total, k_stride, depth, 4, gate_stride))
    return out


def pack(hidden: TransitionWeights, p: Pass) -> TensorDescriptor:
    """All weights, one [BLOCK_N, BLOCK_K] for each iteration in the order of the schedule's tiles."""
    config = p.config
    packed = hidden.branches[0].weight.new_empty((p.packed_blocks * config.block_n, config.block_k))
    rows, first = min(16, config.block_n), 0
    for w in packings(hidden, p):
        taps, run, blocks = w.weight[0, 0].numel(), -(-w.n_count // w.channels), -(-w.k_count // config.block_k)
        grid = (w.runs * run * blocks, config.block_n // rows, -(-taps // PACKED_TAPS))
        arguments = (
            w.weight.contiguous(), packed[first:], taps, run, w.run_stride, w.groups_stride, w.n_stride, w.n_count,
            w.k_stride, w.k_count, blocks,
        )  # fmt: skip
        options = {"ROUND": p.rounds, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        options |= {"CHANNELS": w.channels, "ROWS": rows, "QUADS": w.quads, "TAPS": PACKED_TAPS}
        launch(pack_kernel, grid, arguments, options)
        first += w.runs * run * blocks * taps * config.block_n
    return TensorDescriptor.from_tensor(packed, [config.block_n, config.block_k])


def in_order(states: Tensor) -> Tensor:
    """``states`` [B, T, C, H, W] itself, or a copy of it, as [T, B, H, W, C] in memory."""
    return states.permute(1, 0, 3, 4, 2).contiguous()


def peephole_kind(peephole: Tensor | None) -> int:
    """0: none, 1: one weight a channel, 2: one a channel and pixel."""
    return 0 if peephole is None else 1 if peephole.shape[2:] == (1, 1) else 2


def forward(
    z: Parts,
    hidden: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    output_peephole: str,
    keep: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence forward; see :func:`mkconvlstm_cuda.ops.sequence_forward`."""
    batch, steps, _, height, width = z[0].shape
    c = empty_states(z, steps if keep else 1, torch.float32)
    h = z[0].new_empty((batch, steps, *c.shape[2:]))
    if h.numel() == 0:
        return h, c
    p = make_pass(problem_of(z, hidden), False, h.device)
    weights = pack(hidden, p)
    partial, counter = p.scratch()
    parts = tuple(map(in_order, z))
    state = h.new_empty((2, batch, height, width, h.shape[2]))
    if h_0 is not None:
        state[0] = h_0.permute(0, 2, 3, 1)
    if c_0 is not None:
        c_0 = channels_last(c_0)
    bias = whole_bias(hidden, bias)
    inner = branch_bias(hidden) if hidden.mix is not None else None
    v = h.new_empty((p.problem.rows, 4 * p.problem.hidden)) if hidden.mix is not None else h
    if peephole is not None:
        peephole = peephole.contiguous()
    p.launch(
        forward_kernel,
        (
            parts, v, h, c, c if c_0 is None else c_0, state, weights, c if bias is None else bias,
            c if inner is None else inner, c if peephole is None else peephole,
            partial, p.segments, p.programs, p.finishes, counter,
        ),
        steps,
        steps,
        TANH=hidden.mix_tanh,
        HAS_BRANCH_BIAS=inner is not None,
        KEEP=keep,
        HAS_H_0=h_0 is not None,
        HAS_C_0=c_0 is not None,
        HAS_BIAS=bias is not None,
        PEEPHOLE=peephole_kind(peephole),
        CURRENT=output_peephole == "current",
    )  # fmt: skip
    if keep:
        give_back(parts, z)
    return h, c


def give_back(parts: Parts, originals: Parts) -> None:
    """Write ``parts`` [T, B, H, W, C] to where they were copied from, if they were."""
    for part, original in zip(parts, originals, strict=True):
        if part.data_ptr() != original.data_ptr():
            original.copy_(part.permute(1, 0, 4, 2, 3))


def backward(
    gates: Parts,
    h: Tensor,
    c: Tensor,
    hidden: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    output_peephole: str,
    dh: Tensor | None,
    dc_n: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """The recurrence backward; see :func:`mkconvlstm_cuda.ops.sequence_backward`.

    The derivative of the tanh needs what the mix multiplied. That is computed for all steps at once, as ``aten`` does:
    within the recurrence it would double what each step waits for, and kept since forward it would take as much memory
    as the gates for longer.
    """
    steps, width = h.shape[1], h.shape[4]
    dc = empty_states(gates, 1, torch.float32)[:, 0]
    dh_0 = None if h_0 is None else torch.empty_like(dc, dtype=h.dtype)
    if h.numel() == 0:
        return dh_0, dc
    p = make_pass(problem_of(gates, hidden), True, h.device)
    weights = pack(hidden, p)
    partial, counter = p.scratch()
    parts = tuple(map(in_order, gates))
    if dh is not None:
        extents = (dh.shape[2] * dh.stride(2), dh.shape[3] * width * dh.stride(4))
        if dh.stride(3) != width * dh.stride(4) or max(extents) >= 2**31:
            dh = dh.contiguous()
    if c_0 is not None:
        c_0 = channels_last(c_0)
    if dc_n is not None:
        dc_n = channels_last(dc_n.float())
    if peephole is not None:
        peephole = peephole.contiguous()
    v = premix(previous(h, h_0, h.dtype), hidden.channels_last()) if hidden.mix_tanh else dc
    du = parts
    if hidden.mix is not None:
        du = tuple(h.new_empty((p.problem.rows, 4 * k.channels)) for k in p.problem.kernels)
    strides = (0, 0, 0, 0) if dh is None else (*dh.stride()[:3], dh.stride(4))
    p.launch(
        backward_kernel,
        (
            parts, v, du, in_order(c), dc if c_0 is None else c_0, dc if dh is None else dh,
            *strides, dc, dc if dc_n is None else dc_n, dc if dh_0 is None else dh_0,
            dc if lengths is None else lengths.contiguous(), weights, dc if peephole is None else peephole,
            partial, p.segments, p.programs, p.finishes, counter,
        ),
        steps + (h_0 is not None),
        steps,
        TANH=hidden.mix_tanh,
        HAS_DH=dh is not None,
        HAS_DC_N=dc_n is not None,
        HAS_LENGTHS=lengths is not None,
        HAS_H_0=h_0 is not None,
        HAS_C_0=c_0 is not None,
        PEEPHOLE=peephole_kind(peephole),
        CURRENT=output_peephole == "current",
    )  # fmt: skip
    give_back(parts, gates)
    return dh_0, dc
