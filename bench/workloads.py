"""Named workloads and what they cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """One layer on one batch of sequences.

    Args:
        batch, steps, channels, height, width: B, T, C, H, W.
        kernels: {kernel size: hidden channels}, for input-to-hidden and hidden-to-hidden alike.
        stands_for: where such a layer is met.
        mix: the 1x1 mix of both transitions, None, "gate" or "full".
    """

    name: str
    batch: int
    steps: int
    channels: int
    height: int
    width: int
    kernels: dict[int, int]
    stands_for: str
    mix: str | None = None

    @property
    def hidden_channels(self) -> int:
        """F."""
        return sum(self.kernels.values())

    @property
    def mix_depth(self) -> int:
        """Channels that one output of a mix sums; 0 without one."""
        return {None: 0, "gate": self.hidden_channels, "full": 4 * self.hidden_channels}[self.mix]

    @property
    def forward_flops(self) -> int:
        """Multiplications and additions of all convolutions, forward; training takes three times as many."""
        pixels = self.batch * self.steps * self.height * self.width
        taps = sum(size * size * 4 * channels for size, channels in self.kernels.items())
        mixes = 2 * 4 * self.hidden_channels * self.mix_depth
        return 2 * pixels * (taps * (self.channels + self.hidden_channels) + mixes)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, T, C, H, W) of the input."""
        return self.batch, self.steps, self.channels, self.height, self.width


WORKLOADS = {
    w.name: w
    for w in (
        Workload("paper_mk35", 10, 20, 512, 14, 14, {3: 128, 5: 128}, "the paper's Table II, multi-kernel"),
        Workload("paper_mk35_mix", 10, 20, 512, 14, 14, {3: 128, 5: 128}, "Table III, multi-kernel with 1x1", "gate"),
        Workload("paper_3", 10, 20, 512, 14, 14, {3: 256}, "Table II, 3x3 baseline"),
        Workload("paper_5", 10, 20, 512, 14, 14, {5: 256}, "Table II, 5x5 baseline"),
        Workload("ucf_mk35", 10, 50, 512, 14, 14, {3: 256, 5: 256}, "Table I, UCF-101"),
        Workload("mnist_57", 16, 10, 16, 16, 16, {5: 64, 7: 64}, "section IV-C2, moving digits in 4x4 patches"),
        Workload("radar_35", 4, 20, 32, 96, 96, {3: 32, 5: 32}, "nowcasting: large images, few channels"),
        Workload("small_35", 1, 20, 64, 32, 32, {3: 32, 5: 32}, "streaming, batch 1: latency"),
        Workload("cpu_mnist_57", 4, 10, 16, 16, 16, {5: 32, 7: 32}, "moving digits, sized for a CPU"),
        Workload("cpu_paper_mk35", 1, 20, 512, 14, 14, {3: 128, 5: 128}, "Table II at batch 1, sized for a CPU"),
    )
}
"""By name; the ones that begin with ``cpu_`` are what ``mkconvlstm bench`` runs without a GPU."""
