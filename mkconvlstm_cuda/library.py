"""The compiled operations of ``torch.ops.mkconvlstm``: their schema, and the libraries that hold their kernels."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import torch

_lock = threading.Lock()
_operations = torch.library.Library("mkconvlstm", "FRAGMENT")
# One step for each hidden branch ("part") r, with F_r channels: z[r] and u[r] are [B, 4*F_r, H, W], gate-major i f g o,
# h and c [B, F, H, W], where part r owns the channels after those of the parts before it. z, the pre-activations,
# become activated gates; u, the hidden-to-hidden part, is added, or is empty. c_prev, c and peephole [3, F, 1 or H,
# 1 or W] (rows w_ci, w_cf, w_co) are float64 for float64 z, else float32. c may be c_prev itself.
_operations.define(
    "gate_step_forward(Tensor(a!)[] z, Tensor[] u, Tensor c_prev, Tensor(b!) h, Tensor(c!) c, Tensor? peephole, "
    "bool current_output_peephole) -> ()"
)
# The gates become the gradients of the pre-activations. dc [B, F, H, W] holds dL/dc_t as step t+1 sees it and becomes
# dL/dc_{t-1}. dL/dh_t = dh + dh_prev, each of the gates' dtype or c's, of any strides that give pixels a single one.
_operations.define(
    "gate_step_backward(Tensor(a!)[] gates, Tensor? dh, Tensor? dh_prev, Tensor(b!) dc, Tensor c_prev, Tensor c, "
    "Tensor? peephole, bool current_output_peephole) -> ()"
)
# CPUs alone, float32; see `fourier`. images [N, C, H, W], channels-last, in tiles `step` pixels apart; spectrum
# [frequencies, 2, tiles, C], real and imaginary part; products [frequencies, 2, 2, tiles, C]: the parts of two spectra.
_operations.define(
    "fourier_analyze(Tensor images, int step, int before, int extent, int side, Tensor(a!) spectrum) -> ()"
)
_operations.define("fourier_synthesize(Tensor products, Tensor? bias, int step, int side, Tensor(a!) images) -> ()")
# The recurrence, one launch a step: `simt` in float64 or float32, `sm80` in half types or float32 (as TF32). Part r of
# z is [T, B, H, W, 4*F_r] and becomes the activated gates with `keep`, and is overwritten without; weights are packed
# by simt.py or sm80.py, and kernels are (height, width, dilation height, dilation width) of each part. h_0
# [B, H, W, F']; c_0 [B, H, W, F]; bias [4*F], gate-major, is added; peephole as above; state [2, B, H, W, F'] is
# scratch. F' is F, for `sm80` padded to 16 bytes. h [B, T, F, H, W] and c [T or, without `keep`, 1, B, H, W, F] are
# written. z, weights, h_0, state and h are of one type, the others as in a gate step. All contiguous.
# Backward, the gates become the gradients of the pre-activations. dh [B, T, F, H, W] of any strides; dc_n, dh_0 and dc
# [B, H, W, F], the last two written; lengths [B] int64: the steps after which dc_n enters, T without.
for _family in ("simt", "sm80"):
    _operations.define(
        f"{_family}_forward(Tensor(a!)[] z, Tensor[] weights, int[] kernels, Tensor? h_0, Tensor? c_0, Tensor? bias, "
        "Tensor? peephole, bool current_output_peephole, bool keep, Tensor(b!) state, Tensor(c!) h, Tensor(d!) c) -> ()"
    )
    _operations.define(
        f"{_family}_backward(Tensor(a!)[] gates, Tensor[] weights, int[] kernels, Tensor? c_0, Tensor c, "
        "Tensor? peephole, bool current_output_peephole, Tensor? dh, Tensor? dc_n, Tensor? lengths, Tensor(b!)? dh_0, "
        "Tensor(c!) dc) -> ()"
    )


def load(device_type: str) -> str | None:
    """Loads the library with the kernels for "cpu" or "cuda", at most once in a process.

    Returns:
        None where its operations are there; otherwise the reason why not, in words for the user. Never raises.
    """
    with _lock:
        return _load(device_type)


def refusal(device: torch.device) -> str | None:
    """Why the compiled operations do not run on ``device``; None if they do."""
    if (reason := load(device.type)) or device.type != "cuda":
        return reason
    return _architecture_refusal(device)


@functools.cache
def _architecture_refusal(device: torch.device) -> str | None:
    from mkconvlstm_cuda import _C

    return without_code_for(_C.build_info()["cuda_architectures"], torch.cuda.get_device_capability(device))


def without_code_for(architectures: str, capability: tuple[int, int]) -> str | None:
    """Why a library built for CMake's ``architectures``, "80;90a-real" say, has no code for a GPU; None if it has.

    Machine code runs on later GPUs of its own generation; PTX, which lacks "-real", on all later ones; what ends in "a"
    on its own architecture alone.
    """
    major, minor = capability
    for entry in architectures.split(";"):
        number, real = entry.removesuffix("-real"), entry.endswith("-real")
        built = divmod(int(number.rstrip("af")), 10)
        exact = number.endswith("a")
        if built == capability or (not exact and built <= capability and (built[0] == major or not real)):
            return None
    return f"the CUDA library was built for {architectures}, and the GPU is sm_{major}{minor}"


@functools.cache
def _load(device_type: str) -> str | None:
    try:
        from mkconvlstm_cuda import _C
    except ImportError as error:
        return f"the host module mkconvlstm_cuda._C cannot be imported: {error}"
    info = _C.build_info()
    if f"{device_type}_library" not in info:
        return f"there is none for {device_type}"
    if device_type == "cuda" and info["cuda_missing"]:
        return f"built without CUDA: {info['cuda_missing']}"
    path = Path(_C.__file__).with_name(info[f"{device_type}_library"])
    if not path.exists():
        return f"{path} is missing"
    if device_type == "cuda":
        # It needs libtorch_cuda.so, which only a CUDA build of torch brings, and a driver, which comes with a GPU.
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} cannot be loaded: {error.__cause__ or error}"  # torch's own words hide the loader's
    return None
