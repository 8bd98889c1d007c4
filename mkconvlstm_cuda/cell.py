"""One layer in one direction: its parameters, and a sequence through it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import functional
from .arguments import check_flag, is_integer
from .attention import FlowAttention, FlowMasks
from .autograd import no_autocast
from .convolution import time_major
from .dispatch import check_name
from .functional import LiveTransition, State
from .transition import Kernels, Transition, is_image_size, normalise, parse_branches


class MKConvLSTMCell(nn.Module):
    """One step of a multi-kernel convolutional LSTM, as ``nn.LSTMCell`` is one of an LSTM (the paper's eqs. 6-10).

    Args: those of :class:`~mkconvlstm_cuda.MKConvLSTM` that concern a single layer and direction.
    """

    def __init__(
        self,
        in_channels: int,
        kernels: Kernels,
        hidden_kernels: Kernels | None = None,
        *,
        mix: str | None = None,
        mix_activation: str | None = None,
        norm: str | None = None,
        gate_norm: int | None = None,
        peephole: str | None = None,
        output_peephole: str = "previous",
        image_size: tuple[int, int] | None = None,
        attention: FlowAttention | None = None,
        bias: bool = True,
        forget_bias: float = 1.0,
        backend: str = "auto",
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not is_integer(in_channels, 1):
            raise ValueError(f"in_channels: got {in_channels!r}, wanted an int of at least 1")
        if peephole not in (None, "channel", "pixel"):
            raise ValueError(f"peephole: got {peephole!r}, wanted None, 'channel' or 'pixel'")
        if output_peephole not in functional.OUTPUT_PEEPHOLES:
            raise ValueError(f"output_peephole: got {output_peephole!r}, wanted 'previous' or 'current'")
        if image_size is not None and not is_image_size(image_size):
            raise ValueError(f"image_size: got {image_size!r}, wanted (H, W) or None")
        if peephole == "pixel" and image_size is None:
            raise ValueError("image_size: got None, wanted (H, W), which peephole='pixel' needs")
        if attention is not None and not isinstance(attention, FlowAttention):
            raise TypeError(f"attention: got {type(attention).__name__}, wanted a FlowAttention or None")
        if not isinstance(forget_bias, (int, float)) or not math.isfinite(forget_bias):
            raise TypeError(f"forget_bias: got {forget_bias!r}, wanted a finite number")
        if dtype is not None:
            functional.check_dtype("dtype", dtype)
        factory = {"device": device, "dtype": dtype}
        branches = parse_branches("kernels", kernels)
        hidden_branches = branches if hidden_kernels is None else parse_branches("hidden_kernels", hidden_kernels)
        self.in_channels, self.hidden_channels = int(in_channels), sum(b.channels for b in branches)
        if (got := sum(b.channels for b in hidden_branches)) != self.hidden_channels:
            raise ValueError(
                f"hidden_kernels: got {got} channels in all, wanted those of kernels, {self.hidden_channels}"
            )
        self.output_peephole, self.forget_bias = output_peephole, forget_bias
        self.backend = check_name(backend)
        self.last_backend: str | None = None
        outputs = 4 * self.hidden_channels
        if gate_norm is not None and (not is_integer(gate_norm, 1) or outputs % gate_norm):
            raise ValueError(f"gate_norm: got {gate_norm!r}, wanted a number of groups that divides 4F={outputs}")
        transition = (mix, mix_activation, norm, image_size)
        self.input_transition = Transition(self.in_channels, branches, *transition, **factory)
        self.hidden_transition = Transition(self.hidden_channels, hidden_branches, *transition, **factory)
        self.gate_norm = None if gate_norm is None else nn.GroupNorm(int(gate_norm), outputs, **factory)
        self.attention = None
        if attention is not None:
            self.attention = FlowMasks(attention, self.input_transition.kernel_sizes, self.in_channels, **factory)
        self.bias = nn.Parameter(torch.empty(outputs, **factory)) if check_flag("bias", bias) else None
        size = image_size if peephole == "pixel" else (1, 1)
        self.peephole = nn.Parameter(torch.empty(3, self.hidden_channels, *size, **factory)) if peephole else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions as ``nn.Conv2d`` starts them; bias and peepholes 0, the forget gate's bias ``forget_bias``.

        A network that was given for flow masks stays as it is.
        """
        given = [] if self.attention is None or self.attention.is_ours else list(self.attention.modules())
        for m in self.modules():
            if m is not self and m not in given and hasattr(m, "reset_parameters"):
                m.reset_parameters()
        with torch.no_grad():
            if self.bias is not None:
                self.bias.zero_()
                self.bias[self.hidden_channels : 2 * self.hidden_channels] = self.forget_bias
            if self.peephole is not None:
                self.peephole.zero_()

    def forward(self, x_t: Tensor, state: State | None = None, flow: Tensor | None = None) -> State:
        """One step.

        Args:
            x_t: [B, C, H, W].
            state: (h, c), each [B, F, H, W]; None for zeros.
            flow: [B, flow_channels, H, W], where the cell has flow attention.

        Returns:
            (h_t, c_t), each [B, F, H, W].

        Raises:
            ValueError, TypeError: as :meth:`MKConvLSTM.forward`.
        """
        functional.check_tensor("x_t", x_t, ("B", "C", "H", "W"), {"C": self.in_channels})
        x = x_t.unsqueeze(1)
        if flow is not None:
            functional.check_tensor("flow", flow, ("B", "flow_channels", "H", "W"))
            flow = flow.unsqueeze(1)
        self.check_input(x, flow)
        shape = (x.shape[0], self.hidden_channels, *x.shape[3:])
        h_0, c_0 = functional.check_state(state, shape, self.compute_dtype(x), x)
        _, h, c = self.sequence(x, h_0, c_0, flow)
        return h, c

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """dtype of convolutions and hidden states for input ``x``: autocast's where it is on, else the weights'."""
        return functional.compute_dtype(x, self.input_transition.branches[0].conv.weight)

    def check_input(self, x: Tensor, flow: Tensor | None) -> None:
        """``x`` [B, T, C, H, W] and ``flow`` [B, T, flow_channels, H, W] fit this cell.

        Raises:
            ValueError: a shape or device is wrong, or flow is missing or not asked for.
            TypeError: a dtype is wrong, or an argument is no tensor.
        """
        functional.check_tensor("x", x, ("B", "T", "C", "H", "W"), {"C": self.in_channels})
        functional.check_same_kind("the weights", self.input_transition.branches[0].conv.weight, "x", x)
        size = self.input_transition.image_size
        if size is not None and tuple(x.shape[3:]) != size:
            raise ValueError(f"x: got image size {tuple(x.shape[3:])}, wanted that of norm='layer_pixel', {size}")
        if self.peephole is not None:
            functional.check_peephole(self.peephole, self.output_peephole, self.hidden_channels, x)
        if self.attention is None:
            if flow is not None:
                raise ValueError("flow: got a tensor, wanted None: this layer has no flow attention")
            return
        if flow is None:
            raise ValueError("flow: got None, wanted a tensor, which flow attention needs")
        batch, steps, _, height, width = x.shape
        wanted = {"B": batch, "T": steps, "flow_channels": self.attention.flow_channels, "H": height, "W": width}
        functional.check_tensor("flow", flow, tuple(wanted), wanted)
        if flow.device != x.device:
            raise ValueError(f"flow: got device {flow.device}, wanted the input's {x.device}")

    def sequence(
        self,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        flow: Tensor | None = None,
        lengths: Tensor | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Checked ``x`` [B, T, C, H, W] through all steps: h [B, T, F, H, W], and the last h and c [B, F, H, W]."""
        dtype = self.compute_dtype(x)
        with no_autocast(x.device):  # from here every dtype is chosen, not guessed
            live = self.live_parts
            hidden = self.hidden_transition if live else self.hidden_transition.weights().to(dtype)
            chosen = functional.choose(x, dtype, hidden, peephole=self.peephole, live_parts=live, backend=self.backend)
            masks = None if self.attention is None else self.masks(flow, dtype)
            weights = None
            if masks is None and not self.input_transition.live_parts:
                weights = self.input_transition.weights().to(dtype)

            inputs = weights or self.live_input_transition(x, masks, dtype)
            h, h_n, c_n = functional.sequence(
                chosen,
                x,
                inputs,
                hidden,
                self.bias,
                h_0,
                c_0,
                dtype=dtype,
                peephole=self.peephole,
                output_peephole=self.output_peephole,
                norm=None if self.gate_norm is None else lambda z: normalise(z, self.gate_norm),
                lengths=lengths,
                recompute=recompute,
            )
        self.last_backend = chosen.name
        return h, h_n, c_n

    @property
    def live_parts(self) -> str | None:
        """What of the recurrence no weights can express now, in words; None if nothing."""
        parts = [self.hidden_transition.live_parts, None if self.gate_norm is None else "a norm of the gates"]
        return " and ".join(p for p in parts if p) or None

    def live_input_transition(self, x: Tensor, masks: list[Tensor | None] | None, dtype: torch.dtype) -> LiveTransition:
        """``X(x_t)`` of all steps, by the modules themselves."""
        training = self.training

        def compute(first: bool) -> Tensor:
            if self.training != training:
                raise RuntimeError("the layer changed between training and eval mode between forward and backward")
            return self.input_transition(time_major(x, dtype), masks, update_statistics=first)

        return LiveTransition(compute, x, *self.input_transition.parameters())

    def masks(self, flow: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        """Flow masks of all steps, in ``dtype``: for each branch images [T*B, C or 1, H, W] or None."""
        parameter = next(self.attention.parameters(), None)
        images = time_major(flow, flow.dtype if parameter is None else parameter.dtype)
        return [None if m is None else m.to(dtype) for m in self.attention(images)]

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, hidden_channels={self.hidden_channels}, backend={self.backend!r}"
