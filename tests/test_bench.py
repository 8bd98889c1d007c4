"""The benchmark tells the truth: it checks before it times, and counts what it says."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mkconvlstm_cuda.bench import contestants, machine, measure, report, sanitize, scaling, sweeps
from mkconvlstm_cuda.bench.peers import BatchedInputLoop, UsualLoop
from mkconvlstm_cuda.bench.precision import PRECISIONS, defaults
from mkconvlstm_cuda.bench.timing import take_turns
from mkconvlstm_cuda.bench.workloads import WORKLOADS, Workload
from processes import torchrun

from mkconvlstm_cuda import MKConvLSTM

ROOT = Path(__file__).resolve().parent.parent
TINY = Workload("tiny", 2, 3, 4, 6, 5, {3: 4, 5: 4}, "tests")
CPU = torch.device("cpu")
FLOAT32 = PRECISIONS["float32"]


@pytest.mark.parametrize("peer", [UsualLoop, BatchedInputLoop])
@pytest.mark.parametrize("mix", [None, "gate", "full"])
def test_peers_compute_what_the_layer_does(mix, peer):
    torch.manual_seed(0)
    layer = MKConvLSTM(4, {3: 3, 5: 2}, mix=mix, dtype=torch.float64, backend="reference")
    torch.nn.init.normal_(layer.cells[0].bias)
    x = torch.randn(TINY.shape, dtype=torch.float64)
    torch.testing.assert_close(peer(layer)(x), layer(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "gflop"),
    [("paper_mk35", 1048), ("paper_3", 555), ("paper_5", 1541), ("ucf_mk35", 6988), ("mnist_57", 223),
     ("radar_35", 616), ("small_35", 22.8)],
)  # fmt: skip
def test_operations_are_counted_as_published(name, gflop):
    assert WORKLOADS[name].forward_flops / 1e9 == pytest.approx(gflop, rel=3e-3)


@pytest.mark.parametrize("mix", [None, "gate", "full"])
def test_operations_agree_with_torchs_own_counter(mix):
    from torch.utils.flop_counter import FlopCounterMode

    workload = replace(TINY, mix=mix)
    layer = MKConvLSTM(workload.channels, workload.kernels, mix=mix)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        UsualLoop(layer)(torch.randn(workload.shape))
    assert counter.get_total_flops() == workload.forward_flops


def test_a_workload_with_a_mix_is_checked_and_timed():
    records = measure.run_workload(replace(TINY, mix="gate"), CPU, FLOAT32, 1.0, 0.01)
    assert {"usual loop", "loop, input batched, channels-last", "ours, aten"} <= {r.contestant for r in records}


def test_nothing_wrong_is_timed(monkeypatch):
    class Wrong(BatchedInputLoop):
        def forward(self, x):
            return super().forward(x) * 1.01

    monkeypatch.setattr(contestants, "BatchedInputLoop", Wrong)
    with pytest.raises(RuntimeError, match=r"loop, input batched, channels-last is .* away from float64"):
        measure.run_workload(TINY, CPU, FLOAT32, 1.0, 0.01)


def test_a_record_adds_up():
    records = {r.contestant: r for r in measure.run_workload(TINY, CPU, FLOAT32, 2.0, 0.05)}
    r = records["ours, aten"]
    assert r.training_tflops == pytest.approx(3 * TINY.forward_flops / r.training_ms / 1e9)
    assert r.share_of_peak == pytest.approx(r.training_tflops / 2.0)
    h = 4 * 2 * 3 * 8 * 30
    assert records["ours, aten, recompute"].kept_mib * 2**20 == pytest.approx(h, abs=512)
    assert records["usual loop"].kept_mib > records["ours, aten"].kept_mib


def test_precisions_set_torchs_switches_for_as_long_as_they_are_in_force():
    def allowed():
        return [switch.allow_tf32 for switch in (torch.backends.cudnn, torch.backends.cuda.matmul)]

    assert defaults(torch.device("cuda")) == ["float32", "tf32", "bfloat16"]
    assert "tf32" not in defaults(CPU)
    before = allowed()
    for outer in ("float32", "tf32"):
        with PRECISIONS[outer].in_force():
            for name, precision in PRECISIONS.items():
                with precision.in_force():
                    assert allowed() == [name == "tf32"] * 2
                assert allowed() == [outer == "tf32"] * 2
    assert allowed() == before


def test_sweeps_change_one_size_at_a_time(monkeypatch, tmp_path):
    base = sweeps.BASE
    for axis, value, w in sweeps.points(base):
        changed = {"T": w.steps, "B": w.batch, "F": w.hidden_channels, "H": w.height}[axis[0]]
        assert changed == value
        same = [w.steps == base.steps, w.batch == base.batch, w.kernels == base.kernels, w.height == base.height]
        assert same.count(False) <= 1
        assert w.width == w.height
    monkeypatch.setattr(sweeps, "BASE_CPU", TINY)
    monkeypatch.setattr(
        sweeps,
        "AXES",
        {"T, steps": ((1, 2), sweeps.AXES["T, steps"][1]), "B, batch": ((1, 2), sweeps.AXES["B, batch"][1])},
    )
    records = sweeps.run(CPU, FLOAT32, 0.01)
    assert {(r["axis"], r["value"]) for r in records} == {(a, n) for a in sweeps.AXES for n in (1, 2)}
    assert {r["contestant"] for r in records} >= {"usual loop", "ours, aten"}
    report.plot_sweeps(records, tmp_path / "sweeps.png")
    assert (tmp_path / "sweeps.png").stat().st_size > 5000


def test_the_driver_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.driver_version() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.95.05\necho 580.95.05\n")
    program.chmod(0o755)
    assert machine.driver_version() == "580.95.05"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert machine.driver_version() is None


def test_a_report_tells_what_sanitizers_said(tmp_path):
    first = [sanitize.Verdict("host", True, "408 passed", 60.0), sanitize.Verdict("memcheck", False, "1 error", 2.0)]
    sanitize.write(first, tmp_path)
    sanitize.write([sanitize.Verdict("memcheck", True, "0 errors", 3.0)], tmp_path)
    assert report.stale(tmp_path / "sanitizers.json", machine.kernels_hash()) is None
    assert "the code has other: run `make sanitize`" in report.stale(tmp_path / "sanitizers.json", "other")
    results = json.loads((ROOT / "bench" / "reports" / "cpu.json").read_text())
    for kind, told in (("cpu", False), ("cuda", True)):
        _, table, *_ = report.write(results | {"device_type": kind, "driver": "580.95.05", "sweeps": None}, tmp_path)
        text = table.read_text()
        assert (f"| memcheck | clean | 0 errors | 3 s | no GPU, torch {torch.__version__} |" in text) == told
        assert ("408 passed" in text) == told
        assert "1 error " not in text
        assert "driver 580.95.05; kernels " + results["kernels"] in text


def test_busy_time_counts_overlaps_once():
    assert measure.covered([(0, 1), (0.5, 2), (3, 4)]) == pytest.approx(3 / 4)
    assert measure.covered([(5, 6), (1, 5)]) == pytest.approx(1)


def test_contestants_take_turns():
    order = []
    timings = take_turns({n: lambda n=n: order.append(n) for n in "abc"}, CPU, seconds=0, min_rounds=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(len(t.runs) == 3 and t.median >= 0 for t in timings.values())


SCALE = """
from pathlib import Path
from mkconvlstm_cuda.bench import scaling, workloads

scaling.WORKLOADS["tiny"] = workloads.Workload("tiny", 2, 3, 4, 6, 5, {3: 4, 5: 4}, "tests")
scaling.main("tiny", "float32", rounds=1, output=Path("scaling.json"))
"""


def test_weak_scaling_of_two_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("scale.py").write_text(SCALE)
    torchrun("scale.py", processes=2)
    found = json.loads(Path("scaling.json").read_text())
    assert (found["processes"], found["workload"]) == (2, "tiny")
    for together, alone in scaling.ALONE.items():
        times = found["milliseconds"]
        assert 0 < found["efficiency"][together] == times[alone] / times[together]


def test_hash_follows_the_kernels(tmp_path):
    for folder in ("csrc", "triton_kernels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("1")
    first = machine.kernels_hash(tmp_path)
    (tmp_path / "csrc" / "notes.txt").write_text("no source")
    assert machine.kernels_hash(tmp_path) == first
    (tmp_path / "csrc" / "a.cu").write_text("2")
    assert machine.kernels_hash(tmp_path) != first
    assert machine.kernels_hash(tmp_path / "csrc") is None


def test_committed_reports_belong_to_this_code():
    reports = sorted((ROOT / "bench" / "reports").glob("*.json"))
    assert reports
    for path in reports:
        if reason := report.stale(path, machine.kernels_hash()):
            warnings.warn(reason, stacklevel=1)


def test_readme_shows_the_table_of_the_committed_report():
    readme = (ROOT / "README.md").read_text()
    table = (ROOT / "bench" / "reports" / "cpu.md").read_text()
    assert table.strip() in readme


def test_readme_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
