"""``MKConvLSTM``: layers, directions, lengths and state around :class:`MKConvLSTMCell`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import check_flag, is_integer
from .attention import FlowAttention
from .cell import MKConvLSTMCell
from .dispatch import check_name
from .functional import State, check_state, check_tensor
from .transition import Kernels


class MKConvLSTM(nn.Module):
    """Multi-kernel convolutional LSTM (Agethen & Hsu), with ``nn.LSTM``'s conventions.

    ``z_t = X(x_t) + U(h_{t-1}) + b``, ``c_t = f * c_{t-1} + i * g``, ``h_t = o * tanh(c_t)`` (eqs. 6-10), where X and
    U hold several kernel sizes side by side (section III-C).

    Args:
        in_channels: C.
        kernels: {kernel size: hidden channels}, or a list of :class:`Branch`; hidden channels F are their sum.
        hidden_kernels: the same for hidden-to-hidden; None: as ``kernels``.
        mix: 1x1 convolution after the interleaving (Fig. 4c): None, "gate" (F x F for each gate) or "full" (4F x 4F).
        mix_activation: None or "tanh", before the mix.
        norm: None, "batch", "group", "layer" or "layer_pixel" (a scale and a shift of [channels, H, W]; needs
            ``image_size``), after every convolution but the mix. Batch norm's statistics run over B and T for the
            input, over B at each step for the hidden state.
        gate_norm: None, or the groups of a GroupNorm of z_t itself, before the peepholes; ``reference`` computes it.
        peephole: None, "channel" (w_c* of [F, 1, 1]) or "pixel" ([F, H, W]; needs ``image_size``).
        output_peephole: "previous": the output gate sees c_{t-1} (eq. 8); "current": c_t (Shi et al. 2015).
        image_size: (H, W), for ``peephole="pixel"`` and ``norm="layer_pixel"``.
        attention: :class:`FlowAttention` for masks from optical flow (section III-D) on the first layer's input.
        num_layers: layers stacked; each takes the output of the one below.
        bidirectional: a second set of layers runs backwards in time; outputs are concatenated along channels.
        dropout: probability of zeroing an element between layers, in training.
        bias: whether there is a bias b [4F].
        forget_bias: what the forget gate's part of b starts from.
        batch_first: tensors are (B, T, C, H, W); else (T, B, C, H, W).
        recompute: keep only h, and c of a few steps, for backward, and run the recurrence once more there, piece by
            piece: about a fifth of the memory in between, for a third (CPUs) to four fifths (CUDA graphs) more time,
            eagerly on GPUs up to three times as much; ``reference`` ignores it.
            What norms, masks and pooling of the input need is kept by torch all the same.
        backend: "auto", or a name in ``mkconvlstm_cuda.backends()``, which then serves or raises its reason.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        kernels: Kernels,
        hidden_kernels: Kernels | None = None,
        mix: str | None = None,
        mix_activation: str | None = None,
        norm: str | None = None,
        gate_norm: int | None = None,
        peephole: str | None = None,
        output_peephole: str = "previous",
        image_size: tuple[int, int] | None = None,
        attention: FlowAttention | None = None,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        forget_bias: float = 1.0,
        batch_first: bool = True,
        recompute: bool = False,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not is_integer(num_layers, 1):
            raise ValueError(f"num_layers: got {num_layers!r}, wanted an int of at least 1")
        if not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: got {dropout!r}, wanted a probability in [0, 1]")
        if dropout and num_layers == 1:
            warnings.warn(f"dropout: got {dropout!r} with one layer; it acts between layers alone", stacklevel=2)
        self.num_layers = int(num_layers)
        self.bidirectional = check_flag("bidirectional", bidirectional)
        self.directions, self.dropout = 2 if bidirectional else 1, dropout
        self.batch_first, self.recompute = check_flag("batch_first", batch_first), check_flag("recompute", recompute)
        cells = []
        for layer in range(self.num_layers):
            for _ in range(self.directions):
                cells.append(
                    MKConvLSTMCell(
                        in_channels if layer == 0 else cells[0].hidden_channels * self.directions,
                        kernels,
                        hidden_kernels,
                        mix=mix,
                        mix_activation=mix_activation,
                        norm=norm,
                        gate_norm=gate_norm,
                        peephole=peephole,
                        output_peephole=output_peephole,
                        image_size=image_size,
                        attention=attention if layer == 0 else None,
                        bias=bias,
                        forget_bias=forget_bias,
                        backend=backend,
                        device=device,
                        dtype=dtype,
                    )
                )
        self.cells = nn.ModuleList(cells)
        self.in_channels = self.cells[0].in_channels

    @property
    def hidden_channels(self) -> int:
        """F."""
        return self.cells[0].hidden_channels

    @property
    def backend(self) -> str:
        """What is to serve, a backend's name or "auto"; setting it sets that of all cells.

        Raises:
            ValueError: there is no backend of the name that is set.
        """
        return self.cells[0].backend

    @backend.setter
    def backend(self, name: str) -> None:
        check_name(name)
        for cell in self.cells:
            cell.backend = name

    def reset_parameters(self) -> None:
        """New parameters for all layers: see :meth:`MKConvLSTMCell.reset_parameters`."""
        for cell in self.cells:
            cell.reset_parameters()

    @property
    def last_backend(self) -> str | None:
        """What served the last call, or None before the first; several names where the layers differed.

        A compiled graph chooses when it runs: "auto" stays "auto".
        """
        used = dict.fromkeys(c.last_backend for c in self.cells if c.last_backend)
        return ", ".join(used) or None

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        flow: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, State]:
        """A whole sequence.

        Args:
            x: [B, T, C, H, W] ([T, B, C, H, W] without ``batch_first``), in the parameters' dtype or under autocast.
            state: (h_0, c_0), each [num_layers * directions, B, F, H, W]; None for zeros.
            flow: [B, T, flow_channels, H, W] (laid out as x), with flow attention.
            lengths: [B] integers in 1..T, a tensor, a list or NumPy's: steps of each sequence that count. Later outputs
                are zero, (h_n, c_n) are the states after each sequence's last step, and the backward direction starts
                there. Only batch norm in training sees what lies beyond: zeros count in its statistics.

        Returns:
            output [B, T, directions * F, H, W] (laid out as x), contiguous, and (h_n, c_n), each
            [num_layers * directions, B, F, H, W], ordered as ``nn.LSTM``'s. c_n is float32 for half types.

        Raises:
            ValueError: a shape, device, length or state is wrong, or the named backend cannot serve.
            TypeError: a dtype is wrong, or an argument is no tensor.
        """
        dims = ("B", "T", "C", "H", "W") if self.batch_first else ("T", "B", "C", "H", "W")
        check_tensor("x", x, dims, {"C": self.in_channels})
        if not self.batch_first:
            x = x.transpose(0, 1)
            flow = flow.transpose(0, 1) if isinstance(flow, Tensor) and flow.dim() == 5 else flow
        self.cells[0].check_input(x, flow)
        batch, steps = x.shape[:2]
        shape = (len(self.cells), batch, self.hidden_channels, *x.shape[3:])
        h_0, c_0 = check_state(state, shape, self.cells[0].compute_dtype(x), x)
        lengths = check_lengths(lengths, batch, steps, x.device)
        valid = None
        if lengths is not None:
            valid = (torch.arange(steps, device=x.device) < lengths[:, None])[:, :, None, None, None]
            x, flow = x.where(valid, 0), None if flow is None else flow.where(valid, 0)
        final = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(self.directions):
                k = layer * self.directions + direction
                start = (None, None) if h_0 is None else (h_0[k], c_0[k])
                seen, seen_flow = x, flow if layer == 0 else None
                if direction == 1:
                    seen, seen_flow = reverse(x, lengths), None if seen_flow is None else reverse(seen_flow, lengths)
                h, h_n, c_n = self.cells[k].sequence(seen, *start, seen_flow, lengths, self.recompute)
                outputs.append(h if direction == 0 else reverse(h, lengths))
                final.append((h_n, c_n))
            x = outputs[0] if self.directions == 1 else torch.cat(outputs, dim=2)
            if valid is not None:
                x = x.where(valid, 0)
            if self.dropout and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        h_n, c_n = (s[0][None] if len(s) == 1 else torch.stack(s) for s in zip(*final, strict=True))
        return x if self.batch_first else x.transpose(0, 1).contiguous(), (h_n, c_n)

    def step(self, x_t: Tensor, state: State | None = None, flow: Tensor | None = None) -> tuple[Tensor, State]:
        """One frame of a stream; T calls give what :meth:`forward` gives for T frames, in eval mode.

        In training, batch norm of the input takes its statistics from this frame alone.

        Every call lays the weights out channels-last; ``layer.to(memory_format=torch.channels_last)`` does it once.

        Args:
            x_t: [B, C, H, W].
            state: what the last call returned; None at the start.
            flow: [B, flow_channels, H, W], with flow attention.

        Returns:
            h_t [B, F, H, W] of the last layer, and the state to pass to the next call.

        Raises:
            ValueError: the layer is bidirectional, or as :meth:`forward`.
        """
        if self.bidirectional:
            raise ValueError("step: got a bidirectional layer, wanted one that needs no future frames")
        check_tensor("x_t", x_t, ("B", "C", "H", "W"), {"C": self.in_channels})
        time = 1 if self.batch_first else 0
        if flow is not None:
            check_tensor("flow", flow, ("B", "flow_channels", "H", "W"))
            flow = flow.unsqueeze(time)
        output, state = self(x_t.unsqueeze(time), state, flow)
        return output.squeeze(time), state

    def extra_repr(self) -> str:
        shown = ("num_layers", "bidirectional", "dropout", "batch_first", "recompute")
        return ", ".join(f"{name}={getattr(self, name)}" for name in shown)


def check_lengths(
    lengths: Tensor | Sequence[int] | None, batch: int, steps: int, device: torch.device
) -> Tensor | None:
    """``lengths`` as int64 [B] on ``device``; accepts a tensor, a list of ints or NumPy's array.

    Raises:
        TypeError: it is neither, or not of integers.
        ValueError: its shape or a length is wrong.
    """
    if lengths is None:
        return None
    if not isinstance(lengths, (Tensor, list, tuple)) and not hasattr(lengths, "__array__"):
        raise TypeError(f"lengths: got {type(lengths).__name__}, wanted a tensor or list of {batch} integers")
    try:
        lengths = torch.as_tensor(lengths, dtype=None if len(lengths) else torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lengths: got {lengths!r}, wanted a tensor or list of {batch} integers") from error
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: got dtype {lengths.dtype}, wanted integers")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths: got shape {list(lengths.shape)}, wanted [B={batch}]")
    if lengths.is_meta and device.type != "meta":
        raise ValueError(f"lengths: got device meta, wanted one with values, such as the input's {device}")
    if torch.compiler.is_compiling():  # values are known when the graph runs
        torch._assert_async(((lengths >= 1) & (lengths <= steps)).all(), "lengths: wanted all in 1..T")
    elif batch and not (int(lengths.min()) >= 1 and int(lengths.max()) <= steps):
        raise ValueError(f"lengths: got {lengths.tolist()}, wanted all in 1..T={steps}")
    return lengths.to(device=device, dtype=torch.int64)


def reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """``x`` [B, T, ...] with the first ``lengths`` steps of each sequence in reverse order; its own inverse."""
    if lengths is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device)
    index = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]
