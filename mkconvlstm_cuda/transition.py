"""Transitions as modules (sections III-C and IV-A4): branches, bottlenecks, pooling, norms, mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import as_pair, check_flag, is_integer
from .convolution import BranchWeights, TransitionWeights
from .functional import check_kernel_size
from .halo import Halo
from .interleaving import interleave

NORMS = (None, "batch", "group", "layer", "layer_pixel")
MIXES = (None, "gate", "full")


@dataclass(frozen=True)
class Branch:
    """One convolution of a multi-kernel transition.

    Args:
        kernel_size: odd, an int or (kh, kw).
        channels: F_r, the hidden channels that it serves; its convolution has 4 * F_r outputs.
        bottleneck: outputs of a 1x1 convolution ahead of it, or None (the paper's Fig. 9b).
        pool: 3x3 max-pooling ahead of everything (Fig. 9b).
        dilation: of the convolution, an int or a pair.
    """

    kernel_size: int | tuple[int, int]
    channels: int
    bottleneck: int | None = None
    pool: bool = False
    dilation: int | tuple[int, int] = 1

    def __post_init__(self):
        check_kernel_size("kernels", as_pair(self.kernel_size, "kernels: kernel size"))
        for name in ("channels", "bottleneck"):
            value = getattr(self, name)
            if (name == "channels" or value is not None) and not is_integer(value, 1):
                raise ValueError(f"kernels: got {name} {value!r}, wanted an int of at least 1")
            object.__setattr__(self, name, None if value is None else int(value))
        check_flag("kernels: pool", self.pool)
        if any(d < 1 for d in as_pair(self.dilation, "kernels: dilation")):
            raise ValueError(f"kernels: got dilation {self.dilation!r}, wanted at least 1")


Kernels = Mapping[int | tuple[int, int], int] | Sequence[Branch]


def parse_branches(name: str, kernels: Kernels) -> tuple[Branch, ...]:
    """Branches of ``{kernel size: hidden channels}`` or of a list of :class:`Branch`.

    Raises:
        TypeError: it is neither.
        ValueError: it is empty.
    """
    if isinstance(kernels, Mapping):
        try:
            branches = tuple(Branch(size, channels) for size, channels in kernels.items())
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("kernels", name, 1)) from None
    elif isinstance(kernels, Sequence) and all(isinstance(b, Branch) for b in kernels):
        branches = tuple(kernels)
    else:
        raise TypeError(f"{name}: got {kernels!r}, wanted {{kernel size: hidden channels}} or a list of Branch")
    if not branches:
        raise ValueError(f"{name}: got no branch, wanted at least one")
    return branches


def is_image_size(size) -> bool:
    """Whether ``size`` is (H, W)."""
    return isinstance(size, (tuple, list)) and len(size) == 2 and all(is_integer(n, 1) for n in size)


def inception_branches(channels: int, bottleneck: int | None = None) -> list[Branch]:
    """The paper's Inception-like transition (Fig. 9b): 1x1; 1x1 -> 3x3; 1x1 -> 5x5; 3x3 max-pool -> 1x1.

    Args:
        channels: F, shared out evenly between the four branches (the paper does not say how).
        bottleneck: outputs of the 1x1 convolutions ahead of 3x3 and 5x5; None for ``channels // 4``.

    Use it with ``norm="batch"``, as the paper does.
    """
    if not is_integer(channels, 4):
        raise ValueError(f"channels: got {channels!r}, wanted an int of at least 4, one a branch")
    shares = [channels // 4 + (r < channels % 4) for r in range(4)]
    narrow = channels // 4 if bottleneck is None else bottleneck
    return [
        Branch(1, shares[0]),
        Branch(3, shares[1], bottleneck=narrow),
        Branch(5, shares[2], bottleneck=narrow),
        Branch(1, shares[3], pool=True),
    ]


def make_norm(
    norm: str | None, channels: int, gates: int, image_size: tuple[int, int] | None = None, **factory
) -> nn.Module | None:
    """The norm of a convolution with ``channels`` outputs, of which every ``channels // gates`` belong to one gate.

    "batch": BatchNorm2d; "layer": one group over all of an image; "layer_pixel": the same with a scale and a shift of
    [channels, H, W]; "group": groups of 32 channels where a gate's channels divide so, else one group a gate.
    """
    if norm is None:
        return None
    if norm == "layer_pixel":
        return nn.LayerNorm([channels, *image_size], **factory)
    if norm == "batch":
        return nn.BatchNorm2d(channels, **factory)
    per_gate = channels // gates
    groups = 1 if norm == "layer" else gates * (per_gate // 32 if per_gate % 32 == 0 else 1)
    return nn.GroupNorm(groups, channels, **factory)


class BranchModule(nn.Module):
    """``[N, C, H, W] -> [max-pool] -> [1x1 -> norm] -> K_r x K_r convolution -> [norm] -> [N, 4*F_r, H, W]``."""

    def __init__(
        self, in_channels: int, branch: Branch, norm: str | None, image_size: tuple[int, int] | None, **factory
    ):
        super().__init__()
        size, dilation = as_pair(branch.kernel_size), as_pair(branch.dilation)
        outputs, narrow = 4 * branch.channels, branch.bottleneck
        self.pool = nn.MaxPool2d(3, stride=1, padding=1) if branch.pool else None
        self.bottleneck = nn.Conv2d(in_channels, narrow, 1, bias=False, **factory) if narrow else None
        self.bottleneck_norm = make_norm(norm, narrow, 1, image_size, **factory) if narrow else None
        self.conv = nn.Conv2d(
            narrow or in_channels, outputs, size, padding="same", dilation=dilation, bias=False, **factory
        )
        self.norm = make_norm(norm, outputs, 4, image_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = self.pool(x)
        if self.bottleneck is not None:
            x = F.conv2d(x, self.bottleneck.weight.to(x.dtype))
            x = normalise(x, self.bottleneck_norm)
        w = BranchWeights(self.conv.weight.to(x.dtype), dilation=self.conv.dilation)
        return normalise(F.conv2d(x, w.weight, padding=w.padding, dilation=w.dilation), self.norm)

    def weights(self) -> BranchWeights:
        """The branch as plain tensors, batch norms in eval mode folded into them."""
        weight, bias = fold(self.conv.weight, self.norm)
        narrow = (None, None) if self.bottleneck is None else fold(self.bottleneck.weight, self.bottleneck_norm)
        return BranchWeights(weight, bias, *narrow, dilation=self.conv.dilation)


def normalise(x: Tensor, norm: nn.Module | None) -> Tensor:
    """``norm(x)`` in the norm's own dtype, returned in x's."""
    return x if norm is None else norm(x.to(norm.weight.dtype)).to(x.dtype)


def fold(weight: Tensor, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """A convolution's weight and bias that do what ``weight`` and then ``norm``, a BatchNorm2d in eval mode, do."""
    if norm is None:
        return weight, None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class Transition(nn.Module):
    """``X`` or ``U``: [N, in_channels, H, W] -> gate pre-activations [N, 4F, H, W], gate-major.

    Args:
        in_channels: C (input-to-hidden) or F (hidden-to-hidden).
        branches: {kernel size: hidden channels}, or a list of :class:`Branch`.
        mix: None, "gate" (an F x F matrix for each gate) or "full" (4F x 4F), after the interleaving (Fig. 4c).
        mix_activation: None or "tanh", before the mix (Fig. 13d).
        norm: None, "batch", "group", "layer" or "layer_pixel", after every convolution but the mix.
        image_size: (H, W), for ``norm="layer_pixel"``.
    """

    def __init__(
        self,
        in_channels: int,
        branches: Kernels,
        mix: str | None = None,
        mix_activation: str | None = None,
        norm: str | None = None,
        image_size: tuple[int, int] | None = None,
        **factory,
    ):
        super().__init__()
        if mix not in MIXES:
            raise ValueError(f"mix: got {mix!r}, wanted one of {MIXES}")
        if norm not in NORMS:
            raise ValueError(f"norm: got {norm!r}, wanted one of {NORMS}")
        if norm == "layer_pixel" and not is_image_size(image_size):
            raise ValueError(f"image_size: got {image_size!r}, wanted (H, W), which norm='layer_pixel' needs")
        if mix_activation not in (None, "tanh"):
            raise ValueError(f"mix_activation: got {mix_activation!r}, wanted None or 'tanh'")
        if mix_activation and mix is None:
            raise ValueError("mix_activation: got 'tanh' without a mix, wanted mix='gate' or mix='full' with it")
        branches = parse_branches("branches", branches)
        self.norm_kind = norm
        self.image_size = tuple(image_size) if norm == "layer_pixel" else None
        self.mix_tanh = mix_activation == "tanh"
        self.branches = nn.ModuleList(BranchModule(in_channels, b, norm, image_size, **factory) for b in branches)
        outputs = 4 * sum(b.channels for b in branches)
        groups = 4 if mix == "gate" else 1
        self.mix = nn.Conv2d(outputs, outputs, 1, groups=groups, bias=False, **factory) if mix else None
        self.halo: Halo | None = None  # where other ranks have the rows above and below

    @property
    def kernel_sizes(self) -> list[tuple[int, int]]:
        return [b.conv.kernel_size for b in self.branches]

    @property
    def reach(self) -> int:
        """How many rows above and below its own an output sees."""
        return max((b.pool is not None) + b.conv.dilation[0] * (b.conv.kernel_size[0] // 2) for b in self.branches)

    def forward(
        self, x: Tensor, masks: Sequence[Tensor | None] | None = None, update_statistics: bool = True
    ) -> Tensor:
        """``x`` [N, C, H, W] -> [N, 4F, H, W] in x's dtype, by torch's own autograd.

        ``masks``: for each branch [N, C or 1, H, W], multiplied into its input, or None. Without
        ``update_statistics`` batch norms in training leave their running statistics alone.

        Raises:
            ValueError: batch norm is in training, and other ranks have some of the rows.
        """
        masks = masks or [None] * len(self.branches)
        if self.halo is None:
            return self.compute(x, *masks, update_statistics=update_statistics)
        if self.norm_kind == "batch" and self.training:
            raise ValueError("norm: got batch norm in training on some rows of the images, wanted eval mode")
        return self.halo(self.compute, self.reach, x, *masks)

    def check_hooks(self) -> None:
        """No convolution has forward hooks, which would never run: pruning's and old weight_norm's make its weight.

        Raises:
            RuntimeError: one has.
        """
        convolutions = [c for b in self.branches for c in (b.conv, b.bottleneck)]
        for conv in (*convolutions, self.mix):
            if conv is not None and (conv._forward_pre_hooks or conv._forward_hooks):
                raise RuntimeError(
                    "a convolution of this layer has forward hooks (pruning, old weight_norm or spectral_norm?), which "
                    "never run: its weights are used directly; torch.nn.utils.parametrizations work"
                )

    def compute(self, x: Tensor, *masks: Tensor | None, update_statistics: bool = True) -> Tensor:
        """:meth:`forward` on all rows that there are here."""
        self.check_hooks()
        frozen = (
            [] if update_statistics else [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        )
        for m in frozen:
            m.track_running_stats = False
        try:
            outputs = [b(x if m is None else x * m) for b, m in zip(self.branches, masks, strict=True)]
        finally:
            for m in frozen:
                m.track_running_stats = True
        u = interleave(outputs)
        u = u.tanh() if self.mix_tanh else u
        return u if self.mix is None else F.conv2d(u, self.mix.weight.to(u.dtype), groups=self.mix.groups)

    @property
    def live_parts(self) -> str | None:
        """What of this transition :meth:`weights` cannot express now, in words; None if nothing."""
        parts = []
        if any(b.pool is not None for b in self.branches):
            parts.append("max-pooling")
        if self.norm_kind == "batch" and self.training:
            parts.append("batch norm in training")
        elif self.norm_kind not in (None, "batch"):
            parts.append(f"{self.norm_kind.removesuffix('_pixel')} norm")
        if self.halo is not None:
            parts.append("rows on other ranks")
        return " and ".join(parts) or None

    def weights(self) -> TransitionWeights:
        """The transition as plain tensors, differentiable to the parameters; only without :attr:`live_parts`.

        Raises:
            RuntimeError: as :meth:`check_hooks`.
        """
        self.check_hooks()
        mix = None if self.mix is None else self.mix.weight
        return TransitionWeights(tuple(b.weights() for b in self.branches), mix, mix_tanh=self.mix_tanh)
