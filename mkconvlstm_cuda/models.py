"""Models made of MKConvLSTM layers: the video forecaster of Agethen & Hsu, section III-B1."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import FlowAttention
from .data import patchify, unpatchify
from .functional import check_tensor
from .layer import MKConvLSTM
from .transition import Kernels


class Forecaster(nn.Module):
    """Encoder-decoder that reads the past of a video and predicts its future (section III-B1; Shi et al. 2015).

    The encoder, an MKConvLSTM, reads T_in frames; its final state (h, c) of every layer initialises the decoder, a
    second MKConvLSTM of the same shape, which generates T_out hidden maps. A 1x1 convolution on the hidden maps of
    the decoder's last layer gives the logits of the frames. Frames are cut into patches on their way in and put
    together on their way out, so callers see whole frames on both sides.

    What the decoder reads: nothing by default, as in the paper (a single channel of zeros; its state says it all).
    With `conditional=True` it reads the frame before: the last one of the past, then its own predictions, or, in
    training, the `targets` that `forward` was given (teacher forcing). That is slower, for the decoder then runs frame
    by frame, unless it is teacher-forced.

    Args:
        in_channels: channels C of a frame; 1 for grey images.
        kernels: kernel size -> hidden channels, or a list of Branch; as for MKConvLSTM, for both halves.
        patch_size: p; frames of H x W are processed as p * p * C channels of H/p x W/p (section IV-C2 uses 4).
        conditional: whether the decoder reads the frame before.
        attention: FlowAttention for the encoder; the flow is patched as the frames are, so that it needs
            `flow_channels=2 * patch_size**2`.
        num_layers: MKConvLSTM layers in each half.
        layer_options: everything else that MKConvLSTM takes (hidden_kernels, mix, norm, peephole, backend, recompute,
            device, dtype, ...), for both halves. `peephole="pixel"` needs image_size=(H/p, W/p).

    Raises:
        ValueError: an argument is out of its range, or one that a forecaster sets itself (batch_first, bidirectional).
        TypeError: `attention` is no FlowAttention, or `kernels` is of no kind that MKConvLSTM takes.
    """

    def __init__(
        self,
        in_channels: int,
        kernels: Kernels,
        *,
        patch_size: int = 4,
        conditional: bool = False,
        attention: FlowAttention | None = None,
        num_layers: int = 1,
        **layer_options,
    ):
        super().__init__()
        for name, value in (("in_channels", in_channels), ("patch_size", patch_size), ("num_layers", num_layers)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, wanted an integer of at least 1")
        for name in ("batch_first", "bidirectional"):
            if name in layer_options:
                raise ValueError(f"{name}: Forecaster is batch first and runs forward in time only; leave it out")
        self.in_channels, self.patch_size, self.conditional = in_channels, patch_size, conditional
        channels = in_channels * patch_size**2
        options = {"num_layers": num_layers, **layer_options}
        self.encoder = MKConvLSTM(channels, kernels, attention=attention, **options)
        if attention is not None and attention.flow_channels % patch_size**2:
            wanted = f"2 * patch_size**2 = {2 * patch_size**2}, since the flow is patched as the frames are"
            raise ValueError(f"attention: got flow_channels={attention.flow_channels}, wanted {wanted}")
        self.decoder = MKConvLSTM(channels if conditional else 1, kernels, **options)
        placement = {name: layer_options.get(name) for name in ("device", "dtype")}
        self.readout = nn.Conv2d(self.encoder.hidden_channels, channels, kernel_size=1, **placement)

    def forward(
        self, past: Tensor, horizon: int, *, flow: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """Logits of the next `horizon` frames; their sigmoid is the prediction.

        Args:
            past: [B, T_in, C, H, W], values in [0, 1]; T_in >= 1.
            horizon: T_out, at least 1.
            flow: [B, T_in, 2, H, W] for an encoder with attention, dx and dy in pixels per frame.
            targets: [B, T_out, C, H, W], teacher forcing for a conditional forecaster: the decoder reads
                targets[:, :-1] in the place of its own predictions.

        Returns:
            [B, T_out, C, H, W], in the dtype that the layers compute in.

        Raises:
            ValueError: a shape or `horizon` does not fit; the message names the argument.
            TypeError: an argument is no tensor, or of a dtype that is not floating point.
        """
        self._check(past, horizon, flow, targets)
        p = self.patch_size
        past, flow = patchify(past, p), None if flow is None else patchify(flow, p)
        _, state = self.encoder(past, flow=flow)
        if not self.conditional:
            batch, _, _, height, width = past.shape
            hidden, _ = self.decoder(past.new_zeros(batch, horizon, 1, height, width), state)
            logits = self._read(hidden)
        elif targets is not None:
            seen = torch.cat([past[:, -1:], patchify(targets[:, :-1], p)], dim=1)
            logits = self._read(self.decoder(seen, state)[0])
        else:
            frame, steps = past[:, -1], []
            for _ in range(horizon):
                hidden, state = self.decoder.step(frame, state)
                steps.append(self.readout(hidden))
                frame = steps[-1].sigmoid().to(past.dtype)
            logits = torch.stack(steps, dim=1)
        return unpatchify(logits, p)

    @torch.no_grad()
    def forecast(self, past: Tensor, horizon: int, *, flow: Tensor | None = None) -> Tensor:
        """The next `horizon` frames, [B, horizon, C, H, W] with values in (0, 1), without a gradient.

        Any horizon will do, also a longer one than in training. Arguments as for `forward`. Dropout and batch norm
        follow the module's mode: call `eval()` first.
        """
        return self(past, horizon, flow=flow).sigmoid()

    def _check(self, past: Tensor, horizon: int, flow: Tensor | None, targets: Tensor | None) -> None:
        """The arguments of `forward` fit; raises as it says."""
        check_tensor("past", past, ("B", "T", "C", "H", "W"), {"C": self.in_channels})
        batch, steps, channels, height, width = past.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"past: got shape {list(past.shape)}, wanted H and W multiples of {self.patch_size}")
        if flow is not None:
            wanted = {"B": batch, "T_in": steps, "flow_channels": 2, "H": height, "W": width}
            if (attention := self.encoder.cells[0].attention) is not None:
                wanted["flow_channels"] = attention.flow_channels // self.patch_size**2
            check_tensor("flow", flow, tuple(wanted), wanted)
        if not isinstance(horizon, int) or horizon < 1:
            raise ValueError(f"horizon: got {horizon!r}, wanted an integer of at least 1")
        if targets is not None and not self.conditional:
            raise ValueError("targets: got a tensor, but only a conditional forecaster reads them")
        if targets is not None:
            wanted = {"B": batch, "T_out": horizon, "C": channels, "H": height, "W": width}
            check_tensor("targets", targets, tuple(wanted), wanted)

    def _read(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, channels, H, W] of hidden maps [B, T, F, H, W]."""
        return self.readout(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


def sequence_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The paper's sigmoid cross-entropy (section III-B1): summed over time and pixels, averaged over sequences.

    L = -1/N sum_n sum_t p log(p^) + (1 - p) log(1 - p^), where p^ = sigmoid(logits). Divide by `target[0].numel()` for
    the mean per pixel. Computed in float32 or wider.

    Args:
        logits: [N, ...], before the sigmoid. target: p, the same shape, values in [0, 1].

    Returns:
        a scalar, in nats per sequence. Raises ValueError if the shapes differ.
    """
    if logits.shape != target.shape:
        raise ValueError(f"target: got shape {tuple(target.shape)}, wanted that of logits, {tuple(logits.shape)}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="sum") / len(logits)


def compare_with_last_frame(logits: Tensor, past: Tensor, future: Tensor) -> dict[str, Any]:
    """How good a forecast is, beside how good it is to repeat the last frame of the past.

    Args:
        logits: of the prediction, [N, T_out, C, H, W], floating point.
        past: [N, T_in, C, H, W]. future: the truth, as logits; both with values in [0, 1].

    Returns:
        `clips` = N; `prediction` and `last_frame`, each with `cross_entropy` (nats per sequence, section III-B1), `mse`
        (mean over pixels), `mse_by_frame` (a list over T_out) and `csi` (critical success index of pixels brighter than
        0.5: hits / (hits + misses + false alarms)); `mse_ratio`, the first mse over the second;
        `lowest_cross_entropy`, that of a perfect prediction, for grey pixels always cost something; and
        `pixels_per_sequence`. A repeated pixel of exactly 0 or 1 can cost infinitely much and is moved in by 0.01.
    """
    repeated = past[:, -1:].expand_as(future)

    def scores(logits: Tensor, guess: Tensor) -> dict[str, Any]:
        squares = (guess - future).square()
        hits, union = ((guess > 0.5) & (future > 0.5)).sum(), ((guess > 0.5) | (future > 0.5)).sum()
        return {
            "cross_entropy": sequence_cross_entropy(logits, future).item(),
            "mse": squares.mean().item(),
            "mse_by_frame": squares.mean(dim=(0, 2, 3, 4)).tolist(),
            "csi": (hits / union.clamp(min=1)).item(),
        }

    prediction = scores(logits, logits.sigmoid())
    last_frame = scores(repeated.logit(eps=0.01), repeated)
    return {
        "clips": len(future),
        "prediction": prediction,
        "last_frame": last_frame,
        "mse_ratio": prediction["mse"] / max(last_frame["mse"], 1e-12),
        "lowest_cross_entropy": sequence_cross_entropy(future.logit(eps=1e-6), future).item(),
        "pixels_per_sequence": future[0].numel(),
    }
