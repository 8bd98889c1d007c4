"""The functional interface: checks at the door, then a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import dispatch, ops, reference, tracing
from .autograd import SequenceFunction, SequenceOptions, has_autocast, last_states, preactivations
from .convolution import BranchWeights, TransitionWeights, sequence_of, time_major, transition_forward
from .forks import check_fork
from .reference import accumulate_dtype

OUTPUT_PEEPHOLES = ("previous", "current")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
State = tuple[Tensor, Tensor]


def mkconvlstm(
    x: Tensor,
    input_weights: Sequence[Tensor],
    hidden_weights: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    peephole: Tensor | None = None,
    output_peephole: str = "previous",
    state: State | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """Multi-kernel convolutional LSTM over a sequence (Agethen & Hsu, eqs. 6-10, section III-C).

    ``z_t = sum over branches of conv(x_t) and conv(h_{t-1}) + bias``, interleaved gate by gate (Fig. 4b), then
    ``c_t = f * c_{t-1} + i * g`` and ``h_t = o * tanh(c_t)``.

    Args:
        x: input [B, T, C, H, W]; float64, float32, float16 or bfloat16; any strides.
        input_weights: one [4*F_r, C, K_r, K_r] a branch, odd kernel sizes, rows gate-major (i, f, g, o).
        hidden_weights: one [4*F_r, F, K_r, K_r] a branch, F the sum of all F_r; its branches and kernel sizes may
            differ from the input's.
        bias: [4F], gate-major, or None.
        peephole: [3, F, 1, 1] or [3, F, H, W], the rows w_ci, w_cf, w_co, or None; float32 or x's dtype.
        output_peephole: "previous": o sees c_{t-1} (eq. 8); "current": o sees c_t (Shi et al. 2015).
        state: (h_0, c_0), each [B, F, H, W]; None for zeros. c may be float32 where x has a half type.
        backend: "auto" or a name in ``mkconvlstm_cuda.backends()``.

    Returns:
        h [B, T, F, H, W] in x's dtype (autocast's, under autocast), contiguous, and (h_T, c_T), each [B, F, H, W];
        c_T is float32 where h has a half type.

    Raises:
        ValueError: a shape, a kernel size or a name is wrong, or the named backend cannot serve the call.
        TypeError: an argument is no tensor, or dtypes differ.
    """
    check_tensor("x", x, ("B", "T", "C", "H", "W"))
    check_weights("input_weights", input_weights, x.shape[2])
    hidden_channels = sum(w.shape[0] for w in input_weights) // 4
    check_weights("hidden_weights", hidden_weights, hidden_channels)
    if (got := sum(w.shape[0] for w in hidden_weights) // 4) != hidden_channels:
        raise ValueError(f"hidden_weights: got {got} hidden channels in all, wanted the input's {hidden_channels}")
    if bias is not None:
        check_tensor("bias", bias, ("4F",), {"4F": 4 * hidden_channels})
    for name, weights in (("input_weights", input_weights), ("hidden_weights", hidden_weights)):
        for r, w in enumerate(weights):
            check_same_kind("x", x, f"{name}[{r}]", w)
    check_same_kind("x", x, "bias", bias)
    dtype = compute_dtype(x, input_weights[0])
    w_x = TransitionWeights(tuple(BranchWeights(w) for w in input_weights))
    w_h = TransitionWeights(tuple(BranchWeights(w) for w in hidden_weights))
    check_peephole(peephole, output_peephole, hidden_channels, x)
    h_0, c_0 = check_state(state, (x.shape[0], hidden_channels, *x.shape[3:]), dtype, x)
    chosen = choose(x, dtype, w_h, peephole=peephole, backend=backend)
    w_x, w_h = w_x.to(dtype), w_h.to(dtype)

    h, h_n, c_n = sequence(
        chosen, x, w_x, w_h, bias, h_0, c_0, dtype=dtype, peephole=peephole, output_peephole=output_peephole
    )
    return h, (h_n, c_n)


class LiveTransition:
    """An input transition that no weights express, and what it reads.

    ``compute(first)`` returns z as images [T*B, 4F, H, W] of all steps, by torch's own autograd; it may be called once
    more in backward, then with ``first=False``, unless a tensor that it ``reads`` has changed since.
    """

    def __init__(self, compute: Callable[[bool], Tensor], *reads: Tensor | None):
        self.compute = compute
        self.reads = []
        if not torch.compiler.is_compiling():  # compiled graphs see to that themselves
            self.reads = [(t, t._version) for t in reads if t is not None and not t.is_inference()]

    def again(self) -> Tensor:
        """z once more, a fresh tensor.

        Raises:
            RuntimeError: a tensor has changed.
        """
        if any(t._version != version for t, version in self.reads):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                "the input or a parameter of the input-to-hidden transition changed between forward and backward"
            )
        return self.compute(False)


def sequence(
    backend: dispatch.Backend,
    x: Tensor,
    inputs: TransitionWeights | LiveTransition,
    hidden: TransitionWeights | Callable[[Tensor], Tensor],
    bias: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    *,
    dtype: torch.dtype,
    peephole: Tensor | None = None,
    output_peephole: str = "previous",
    norm: Callable[[Tensor], Tensor] | None = None,
    lengths: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """A whole sequence on checked arguments, by the ``backend`` that :func:`choose` chose for them.

    Args:
        x: [B, T, C, H, W].
        inputs: the input transition in ``dtype``.
        hidden: the hidden transition in ``dtype``; or, where it has parts that no weights can express, a function
            [B, F, H, W] -> [B, 4F, H, W].
        bias: [4F], gate-major, of any dtype; or None.
        h_0, c_0: [B, F, H, W] in ``dtype`` and its accumulate dtype; None for zeros.
        norm: of z_t + U(h_{t-1}), [B, 4F, H, W]; only with the reference.
        lengths: [B] int64 on x's device, each in 1..T, or None.
        recompute: keep h, and c of a few steps, for backward. What comes back to steps past ``lengths`` is lost: their
            h must not be used.

    Returns:
        h [B, T, F, H, W], and the last h and c [B, F, H, W] of each sequence.
    """
    if peephole is not None:
        peephole = peephole.to(accumulate_dtype(dtype))
    live = isinstance(inputs, LiveTransition)
    z = inputs.compute(True) if live else None
    if backend.forward is None:  # torch's own autograd throughout
        images = z if live else transition_forward(time_major(x, dtype), inputs)
        images = images if bias is None else images + bias.to(dtype)[:, None, None]
        apply = (lambda h: transition_forward(h, hidden)) if isinstance(hidden, TransitionWeights) else hidden
        h, c = reference.sequence(sequence_of(images, x.shape[1]), apply, h_0, c_0, peephole, output_peephole, norm)
        return h, last_states(h, lengths), last_states(c, lengths)
    w_x = None if live else inputs
    if torch.compiler.is_compiling():
        return tracing.layer(
            backend.name, x, z, w_x, hidden, h_0, c_0, peephole, bias, lengths, dtype, output_peephole, recompute
        )
    tensors = [*([] if live else inputs.tensors()), *hidden.tensors()]
    differentiable = (None if live else x, z, h_0, c_0, peephole, bias, *tensors)
    again = inputs.again if live else None
    input_form = None if live else inputs.form
    options = SequenceOptions(backend.name, dtype, input_form, hidden.form, output_peephole, recompute, again)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        x = x.detach() if live else x
        return SequenceFunction.apply(options, x, z, h_0, c_0, peephole, bias, lengths, *tensors)
    parts = preactivations(x, z, w_x, hidden, dtype, options.bias_of_input(bias))
    args = (hidden.tensors(), *hidden.form, h_0, c_0, peephole, output_peephole, options.bias_of_hidden(bias))
    h, c = ops.sequence_forward(parts, *args, lengths is not None, backend.name)
    return h, last_states(h, lengths), last_states(c, lengths)


def choose(
    x: Tensor,
    dtype: torch.dtype,
    hidden: TransitionWeights | Callable[[Tensor], Tensor],
    *,
    peephole: Tensor | None = None,
    live_parts: str | None = None,
    backend: str = "auto",
) -> dispatch.Backend:
    """The backend for ``x`` [B, T, C, H, W] in ``dtype``, before anything is computed: a refusal leaves no trace.

    ``live_parts`` says what weights cannot express, where ``hidden`` is a function. Raises as :func:`dispatch.choose`.
    """
    if torch.compiler.is_compiling():
        return dispatch.choose_traced(live_parts, backend)
    check_fork(x.device)
    if live_parts:
        batch, _, _, height, width = x.shape
        problem = dispatch.Problem(x.device, dtype, batch, height, width, live_parts=live_parts)
    else:
        problem = dispatch.Problem.of(x, dtype, hidden, peephole)
    return dispatch.choose(problem, backend)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """dtype that convolutions run in: autocast's where it is on, else the weights'."""
    if autocast_enabled(x.device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for ``device``."""
    return has_autocast(device) and torch.is_autocast_enabled(device.type)


def check_tensor(name: str, t, dims: tuple[str, ...], wanted: dict[str, int] | None = None) -> None:
    """``t`` is a dense tensor of a dtype in DTYPES and of dimensions ``dims``; those in ``wanted`` have that size.

    Raises:
        TypeError: it is no tensor, not dense, or of another dtype.
        ValueError: its shape is another.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, wanted a torch.Tensor [{', '.join(dims)}]")
    if t.layout != torch.strided or t.is_nested:
        raise TypeError(f"{name}: got a tensor that is {'nested' if t.is_nested else t.layout}, wanted a dense one")
    sizes = [f"{d}={wanted[d]}" if wanted and d in wanted and d != str(wanted[d]) else d for d in dims]
    described = f"{name}: got shape {list(t.shape)}, wanted [{', '.join(sizes)}]"
    if t.dim() != len(dims):
        raise ValueError(f"{described} ({len(dims)} dimensions)")
    for size, dim in zip(t.shape, dims, strict=True):
        if wanted and dim in wanted and size != wanted[dim]:
            raise ValueError(described)
    check_dtype(name, t.dtype)
    for dim in ("T", "C", "H", "W"):
        if dim in dims and t.shape[dims.index(dim)] == 0:
            raise ValueError(f"{described} with {dim} at least 1")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """``dtype`` is one of DTYPES."""
    if dtype not in DTYPES:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name}: got dtype {dtype}, wanted one of {wanted}")


def check_same_kind(name: str, t: Tensor, other_name: str, other: Tensor | None) -> None:
    """``other`` lies on the device of ``t`` and, outside of autocast, has its dtype."""
    if other is None:
        return
    if t.device != other.device:
        raise ValueError(f"{other_name}: got device {other.device}, wanted that of {name}, {t.device}")
    if t.dtype != other.dtype and not autocast_enabled(other.device):
        raise TypeError(f"{other_name}: got dtype {other.dtype}, wanted that of {name}, {t.dtype}")


def check_weights(name: str, weights: Sequence[Tensor], channels: int) -> None:
    """A non-empty list of [4*F_r, ``channels``, K_r, K_r] with odd kernel sizes."""
    if not isinstance(weights, (Sequence, torch.nn.ParameterList)) or not len(weights):
        got = "an empty list" if isinstance(weights, Sequence) else type(weights).__name__
        raise TypeError(f"{name}: got {got}, wanted a list of tensors, one a branch")
    for r, w in enumerate(weights):
        check_tensor(f"{name}[{r}]", w, ("4*F_r", "C", "K_r", "K_r"), {"C": channels})
        if w.shape[0] % 4 or not w.shape[0]:
            raise ValueError(f"{name}[{r}]: got {w.shape[0]} rows, wanted a multiple of 4 (gates i, f, g, o)")
        check_kernel_size(f"{name}[{r}]", tuple(w.shape[2:]))


def check_kernel_size(name: str, size: tuple[int, int]) -> None:
    """Both of ``size`` are odd, so that "same" padding is symmetric."""
    if any(k < 1 or k % 2 == 0 for k in size):
        raise ValueError(f"{name}: got kernel size {size[0]}x{size[1]}, wanted odd sizes of at least 1")


def check_peephole(peephole: Tensor | None, output_peephole: str, hidden_channels: int, x: Tensor) -> None:
    """[3, F, 1, 1] or [3, F, H, W] for ``x`` [..., H, W]."""
    if output_peephole not in OUTPUT_PEEPHOLES:
        raise ValueError(f"output_peephole: got {output_peephole!r}, wanted 'previous' or 'current'")
    if peephole is None:
        return
    check_tensor("peephole", peephole, ("3", "F", "H or 1", "W or 1"), {"3": 3, "F": hidden_channels})
    if tuple(peephole.shape[2:]) not in ((1, 1), tuple(x.shape[-2:])):
        raise ValueError(
            f"peephole: got image size {tuple(peephole.shape[2:])}, wanted (1, 1) or the input's {tuple(x.shape[-2:])}"
        )
    if peephole.device != x.device:
        raise ValueError(f"peephole: got device {peephole.device}, wanted the input's {x.device}")
    if peephole.dtype not in (allowed := {x.dtype, accumulate_dtype(x.dtype)}) and not autocast_enabled(x.device):
        raise TypeError(f"peephole: got dtype {peephole.dtype}, wanted {' or '.join(sorted(map(str, allowed)))}")


def check_state(
    state: State | None, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(h_0, c_0), each of ``shape`` on x's device, cast to ``dtype`` and its accumulate dtype; Nones for None."""
    if state is None:
        return None, None
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"state: got {type(state).__name__}, wanted a pair (h_0, c_0) of tensors {list(shape)}")
    dims = ("L", "B", "F", "H", "W")[-len(shape) :]
    for name, t in zip(("state[0] (h_0)", "state[1] (c_0)"), state, strict=True):
        check_tensor(name, t, dims, dict(zip(dims, shape, strict=True)))
        if t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, wanted the input's {x.device}")
        if t.dtype not in (allowed := {dtype, accumulate_dtype(dtype), x.dtype}):
            raise TypeError(f"{name}: got dtype {t.dtype}, wanted {' or '.join(sorted(map(str, allowed)))}")
    return state[0].to(dtype), state[1].to(accumulate_dtype(dtype))
