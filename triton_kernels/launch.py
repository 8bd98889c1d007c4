"""The ``triton`` backend's ``forward`` and ``backward``, one launch for all T; :mod:`..aten` has their contract."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..aten import empty_states
from ..convolution import TransitionWeights, channels_last, interleave
from . import plan
from .backward import backward_kernel
from .forward import forward_kernel
from .pack import pack_kernel

PACKED_TAPS = 8  # of one program of pack_kernel
INTERPRETED = triton.knobs.runtime.interpret


LAUNCHED: dict[tuple, object] = {}  # compiled kernels


def launch(kernel, grid: tuple[int, int, int], arguments: tuple, options: dict) -> None:
    """``kernel[grid](*arguments, **options)``, several times faster on the host where the like was launched before."""
    traits = tuple(
        a if isinstance(a, int) else (a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else None for a in arguments
    )
    key = (id(kernel), torch.cuda.current_device() if torch.cuda.is_available() else None, traits, *options.values())
    compiled = LAUNCHED.get(key)
    if compiled is None:
        compiled = kernel[grid](*arguments, **options)
        if isinstance(compiled, triton.compiler.CompiledKernel):
            if len(LAUNCHED) > 1000:
                LAUNCHED.clear()
            LAUNCHED[key] = compiled
    else:
        compiled[grid](*arguments, *(options[name] for name in kernel.arg_names[len(arguments) :]))


@dataclass(frozen=True)
class Pass:
    """Everything about one pass that depends on the problem's shape alone."""

    problem: plan.Problem
    backward: bool
    config: plan.Config
    packed_blocks: int  # blocks of packed weights
    segments: Tensor  # [segments, convolve.SEGMENT] int32
    programs: Tensor  # [programs + 1] int32
    tiles: Tensor  # [tiles, 5] int32
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
        tile_channels = config.block_n if self.backward else config.block_n // 4
        pixels = self.tiles.shape[0] * config.block_m // self.grid[0] if config.split else config.block_m
        finish_m = config.finish_m(tile_channels, pixels)
        depths = [4 * n for n in channels] if self.backward else [problem.hidden]
        backward_only = {
            "VEC": plan.run_of(16 // problem.element_size, *channels),
            "WHOLE_RUNS": all(n % config.block_k == 0 or config.block_k % n == 0 for n in channels),
        }
        return (backward_only if self.backward else {}) | {
            "ROUND": self.rounds,
            "PRECISION": "tf32" if problem.tensor_cores else "ieee",
            "EVEN_K": all(depth % config.block_k == 0 for depth in depths),
            "PIXEL_RUN": plan.run_of(16, problem.height * problem.width, finish_m),
            "CHANNEL_RUN": plan.run_of(16, tile_channels, *channels),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "FINISH_M": finish_m,
            "num_warps": config.warps,
            "num_stages": config.stages,
            "maxnreg": config.registers,
        }

    def launch(self, kernel, arguments: tuple, rounds: int, steps: int, **flags) -> None:
        """Run ``kernel`` for ``rounds`` of a sequence of ``steps`` steps: in one launch, in the interpreter in many."""
        constants, split = self.constants, self.config.split
        units = self.tiles.shape[0] * (self.config.block_m // constants["FINISH_M"])
        problem = self.problem
        sizes = (steps, problem.rows, problem.height, problem.width, problem.hidden, units)
        if not INTERPRETED:
            phases = {"CONVOLVE": True, "FINISH": split, "PERSISTENT": True, "SPLIT": split}
            options = phases | flags | constants | {"launch_cooperative_grid": True}
            launch(kernel, self.grid, (*arguments, 0, rounds, *sizes), options)
            return
        for first in range(rounds):  # programs run one after another and cannot wait for each other
            for convolve in (True, False) if split else (True,):
                kernel[self.grid](
                    *arguments, first, first + 1, *sizes, CONVOLVE=convolve, FINISH=not convolve, PERSISTENT=False,
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
    tiles = (plan.backward_tiles if backward else plan.forward_tiles)(problem, config)
    s = plan.schedule(problem, config, tiles, sms * config.programs_per_sm)
    numbers = ([segment.row() for segment in s.segments], s.programs, s.tiles or [(0,) * 5])
    tables = [torch.tensor(n, dtype=torch.int32).to(device) for n in numbers]
    blocks = sum(part.iterations(config.block_k) for tile in tiles for part in tile)
    return Pass(problem, backward, config, blocks, *tables[:2], tables[2][: len(s.tiles)], s.slots)


def tensor_cores_allowed(dtype: torch.dtype) -> bool:
    """Whether torch's own convolution would use tensor cores: float32 as TF32 where its switches allow it."""
    return dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32"


def problem_of(z: Tensor, hidden: TransitionWeights) -> plan.Problem:
    kernels = tuple(
        plan.Kernel(b.weight.shape[0] // 4, *b.weight.shape[2:], dilation=tuple(b.dilation)) for b in hidden.branches
    )
    return plan.Problem(
        z.shape[0], *z.shape[3:], kernels, z.element_size(), tensor_cores_allowed(z.dtype) and not INTERPRETED
    )


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


def is_channels_last(z: Tensor) -> bool:
    """Whether each image of z [B, T, C, H, W] is [H, W, C] in memory."""
    wanted = (1, z.shape[4] * z.shape[2], z.shape[2])
    return all(n == 1 or s == w for n, s, w in zip(z.shape[2:], z.stride()[2:], wanted, strict=True))


def as_channels_last(z: Tensor) -> Tensor:
    """``z`` [B, T, C, H, W] itself, or a copy of it, with channels innermost."""
    return z if is_channels_last(z) else z.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def peephole_kind(peephole: Tensor | None) -> int:
    """0: none, 1: one weight a channel, 2: one a channel and pixel."""
    return 0 if peephole is None else 1 if peephole.shape[2:] == (1, 1) else 2


def hidden_bias(hidden: TransitionWeights) -> Tensor | None:
    """All branches' biases, interleaved gate by gate, [4F] float32."""
    if not hidden.has_bias:
        return None
    parts = [
        (b.weight.new_zeros(b.weight.shape[0]) if b.bias is None else b.bias)[None, :, None, None]
        for b in hidden.branches
    ]
    return interleave(parts).flatten().float()


def forward(
    z: Tensor,
    hidden: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    output_peephole: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The recurrence forward; see :func:`mkconvlstm_cuda.ops.sequence_forward`."""
    batch, steps, gates, height, width = z.shape
    h = z.new_empty((batch, steps, gates // 4, height, width))
    c = empty_states(z, batch, steps if keep else 1, torch.float32)
    if z.numel() == 0:
        return h, c
    p = make_pass(problem_of(z, hidden), False, z.device)
    problem = p.problem
    weights = pack(hidden, p)
    partial, counter = p.scratch()
    images = as_channels_last(z)
    state = z.new_empty((2, batch, height, width, problem.hidden))
    if h_0 is not None:
        state[0] = h_0.permute(0, 2, 3, 1)
    if c_0 is not None:
        c_0 = channels_last(c_0)
    bias = hidden_bias(hidden)
    if peephole is not None:
        peephole = peephole.contiguous()
    image = height * width * problem.hidden
    p.launch(
        forward_kernel,
        (
            images, images.stride(0), images.stride(1), h, c, image * (steps if keep else 1), image if keep else 0,
            c if c_0 is None else c_0, state, weights, c if bias is None else bias,
            c if peephole is None else peephole, partial, p.segments, p.programs, p.tiles, counter,
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
    if keep and images is not z:
        z.copy_(images)
    return h, c


def backward(
    gates: Tensor,
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
    batch, steps, _, height, width = gates.shape
    dc = empty_states(gates, batch, 1, torch.float32)[:, 0]
    dh_0 = None if h_0 is None else torch.empty_like(dc, dtype=gates.dtype)
    if gates.numel() == 0:
        return dh_0, dc
    p = make_pass(problem_of(gates, hidden), True, gates.device)
    problem = p.problem
    weights = pack(hidden, p)
    partial, counter = p.scratch()
    images, c = as_channels_last(gates), as_channels_last(c)
    if c.stride(0) != steps * height * width * problem.hidden and batch > 1:
        c = c.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
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
            images, images.stride(0), images.stride(1), c, c if c_0 is None else c_0, c if dh is None else dh,
            *strides, dc, dc if dc_n is None else dc_n, dc if dh_0 is None else dh_0,
            dc if lengths is None else lengths.contiguous(), weights, dc if peephole is None else peephole,
            partial, p.segments, p.programs, p.tiles, counter,
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
    if images is not gates:
        gates.copy_(images)
    return dh_0, dc
