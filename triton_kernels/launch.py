"""The ``triton`` backend's ``forward`` and ``backward``, one launch for all T; :mod:`..aten` has their contract."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..aten import Parts, empty_states
from ..convolution import TransitionWeights, channels_last, tensor_cores_allowed, whole_bias
from . import plan
from . import schedule as schedules
from .backward import backward_kernel
from .forward import forward_kernel
from .pack import pack_kernel

PACKED_TAPS = 8  # of one program of pack_kernel
INTERPRETED = triton.knobs.runtime.interpret


LAUNCHED: dict[tuple, object] = {}  # compiled kernels


def launch(kernel, grid: tuple[int, int, int], arguments: tuple, options: dict) -> None:
    """``kernel[grid](*arguments, **options)``, several times faster on the host where the like was launched before."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    key = (id(kernel), device, *map(traits, arguments), *options.values())
    compiled = LAUNCHED.get(key)
    if compiled is None:
        compiled = kernel[grid](*arguments, **options)
        if isinstance(compiled, triton.compiler.CompiledKernel):
            if len(LAUNCHED) > 1000:
                LAUNCHED.clear()
            LAUNCHED[key] = compiled
    else:
        compiled[grid](*arguments, *(options[name] for name in kernel.arg_names[len(arguments) :]))


def traits(argument) -> object:
    """What of an argument a kernel may have been specialised for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, tuple):
        return tuple(map(traits, argument))
    return argument if isinstance(argument, int) else None


@dataclass(frozen=True)
class Pass:
    """Everything about one pass that depends on the problem's shape alone."""

    problem: plan.Problem
    backward: bool
    config: plan.Config
    packed_blocks: int  # blocks of packed weights
    segments: Tensor  # [segments, convolve.SEGMENT] int32
    programs: Tensor  # [programs + 1] int32
    finishes: Tensor  # [finished, convolve.FINISH] int32
    finish_n: int  # at least the channels of each
    slots: int

    @property
    def rounds(self) -> bool:
        """Whether float32 is rounded to TF32 before it meets the tensor cores, which would cut the other bits off."""
        return self.problem.element_size == 4 and self.problem.tensor_cores

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.programs.shape[0] - 1, 1, 1

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
        finish_n = self.finish_n
        pixels = self.finishes.shape[0] * config.block_m // self.grid[0] if config.split else config.block_m
        finish_m = config.finish_m(finish_n, pixels)
        depths = [4 * n for n in channels] if self.backward else [problem.hidden]
        return {
            "ROUND": self.rounds,
            "PRECISION": "tf32" if problem.tensor_cores else "ieee",
            "DEPTH_RUN": plan.run_of(16, *depths),
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
        constants, split = self.constants, self.config.split
        units = self.finishes.shape[0] * (self.config.block_m // constants["FINISH_M"])
        problem = self.problem
        sizes = (steps, problem.rows, problem.height, problem.width, problem.hidden, units)
        if not INTERPRETED:
            phases = {"CONVOLVE": True, "UPDATE": split, "PERSISTENT": True, "SPLIT": split}
            options = phases | flags | constants | {"launch_cooperative_grid": True}
            launch(kernel, self.grid, (*arguments, 0, rounds, *sizes), options)
            return
        for first in range(rounds):  # programs run one after another and cannot wait for each other
            for convolve in (True, False) if split else (True,):
                kernel[self.grid](
                    *arguments, first, first + 1, *sizes, CONVOLVE=convolve, UPDATE=not convolve, PERSISTENT=False,
                    SPLIT=split, **flags, **constants,
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
    tiles = (schedules.backward_tiles if backward else schedules.forward_tiles)(problem, config)
    s = schedules.schedule(problem, config, tiles, sms * config.programs_per_sm)
    numbers = ([segment.row() for segment in s.segments], s.programs, [f.row() for f in s.finishes])
    tables = [torch.tensor(n, dtype=torch.int32).to(device) for n in numbers]
    widest = plan.power_of_two(max(f.channel_end - f.channel_first for f in s.finishes), 1, config.block_n)
    finish_n = widest if backward else config.block_n // 4  # forward sums four gates side by side
    blocks = sum(part.iterations(config.block_k) for tile in tiles for part in tile)
    return Pass(problem, backward, config, blocks, *tables, finish_n, s.slots)


def problem_of(parts: Parts, hidden: TransitionWeights) -> plan.Problem:
    z = parts[0]
    kernels = tuple(
        plan.Kernel(b.weight.shape[0] // 4, *b.weight.shape[2:], dilation=tuple(b.dilation)) for b in hidden.branches
    )
    tensor_cores = tensor_cores_allowed(z.dtype) and not INTERPRETED
    return plan.Problem(z.shape[0], *z.shape[3:], kernels, z.element_size(), tensor_cores)


def pack(hidden: TransitionWeights, p: Pass) -> TensorDescriptor:
    """All branches' weights, one [BLOCK_N, BLOCK_K] for each iteration in the order of ``plan``'s tiles.

    Forward, BLOCK_N is four gates of BLOCK_N / 4 channels, and k runs over h's channels. Backward, BLOCK_N is channels
    of h, and k runs over the rows of a branch's weights.
    """
    config, hidden_channels = p.config, p.problem.hidden
    packed = hidden.branches[0].weight.new_empty((p.packed_blocks * config.block_n, config.block_k))
    first = 0
    for b, k in zip(hidden.branches, p.problem.kernels, strict=True):
        taps = k.height * k.width
        if p.backward:
            channels, strides, depth = config.block_n, (0, 1, hidden_channels, hidden_channels), 4 * k.channels
        else:
            channels, depth = config.block_n // 4, hidden_channels
            strides = (k.channels * depth, depth, k.channels, 1)
        tiles, blocks = -(-strides[2] // channels), -(-depth // config.block_k)
        rows = min(16, config.block_n)
        grid = (tiles * blocks, config.block_n // rows, -(-taps // PACKED_TAPS))
        arguments = (b.weight.contiguous(), packed[first:], taps, *strides, depth, blocks)
        options = {"ROUND": p.rounds, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        launch(pack_kernel, grid, arguments, options | {"CHANNELS": channels, "ROWS": rows, "TAPS": PACKED_TAPS})
        first += tiles * blocks * taps * config.block_n
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
    if peephole is not None:
        peephole = peephole.contiguous()
    p.launch(
        forward_kernel,
        (
            parts, h, c, c if c_0 is None else c_0, state, weights, c if bias is None else bias,
            c if peephole is None else peephole, partial, p.segments, p.programs, p.finishes, counter,
        ),
        steps,
        steps,
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
    """The recurrence backward; see :func:`mkconvlstm_cuda.ops.sequence_backward`."""
    steps, width = h.shape[1], h.shape[4]
    dc = empty_states(gates, 1, torch.float32)[:, 0]
    dh_0 = None if h_0 is None else torch.empty_like(dc, dtype=h.dtype)
    if h.numel() == 0:
        return dh_0, dc
    p = make_pass(problem_of(gates, hidden), True, h.device)
    weights = pack(hidden, p)
    partial, counter = p.scratch()
    parts = tuple(map(in_order, gates))
    if dh is not None and dh.stride(3) != width * dh.stride(4):
        dh = dh.contiguous()
    if c_0 is not None:
        c_0 = channels_last(c_0)
    if dc_n is not None:
        dc_n = channels_last(dc_n.float())
    if peephole is not None:
        peephole = peephole.contiguous()
    strides = (0, 0, 0, 0) if dh is None else (*dh.stride()[:3], dh.stride(4))
    p.launch(
        backward_kernel,
        (
            parts, in_order(c), dc if c_0 is None else c_0, dc if dh is None else dh,
            *strides, dc, dc if dc_n is None else dc_n, dc if dh_0 is None else dh_0,
            dc if lengths is None else lengths.contiguous(), weights, dc if peephole is None else peephole,
            partial, p.segments, p.programs, p.finishes, counter,
        ),
        steps + (h_0 is not None),
        steps,
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
