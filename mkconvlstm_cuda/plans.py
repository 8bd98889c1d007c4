"""How each family of kernels would run a problem: arithmetic alone, so that no GPU is needed to see it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

Kernels = list[tuple[int, int]]  # kernel size, F_r

SHOWN = (
    "blocks", "period", "pieces", "tile_channels", "tiles_m", "tiles_n", "windows", "window", "groups", "split",
    "stages", "patch", "box_slots", "box", "shared_memory",
)  # fmt: skip


def parse(problem: str) -> tuple[int, int, int, Kernels]:
    """``B,H,W,K:F_r,...`` as batch, height, width and kernels.

    Raises:
        ValueError: it is something else.
    """
    try:
        batch, height, width, *kernels = problem.split(",")
        pairs = [(int(size), int(channels)) for size, channels in (k.split(":") for k in kernels)]
        sizes = int(batch), int(height), int(width)
    except ValueError:
        pairs = []
    if not pairs or min(*sizes, *(n for pair in pairs for n in pair)) < 1 or any(size % 2 == 0 for size, _ in pairs):
        raise ValueError(
            f"plan: got {problem!r}, wanted B,H,W,K:F_r,... with odd kernel sizes K, as 10,14,14,3:128,5:128"
        )
    return *sizes, pairs


def device_limits() -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may have: this machine's GPU's, or an H100's."""
    if not torch.cuda.is_available():
        return 132, 232448
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def describe(problem: str, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """(family and pass, launch or why there is none) for ``B,H,W,K:F_r,...``, the hidden transition of a layer.

    Raises:
        ValueError: ``problem`` is something else.
        ImportError: the host module is missing.
    """
    from . import _C

    batch, height, width, kernels = parse(problem)
    multiprocessors, shared_memory = device_limits()
    sizes = {"batch": batch, "height": height, "width": width}
    limits = {"multiprocessors": multiprocessors, "shared_memory": shared_memory}
    hopper = [(size, size, channels) for size, channels in kernels]
    any_gpu = [(channels, size, size, 1, 1) for size, channels in kernels]
    half, single = dtype in (torch.float16, torch.bfloat16), dtype == torch.float32

    def outcome(served: bool, plan, **arguments) -> str:
        if not served:
            return f"none for {str(dtype).removeprefix('torch.')}"
        try:
            made = plan(**sizes, **arguments)
        except ValueError as error:
            return f"none: {error}"
        named = [(name, getattr(made, name)) for name in SHOWN if hasattr(made, name)]
        shown = [f"{name} {len(value) if isinstance(value, list) else value}" for name, value in named]
        return ", ".join(shown) or repr(made)

    yield "triton", triton_plan(batch, height, width, kernels, dtype, multiprocessors, shared_memory)
    for direction in ("forward", "backward"):
        for mode, plan in (("", f"plan_{direction}"), (", resident", f"plan_resident_{direction}")):
            yield f"cuda sm90, {direction}{mode}", outcome(half, getattr(_C, plan), branches=hopper, **limits)
    element_bytes = {"element_bytes": dtype.itemsize}
    yield "cuda sm80", outcome(half or single, _C.plan_sm80, branches=any_gpu, **element_bytes, **limits)
    yield "cuda simt", outcome(not half, _C.plan_simt, branches=any_gpu, multiprocessors=multiprocessors)
    hidden = sum(channels for _, channels in kernels)
    name = str(dtype).removeprefix("torch.")
    yield "gate step", outcome(True, _C.plan, channels=hidden, dtype=name, multiprocessors=multiprocessors)


def triton_plan(
    batch: int, height: int, width: int, kernels: Kernels, dtype: torch.dtype, multiprocessors: int, shared_memory: int
) -> str:
    """The configurations of the Triton kernels, forward and backward."""
    from . import triton_backend
    from .convolution import tensor_cores_allowed
    from .triton_kernels import plan

    if dtype == torch.float64:
        return "none for float64"
    hidden = sum(channels for _, channels in kernels)
    if reason := triton_backend.too_large(batch, height * width, hidden):
        return f"none: {reason}"
    branches = tuple(plan.Kernel(channels, size, size) for size, channels in kernels)
    problem = plan.Problem(batch, height, width, branches, dtype.itemsize, tensor_cores_allowed(dtype))
    return "; ".join(
        f"{direction}: {plan.choose(problem, direction == 'backward', multiprocessors, shared_memory)}"
        for direction in ("forward", "backward")
    )
