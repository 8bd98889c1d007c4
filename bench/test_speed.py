"""The workloads as a pytest-benchmark suite: ``pytest bench/``, ``--benchmark-autosave``, ``--benchmark-compare``.

It times what ``mkconvlstm bench`` times, without peers under torch.compile and without the check against float64.
"""

import pytest
import torch
from mkconvlstm_cuda.bench.contestants import builders
from mkconvlstm_cuda.bench.workloads import WORKLOADS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
NAMES = [name for name in WORKLOADS if name.startswith("cpu_") == (DEVICE.type == "cpu")]
CONTESTANTS = list(builders(WORKLOADS[NAMES[0]], DEVICE, DTYPE))


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("part", ["forward", "train"])
@pytest.mark.parametrize("workload", NAMES)
def test_speed(benchmark, workload, part, contestant):
    w = WORKLOADS[workload]
    torch.manual_seed(1)
    x = torch.randn(w.shape, device=DEVICE, dtype=DTYPE)
    dy = torch.randn(w.batch, w.steps, w.hidden_channels, w.height, w.width, device=DEVICE, dtype=DTYPE)
    run = getattr(builders(w, DEVICE, DTYPE)[contestant](x, dy), part)

    def synchronised():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = f"{workload}, {part}, {str(DTYPE).removeprefix('torch.')}"
    benchmark.pedantic(synchronised, rounds=10, warmup_rounds=2)
