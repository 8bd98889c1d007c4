"""A transition's weights, its plain computation, and the gradients of it.

``X`` (input-to-hidden) and ``U`` (hidden-to-hidden) in z_t = X(x_t) + U(h_{t-1}) + b are each a transition.

A transition maps ``[N, C, H, W]`` to gate pre-activations ``[N, 4F, H, W]``, gate-major (all i, all f, all g, all o)::

    branch r:  x -> [1x1 bottleneck] -> K_r x K_r convolution, "same", 4*F_r outputs
    transition: interleave the branches gate by gate (the paper's Fig. 4b) -> [tanh] -> [1x1 mix (Fig. 4c)]

The recurrence takes the same numbers as *parts*: one tensor ``[N, 4*F_r, H, W]`` for each branch of the hidden
transition, gate-major within, as convolutions make them; or all in one where a 1x1 mix follows.

Everything here works on whole batches of images; callers fold time into ``N`` where no recurrence forbids it, time
outermost. Images are kept channels-last in memory: convolutions are fastest so on CPUs (oneDNN) and on GPUs (cuDNN,
half types).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from . import cpu_convolution, fourier, layout, pairs, unfolding
from .concurrency import concurrently
from .interleaving import channels_last, deinterleave, interleave, join_gates, split_gates
from .layout import channel_sums

ADDED_BYTES = 32 << 20  # of one branch's gradient of the input that wait to be added to the others'
MOST_OUTPUTS = 512  # of one convolution on a GPU: cuDNN is half as fast on 1024 as on twice 512


@dataclass(frozen=True)
class BranchWeights:
    """One branch of a transition, as plain tensors."""

    weight: Tensor  # [4*F_r, C', kh, kw]; C' = C, or the bottleneck's outputs
    bias: Tensor | None = None  # [4*F_r]
    bottleneck: Tensor | None = None  # [C', C, 1, 1]
    bottleneck_bias: Tensor | None = None  # [C']
    dilation: tuple[int, int] = (1, 1)
    way: Callable[[Tensor], Tensor] | None = None  # to compute the convolution, or its input's gradient; see `prepared`

    @property
    def padding(self) -> list[int]:
        """Zeros on each side that keep H and W ("same")."""
        kernel = self.weight.shape[2:]
        return [d * (k - 1) // 2 for d, k in zip(self.dilation, kernel, strict=True)]


@dataclass(frozen=True)
class TransitionWeights:
    """All that a transition without masks, pooling and live norms is made of."""

    branches: tuple[BranchWeights, ...]
    mix: Tensor | None = None  # [4F, F, 1, 1]: one F x F matrix a gate; or [4F, 4F, 1, 1]: one for all
    mix_bias: Tensor | None = None  # [4F]
    mix_tanh: bool = False

    TENSORS_PER_BRANCH = 4

    @classmethod
    def tensor_count(cls, branches: int) -> int:
        """Length of :meth:`tensors`."""
        return cls.TENSORS_PER_BRANCH * branches + 2

    @property
    def sizes(self) -> list[int]:
        """Hidden channels F_r of each branch."""
        return [b.weight.shape[0] // 4 for b in self.branches]

    @property
    def parts(self) -> list[int]:
        """Hidden channels of each part of its output."""
        return self.sizes if self.mix is None else [sum(self.sizes)]

    @property
    def mix_groups(self) -> int:
        return self.mix.shape[0] // self.mix.shape[1]

    @property
    def form(self) -> tuple[list[int], bool]:
        """All that is no tensor: the branches' dilations, flat, and ``mix_tanh``."""
        return [d for b in self.branches for d in b.dilation], self.mix_tanh

    @property
    def has_bias(self) -> bool:
        """Whether the transition of zeros is anything but zeros."""
        return self.mix_bias is not None or any(
            b.bias is not None or b.bottleneck_bias is not None for b in self.branches
        )

    def tensors(self) -> list[Tensor | None]:
        """Flat list: weight, bias, bottleneck, bottleneck bias of each branch, then mix, mix bias."""
        flat: list[Tensor | None] = []
        for b in self.branches:
            flat += [b.weight, b.bias, b.bottleneck, b.bottleneck_bias]
        return [*flat, self.mix, self.mix_bias]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor | None], dilations: Sequence[int], mix_tanh: bool):
        """Inverse of :meth:`tensors` and :attr:`form`."""
        n = cls.TENSORS_PER_BRANCH
        branches = tuple(
            BranchWeights(*tensors[n * r : n * r + n], dilation=tuple(dilations[2 * r : 2 * r + 2]))
            for r in range(len(dilations) // 2)
        )
        return cls(branches, *tensors[-2:], mix_tanh=mix_tanh)

    def to(self, dtype: torch.dtype) -> TransitionWeights:
        tensors = self.tensors()
        if all(t is None or t.dtype == dtype for t in tensors):
            return self
        cast = [None if t is None else t.to(dtype) for t in tensors]
        return self.from_tensors(cast, *self.form)

    def channels_last(self) -> TransitionWeights:
        """The same with channels innermost in memory, as the images have them, for many uses in a row; no gradient."""
        same = [layout.channels_last(t) if t is not None and t.dim() == 4 else t for t in self.tensors()]
        return self.from_tensors(same, *self.form)

    def prepared(self, images: tuple[int, int, int], uses: int, gradient: bool = False) -> TransitionWeights:
        """The same for ``uses`` in a row on ``images`` (N, H, W), or with ``gradient`` for as many gradients.

        What it then computes, torch's autograd does not differentiate.
        """
        return replace(self, branches=tuple(prepared(b, images, uses, gradient) for b in self.branches))

    def with_bias(self, bias: Tensor | None) -> TransitionWeights:
        """Add ``bias`` [4F], or None, to the transition's output, at the last convolution, in its dtype."""
        if bias is None:
            return self
        bias = bias.to(self.branches[0].weight.dtype)
        if self.mix is not None:
            return replace(self, mix_bias=bias if self.mix_bias is None else self.mix_bias + bias)
        parts = split_gates(bias, self.sizes)
        branches = tuple(
            replace(b, bias=part if b.bias is None else b.bias + part)
            for b, part in zip(self.branches, parts, strict=True)
        )
        return replace(self, branches=branches)


def branch_bias(w: TransitionWeights) -> Tensor | None:
    """The branches' own biases, interleaved as [4F], float32 or wider, where folded norms have left them some."""
    if all(b.bias is None for b in w.branches):
        return None
    own = [b.weight.new_zeros(b.weight.shape[0]) if b.bias is None else b.bias for b in w.branches]
    return join_gates(own).to(torch.promote_types(own[0].dtype, torch.float32))


def whole_bias(w: TransitionWeights, bias: Tensor | None) -> Tensor | None:
    """``bias`` [4F] or None, plus what else is added to the transition's last convolutions: float32 or wider then."""
    own = branch_bias(w) if w.mix is None else w.mix_bias
    if own is not None and bias is not None:
        return own.to(torch.promote_types(own.dtype, torch.float32)) + bias
    only = own if bias is None else bias
    return None if only is None else only.contiguous()


def prepared(b: BranchWeights, images: tuple[int, int, int], uses: int, gradient: bool = False) -> BranchWeights:
    """``b`` with the fastest way known to compute its convolution, or with ``gradient`` its input's gradient."""
    if not unfolding.serves(b.weight, images, b.dilation, "input" if gradient else "output"):
        bias = None if gradient else b.bias
        way = cpu_convolution.prepare(b.weight, bias, b.padding, b.dilation, images, uses, gradient)
    elif gradient:
        way = partial(unfolding.input_gradient, weight=b.weight)
    else:
        way = partial(unfolded_forward, b=b, rows=unfolding.unfolded_weight(b.weight))
    return b if way is b.way else replace(b, way=way)


def tensor_cores_allowed(dtype: torch.dtype) -> bool:
    """Whether torch's own convolution would use tensor cores: float32 as TF32 where its switches allow it."""
    return dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32"


def branch_forward(x: Tensor, b: BranchWeights) -> Tensor:
    """``[N, C, H, W] -> [N, 4*F_r, H, W]``."""
    if b.bottleneck is not None:
        x = F.conv2d(x, b.bottleneck, b.bottleneck_bias)
    if b.way is not None:
        return b.way(x)
    return convolve(x, b.weight, b.bias, b.padding, b.dilation)


def unfolded_forward(x: Tensor, b: BranchWeights, rows: Tensor) -> Tensor:
    """``b``'s convolution of ``x`` [N, C', H, W] by its unfolded weight ``rows`` [4*F_r, Kp, kh, 1]."""
    return convolve(unfolding.unfold(x, b.weight.shape[3]), rows, b.bias, [b.padding[0], 0], b.dilation)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], dilation: Sequence[int]) -> Tensor:
    """``F.conv2d``, on GPUs with no more outputs at a time than cuDNN does well."""
    parts = range(0, weight.shape[0], MOST_OUTPUTS) if x.is_cuda else [0]
    if len(parts) == 1:
        return F.conv2d(x, weight, bias, padding=padding, dilation=dilation)
    weights = weight.split(MOST_OUTPUTS)
    biases = [None] * len(weights) if bias is None else bias.split(MOST_OUTPUTS)
    outputs = [F.conv2d(x, w, b, padding=padding, dilation=dilation) for w, b in zip(weights, biases, strict=True)]
    return torch.cat(outputs, dim=1)


def premix(x: Tensor, w: TransitionWeights) -> Tensor:
    """The interleaved branches [N, 4F, H, W], after the tanh if there is one: what the mix multiplies."""
    u = interleave([branch_forward(x, b) for b in w.branches])
    return u.tanh() if w.mix_tanh else u


def transition_parts(x: Tensor, w: TransitionWeights) -> list[Tensor]:
    """``[N, C, H, W]`` -> its parts ``[N, 4*F_p, H, W]``, channels-last."""
    if w.mix is None:
        tasks = [partial(branch_forward, x, b) for b in w.branches]
        return [channels_last(y) for y in concurrently(x.device, x.shape[0] * x.shape[2] * x.shape[3], tasks)]
    return [channels_last(F.conv2d(premix(x, w), w.mix, w.mix_bias, groups=w.mix_groups))]


def transition_forward(x: Tensor, w: TransitionWeights) -> Tensor:
    """``[N, C, H, W] -> [N, 4F, H, W]``, differentiable to any order by torch's own autograd."""
    return interleave(transition_parts(x, w))


def time_major(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` [B, T, C, H, W] as images [T*B, C, H, W] in ``dtype``, channels-last, the time outermost."""
    if torch.is_grad_enabled() and x.requires_grad:
        images = x.permute(1, 0, 3, 4, 2).to(dtype).contiguous()
    else:
        batch, steps, channels, height, width = x.shape
        images = x.new_empty((steps, batch, height, width, channels), dtype=dtype)
        layout.copy(images.permute(1, 0, 4, 2, 3), x)
    return images.flatten(0, 1).permute(0, 3, 1, 2)


def sequence_of(images: Tensor, steps: int) -> Tensor:
    """Inverse of :func:`time_major`, as a view: [T*B, C, H, W] -> [B, T, C, H, W]."""
    return images.unflatten(0, (steps, images.shape[0] // steps)).transpose(0, 1)


def images_of(parts: Sequence[Tensor]) -> list[Tensor]:
    """Parts [B, T, 4*F_p, H, W] as images [T*B, 4*F_p, H, W], channels-last to the last stride."""
    return [p.permute(1, 0, 3, 4, 2).flatten(0, 1).permute(0, 3, 1, 2) for p in parts]


def convolution_gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor, padding: list[int], dilation: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution's input, weight and bias, as far as ``needs`` asks for each; None for the others.

    ``dy`` [N, outputs, H, W], channels-last; ``x`` [N, C, H, W] may be None where the weight's is not asked for.
    """
    needs_x, needs_weight, needs_bias = needs
    dx, dw, db = None, None, channel_sums(dy).to(dy.dtype) if needs_bias else None
    images = (dy.shape[0], *dy.shape[2:])
    branch = BranchWeights(weight, dilation=tuple(dilation))
    if needs_x and (way := prepared(branch, images, 1, gradient=True).way):
        dx, needs_x = way(dy), False
    if needs_weight and pairs.serves(weight, images, dilation):
        dw, needs_weight = pairs.weight_gradient(x, dy, weight), False
    elif needs_weight and unfolding.serves(weight, images, dilation, "weight"):
        dw, needs_weight = unfolding.weight_gradient(x, dy, weight), False
    elif needs_weight and (m := cpu_convolution.tile_size(weight, dilation, images)):
        dw, needs_weight = fourier.weight_gradient(x, dy, weight.shape[2], m), False
    if needs_x or needs_weight:
        x = layout.stand_in(dy, weight.shape[1]) if x is None else x
        mask = [needs_x, needs_weight, False]
        by_torch = torch.ops.aten.convolution_backward(
            dy, x, weight, None, [1, 1], padding, dilation, False, [0, 0], 1, mask
        )
        dx, dw = by_torch[0] if needs_x else dx, by_torch[1] if needs_weight else dw
    return dx, dw, db


def branch_gradients(dy: Tensor, x: Tensor, b: BranchWeights, needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of a branch's weight, bias, bottleneck and bottleneck bias, as far as ``needs`` asks for each."""
    weight, bias, *narrow = needs
    if b.bottleneck is None:
        return [*convolution_gradients(dy, x, b.weight, b.padding, b.dilation, (False, weight, bias))[1:], None, None]
    a = F.conv2d(x, b.bottleneck, b.bottleneck_bias) if weight else None
    da, dw, db = convolution_gradients(dy, a, b.weight, b.padding, b.dilation, (any(narrow), weight, bias))
    if not any(narrow):
        return [dw, db, None, None]
    return [dw, db, *convolution_gradients(da, x, b.bottleneck, [0, 0], [1, 1], (False, *narrow))[1:]]


def mix_gradient(dparts: list[Tensor], w: TransitionWeights, v: Tensor | None) -> Iterator[Tensor]:
    """Gradients [N, 4*F_r, H, W] of the branches' outputs from those of the parts, which are let go of on the way.

    ``v`` is :func:`premix`'s value, needed only where there is a tanh.
    """
    if w.mix is not None:
        dz = dparts.pop()
        du = conv2d_input(dz.shape, w.mix, dz, groups=w.mix_groups)
        if w.mix_tanh:
            du = torch.ops.aten.tanh_backward(du, v)
        del dz
        dparts += map(channels_last, deinterleave(du, w.sizes))
    while dparts:
        yield dparts.pop(0)


def input_gradient(dparts: list[Tensor], w: TransitionWeights, v: Tensor | None = None) -> Tensor:
    """The gradient [N, C, H, W] of a transition's input.

    ``dparts`` are the parts' gradients [N, 4*F_p, H, W]; the list is emptied, so that memory may be had again.
    ``v`` is :func:`premix`'s value, needed only where there is a tanh.
    """
    total, dys = None, mix_gradient(dparts, w, v)
    for b in w.branches:
        b = b if b.way is not None else replace(b, weight=layout.channels_last(b.weight))  # not all at once
        total = add_image_gradient(total, next(dys), b)
    return total


def add_image_gradient(total: Tensor | None, dy: Tensor, b: BranchWeights) -> Tensor:
    """``total`` [N, C, H, W], or None, plus the gradient of a branch's input; in place, few images at a time."""
    if total is None:
        return image_gradient(dy, b)
    spans = max(1, -(-total.nbytes // ADDED_BYTES))
    for some, dy_of_some in zip(total.tensor_split(spans), dy.tensor_split(spans), strict=True):
        some += image_gradient(dy_of_some, b)
    return total


def image_gradient(dy: Tensor, b: BranchWeights) -> Tensor:
    """The gradient [N, C, H, W] of a branch's input from that of its output."""
    if b.way is not None:
        da = b.way(dy)
    else:
        da, _, _ = convolution_gradients(dy, None, b.weight, b.padding, b.dilation, (True, False, False))
    if b.bottleneck is not None:
        da, _, _ = convolution_gradients(da, None, b.bottleneck, [0, 0], [1, 1], (True, False, False))
    return da


def weight_gradients(
    x: Tensor, dparts: Sequence[Tensor], w: TransitionWeights, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of :meth:`TransitionWeights.tensors`, as far as ``needs`` asks for each, over all N images at once.

    ``x`` [N, C, H, W] is the transition's input, ``dparts`` the parts' gradients [N, 4*F_p, H, W]; all channels-last.
    """
    *of_branches, mix, mix_bias = needs
    grads: list[Tensor | None] = [None] * len(of_branches)
    v = premix(x, w) if mix or (w.mix_tanh and any(of_branches)) else None
    if any(of_branches):
        n = w.TENSORS_PER_BRANCH
        for r, (dy, b) in enumerate(zip(mix_gradient(list(dparts), w, v), w.branches, strict=True)):
            grads[n * r : n * r + n] = branch_gradients(dy, x, b, of_branches[n * r : n * r + n])
    grads.append(conv2d_weight(v, w.mix.shape, dparts[0], groups=w.mix_groups) if mix else None)
    grads.append(channel_sums(dparts[0]).to(dparts[0].dtype) if mix_bias else None)
    return grads
