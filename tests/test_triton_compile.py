"""The Triton kernels, compiled ahead of time for GPUs that need not be there."""

import pytest
import torch
from triton_problems import DEVICES, PLANS, compiled, launch, triton

from mkconvlstm_cuda.convolution import BranchWeights, TransitionWeights


def launches_of(problem, dtype, backward, monkeypatch, everything=False) -> list:
    """The launches of one pass of ``problem`` for an H100, on tensors without data."""
    launches = []
    monkeypatch.setattr(launch, "launch", lambda kernel, _, args, options: launches.append((kernel, args, options)))
    monkeypatch.setattr(launch, "make_pass", launch.make_pass.__wrapped__)  # the like may have been made for others
    monkeypatch.setattr(launch, "device_limits", lambda _: DEVICES["H100"])
    monkeypatch.setattr(launch, "tensor_cores_allowed", lambda _: problem.tensor_cores)

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def states(*shape, dtype=dtype):
        return empty(*shape, dtype=dtype).permute(1, 0, 4, 2, 3)

    b, t, f, h, w = problem.batch, 4, problem.hidden, problem.height, problem.width
    branches = tuple(
        BranchWeights(
            empty(4 * k.channels, f, k.height, k.width),
            empty(4 * k.channels) if everything else None,
            dilation=k.dilation,
        )
        for k in problem.kernels
    )
    weights = TransitionWeights(branches)
    if problem.mix:
        mix_bias = empty(4 * f) if everything else None
        weights = TransitionWeights(branches, empty(4 * f, problem.mix_depth, 1, 1), mix_bias, problem.mix == 4)
    h_0 = empty(b, f, h, w) if everything else None
    c_0 = empty(b, f, h, w, dtype=torch.float32) if everything else None
    peephole = empty(3, f, h, w, dtype=torch.float32) if everything else None
    z = [states(t, b, h, w, 4 * n) for n in weights.parts]
    if backward:
        c = states(t, b, h, w, f, dtype=torch.float32)
        lengths = empty(b, dtype=torch.int64) if everything else None
        launch.backward(
            z, empty(b, t, f, h, w), c, weights, h_0, c_0, peephole, "current", empty(b, t, f, h, w), c_0, lengths
        )
    else:
        launch.forward(z, weights, h_0, c_0, peephole, "current", True, empty(4 * f) if everything else None)
    return launches


def compile_launch(kernel, args, options, capability: int):
    """The launch's kernel, compiled without a device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.float32: "fp32",
        torch.int32: "i32",
        torch.int64: "i64",
    }
    known = {"num_warps", "num_stages", "maxnreg"}
    compiler_options = {k: v for k, v in options.items() if k in known}
    constants = {k: v for k, v in options.items() if k.isupper()}
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    values = {name: values[name] for name in kernel.arg_names}
    signature, constexprs, attributes = {}, {}, {}
    unspecialised = {p.name for p in kernel.params if p.do_not_specialize}
    for n, (name, v) in enumerate(values.items()):
        if isinstance(v, torch.Tensor):
            signature[name] = f"*{kinds[v.dtype]}"
            attributes[(n,)] = [["tt.divisibility", 16]]
        elif isinstance(v, tuple):
            signature[name] = tuple(f"*{kinds[t.dtype]}" for t in v)
            attributes |= {(n, i): [["tt.divisibility", 16]] for i in range(len(v))}
        elif hasattr(v, "block_shape"):
            signature[name] = f"tensordesc<{kinds[v.base.dtype]}{list(v.block_shape)}>"
        elif name in constants or (v == 1 and name not in unspecialised):
            signature[name], constexprs[(n,)] = "constexpr", v
        else:
            signature[name] = "i32" if abs(v) < 2**31 else "i64"
            if v % 16 == 0 and name not in unspecialised:
                attributes[(n,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=compiler_options)


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("paper", torch.bfloat16),
        ("paper, mix gate", torch.bfloat16),
        ("radar", torch.float16),
        ("radar, mix full", torch.float16),
        ("odd", torch.float32),
        ("odd, mix gate", torch.float32),
        ("exact", torch.float32),
        ("exact, mix full", torch.float32),
    ],
    ids=str,
)
def test_kernels_compile_without_a_gpu(name, dtype, backward, capability, monkeypatch):
    launches = launches_of(PLANS[name], dtype, backward, monkeypatch, everything=name.startswith(("odd", "exact")))
    assert [kernel.__name__ for kernel, *_ in launches][-1] == ("backward_kernel" if backward else "forward_kernel")
    for kernel, args, options in launches[-2:]:
        binary = compile_launch(kernel, args, options, capability)
        assert binary.metadata.shared <= DEVICES["H100" if capability == 90 else "A100"][1]
        if capability == 90 and name.startswith(("paper", "radar")) and kernel.__name__ != "pack_kernel":
            assert "wgmma" in binary.asm["ptx"]
