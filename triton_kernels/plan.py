"""Problem -> configuration. Pure functions, no torch, no Triton: tested without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd


@dataclass(frozen=True)
class Kernel:
    """One branch of the hidden transition."""

    channels: int  # F_r
    height: int
    width: int
    dilation: tuple[int, int] = (1, 1)

    @property
    def padding(self) -> tuple[int, int]:
        return self.dilation[0] * (self.height - 1) // 2, self.dilation[1] * (self.width - 1) // 2


@dataclass(frozen=True)
class Problem:
    """What a configuration depends on; the number of steps is not among it."""

    batch: int
    height: int
    width: int
    kernels: tuple[Kernel, ...]
    element_size: int  # bytes
    tensor_cores: bool  # False: float32 at full precision
    mix: int = 0  # matrices of a 1x1 mix: one a gate (4), one for all (1), or no mix (0)

    @property
    def rows(self) -> int:
        return self.batch * self.height * self.width

    @property
    def hidden(self) -> int:
        return sum(k.channels for k in self.kernels)

    @property
    def mix_depth(self) -> int:
        """Channels that one output of the mix sums."""
        return 4 * self.hidden // self.mix

    def m_tiles(self, config: Config) -> int:
        """Blocks of pixels."""
        return -(-self.rows // config.block_m)


@dataclass(frozen=True)
class Config:
    """How one pass runs."""

    block_m: int  # pixels
    block_n: int  # forward: gate columns, 4 a channel; backward: channels
    block_k: int  # channels of one tap
    split: bool  # tiles are cut along k into equal shares, and summed by a phase of their own
    warps: int = 8
    stages: int = 4
    programs_per_sm: int = 1

    @property
    def registers(self) -> int | None:
        """Most that a thread may use, where several programs share a multiprocessor's 65536."""
        return None if self.programs_per_sm == 1 else min(255, 65536 // (32 * self.warps * self.programs_per_sm))

    def finish_m(self, channels: int, pixels: int) -> int:
        """Pixels of a tile that are finished at a time: at most 8 elements a thread, fewer to occupy all programs.

        ``channels`` are those of a tile, ``pixels`` what each program has to finish of such tiles.
        """
        threads = 32 * self.warps
        return max(8, min(self.block_m, 8 * threads // channels, power_of_two(pixels, 1, self.block_m)))


def power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two that is at least ``n``, within limits."""
    return max(least, min(most, 1 << max(0, n - 1).bit_length()))


def run_of(limit: int, *numbers: int) -> int:
    """The largest power of two up to ``limit`` that divides all ``numbers``."""
    return gcd(limit, *numbers)


def choose(problem: Problem, backward: bool, sms: int, shared_memory: int) -> Config:
    """The configuration of one pass on a device with ``sms`` multiprocessors of ``shared_memory`` bytes each.

    Many tiles: whole ones, several programs a multiprocessor, so that one computes while others load and store. Few:
    the widest tiles, which load least, cut into equal shares. Very few: small tiles, cut.
    """
    channels = [k.channels for k in problem.kernels]
    columns = problem.hidden if backward or problem.mix else 4 * max(channels)  # of the mix: one gate's
    depth = 4 * max(channels) if backward else problem.hidden
    if problem.mix:
        depth = min(depth, problem.mix_depth)
    if not problem.tensor_cores:
        return Config(64, power_of_two(columns, 16, 64), 16, split=False, warps=4, stages=2)
    line = 128 // problem.element_size  # channels that fill a swizzled row of shared memory
    block_k = power_of_two(depth, 16, line)
    widest = power_of_two(columns, 16, 512 // problem.element_size)
    m_tiles = -(-problem.rows // 128)
    taps = sum(k.height * k.width for k in problem.kernels)
    if m_tiles * taps < 4 * sms:
        config = Config(64, min(64, widest), block_k, split=True, warps=4)
    elif not backward and m_tiles * sum(-(-4 * n // 128) for n in channels) > 4 * sms:
        config = Config(128, min(128, widest), block_k, split=False, stages=3, programs_per_sm=2)
    elif backward and m_tiles > 4 * sms:
        config = Config(128, min(64, widest), block_k, split=False, warps=4, stages=3, programs_per_sm=3)
    elif backward and widest <= 128 and depth >= 2 * line:
        config = Config(128, widest, 2 * line, split=True, stages=3)
    else:
        config = Config(128, widest, block_k, split=True)
    return fit(config, problem.element_size, shared_memory)


def fit(config: Config, element_size: int, shared_memory: int) -> Config:
    """``config`` with as many stages, and as wide, as shared memory allows."""
    stage = (config.block_m + config.block_n) * config.block_k * element_size
    stages = min(config.stages, (shared_memory // config.programs_per_sm - 2048) // stage)
    if stages < 2 and config.block_n > 16:
        return fit(replace(config, block_n=config.block_n // 2), element_size, shared_memory)
    return replace(config, stages=max(1, stages))
