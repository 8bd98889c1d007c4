"""The command line, as a user types it."""

import json
import re
import sys

import pytest
from mkconvlstm_cuda.bench.workloads import WORKLOADS
from typer.testing import CliRunner

from mkconvlstm_cuda import __version__, cli, dispatch, library


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(cli.console, "_width", 200)


def run(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, list(args))
    assert result.exit_code == code, result.output
    return result.output


def test_version_is_the_package_s():
    assert run("--version") == f"mkconvlstm {__version__}\n"
    assert "Multi-kernel convolutional LSTM" in run("--help")


def test_info_says_what_can_run_and_why_not():
    output = run("info").split("available")[1].split("compiled gate step")[0]  # the table of backends
    for backend in dispatch.BACKENDS.values():
        (line,) = [row for row in output.splitlines() if re.match(rf"\W+{backend.name}\W", row)]
        assert (backend.available() or "yes")[:40] in line


def test_info_says_why_a_library_is_not_loaded(monkeypatch):
    assert re.search(r"\Wcpu\W+yes\W", run("info").split("compiled gate step")[1])
    monkeypatch.setattr(library, "load", lambda kind: f"no {kind} library today")
    assert "no cpu library today" in run("info").split("compiled gate step")[1]


def test_info_shows_a_plan():
    output = run("info", "--plan", "10,14,14,3:128,5:128", "--dtype", "bfloat16")
    wanted = {"triton": "block_m", "sm90, forward": "tiles_m 16", "sm80": "blocks_x", "simt": "none"}
    for family, says in wanted.items():
        assert says in output.split(family)[1].split("cuda")[0], family
    assert "vector_width" in output.split("gate step")[1]
    assert "none" in run("info", "--plan", "1,8,8,3:4", "--dtype", "float64").split("triton")[1]
    for wrong in ("10,256", "1,8,8,4:4", "0,8,8,3:4", "1,8,8,3"):
        assert "B,H,W,K:F_r" in run("info", "--plan", wrong, code=2)


def test_check_passes_here():
    output = run("check", "--device", "cpu", "--dtype", "float64", "--dtype", "bfloat16")
    assert " 0 failed" in output
    assert re.search(r"aten\W+float64\W+gradcheck", output)


def test_one_problem_is_told_in_the_singular():
    assert re.search(
        r"^1 problem, 1 run of .* 0 failed", run("check", "--device", "cpu", "--problem", '{"backend":"aten"}')
    )


def test_check_fails_when_a_backend_is_wrong(monkeypatch):
    """The check is able to fail: an aten whose forget gate is a little off is found out."""
    aten = dispatch.BACKENDS["aten"]

    def wrong(z, *args):
        z[0][:, :, 1] += 1e-3
        return aten.forward(z, *args)

    broken = {
        **dispatch.BACKENDS,
        "aten": dispatch.Backend("aten", aten.available, aten.supports, wrong, aten.backward),
    }
    monkeypatch.setattr(dispatch, "BACKENDS", broken)
    monkeypatch.setattr("mkconvlstm_cuda.ops.BACKENDS", broken)
    output = run("check", "--device", "cpu", "--dtype", "float64", code=1)
    assert "failed: aten, float64, two kernel sizes" in output


def test_bench_writes_a_report(tmp_path):
    assert "paper_mk35" in run("bench", "--list")
    output = run(
        "bench", "tiny", "--dtype", "float32", "--seconds", "0.1", "--output", str(tmp_path), "--device", "cpu", code=2
    )
    assert "no workload tiny" in output
    assert "precision of GPUs" in run("bench", "cpu_mnist_57", "--dtype", "tf32", "--device", "cpu", code=2)
    args = ("--dtype", "float32", "--seconds", "0.1", "--output", str(tmp_path), "--device", "cpu")
    assert "| cpu_mnist_57 | float32 | ours, aten, recompute |" in run("bench", "cpu_mnist_57", *args)
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert {r["contestant"] for r in results["records"]} >= {"usual loop", "ours, aten", "ours, aten, recompute"}
    assert (tmp_path / "cpu.png").stat().st_size > 10_000
    assert (tmp_path / "cpu.md").read_text().count("cpu_mnist_57") == len(results["records"])


@pytest.mark.parametrize(("terminal", "width"), [(False, 80), (True, 80), (True, 300)])
def test_workloads_are_listed_whole(terminal, width, monkeypatch):
    monkeypatch.setattr(cli.console, "_width", width)
    monkeypatch.setattr(cli.console, "_force_terminal", terminal)
    output = run("bench", "--list")
    for w in WORKLOADS.values():
        (line,) = [line for line in output.splitlines() if re.match(rf"[|│] {w.name} ", line)]
        assert all(cell in line for cell in (str(w.shape), str(w.kernels), w.stands_for))
    assert ("│" in output) == (width == 300)


def test_bench_without_matplotlib_keeps_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    args = ("cpu_mnist_57", "--dtype", "bfloat16", "--seconds", "0.1", "--output", str(tmp_path), "--device", "cpu")
    assert "pip install matplotlib" in run("bench", *args, code=2)
    assert (tmp_path / "cpu.json").exists()


def test_forecast_writes_everything_and_resumes(tmp_path):
    folder = str(tmp_path / "run")
    output = run("forecast", "--steps", "2", "--output", folder, "--channels", "2", "--device", "cpu")
    assert "error over that of copying" in output
    assert "128 unseen sequences; 2 steps in" in output
    for name in ("forecast.png", "forecast.gif", "metrics.json"):
        assert (tmp_path / "run" / name).stat().st_size > 500
    run("forecast", "--steps", "3", "--output", folder, "--channels", "2", "--device", "cpu", "--resume")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["training"]["steps"] == 3
    output = run(
        "forecast", "--steps", "3", "--output", folder, "--channels", "3", "--device", "cpu", "--resume", code=2
    )
    assert "resume" in output


def test_forecast_says_how_to_go_on(monkeypatch):
    def stop(output, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mkconvlstm_cuda.forecast.run", stop)
    output = run("forecast", "--steps", "2", "--channels", "2", code=130)
    assert "continue with the same command and --resume (demo)" in output
    assert "--resume in place of --overwrite" in run("forecast", "--overwrite", code=130)


def test_a_device_that_is_not_there_is_an_error():
    assert "device 'cuda:99'" in run("check", "--device", "cuda:99", code=2)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("check --fuzz 0", "1"),
        ("check --fuzz 2 --jobs 0", "1"),
        ("check --fuzz 2 --problem {}", "got both"),
        ("check --problem {}", "problem: got '{}', wanted the fields of a problem"),
        ('check --problem {"backend":"aten"} --dtype float32', "--dtype: got --problem too"),
        ('check --problem {"backend":"aten"} --jobs 2', "--jobs is for --fuzz"),
        ("check --seed 0", "--seed is for --fuzz"),
        ("info --dtype float32", "--dtype is for --plan"),
        ("check --device meta", "wanted cpu or cuda"),
        ("bench --seconds 0", "--seconds: got 0, wanted a positive number"),
        ("bench --seconds -1", "--seconds: got -1"),
        ("bench --seconds nan", "--seconds: got nan"),
        ("forecast --channels 0 --steps 1", "got channels 0"),
        ("forecast --kernel 3 --kernel 3 --steps 1", "--kernel: got 3, 3, wanted each size once"),
        ("forecast --minutes 0", "minutes: got 0.0"),
        ("experiment", "wanted one of fig3-speed"),
        ("experiment --page no/such/folder", "there is no folder"),
        ("experiment table3-parameters --quick --set seeds=3", "seeds: got 3"),
        ("experiment table3-parameters --quick --set seeds=[1,1]", "wanted each once"),
        ("experiment table3-parameters --quick --set seeds=[-1]", "seeds: got [-1]"),
        ("experiment table3-parameters --quick --set variants={}", "variants: got {}"),
        ("experiment fig3-speed --quick --set kernels=3", "kernels: got 3, wanted a list"),
        ("experiment fig3-speed --quick --set kernels=[3]", "an entry of kernels: got 3, wanted a string"),
        ("experiment fig3-speed --quick --set kernels=[]", "kernels: got [], wanted at least one entry"),
        ('experiment fig3-speed --quick --set kernels=["3x3"]', "kernels: the claims of fig3-speed cannot be judged"),
        ("experiment fig3-speed --quick --set speeds=[1,2.5]", "speeds: the claims of fig3-speed cannot be judged"),
        ('experiment fig3-speed --quick --set steps="x"', "steps: got 'x', wanted an integer"),
        ("experiment fig3-speed --quick --set steps=2.5", "steps: got 2.5, wanted an integer"),
        ("experiment fig3-speed --quick --set steps=true", "steps: got True, wanted an integer"),
        ("experiment fig3-speed --quick --set steps=-1", "steps: got -1, wanted a number of at least 1"),
        (
            "experiment fig3-speed --quick --set learning_rate=NaN",
            "learning_rate: got nan, wanted a number of at least 0",
        ),
        ("experiment fig3-speed --quick --set image_size=null", "image_size: got None, wanted an integer"),
        ("experiment fig3-speed --quick --set test_clips=3", "test_clips: got 3, wanted at least batch_size"),
        ('experiment fig3-speed --quick --set variants={"a":3}', "variants: a: got 3, wanted an object"),
        ('experiment fig3-speed --quick --set variants={"a":{}}', "variants: a: got {}, wanted at least one entry"),
        ('experiment fig3-speed --quick --set variants={"a":{"speed":1}}', "variants: a: missing keys ['kernels']"),
        (
            'experiment fig3-speed --quick --set variants={"a":{"speed":1,"kernels":{"4":8}}}',
            "variants: a: kernels: got '4', wanted odd kernel sizes",
        ),
        (
            'experiment fig3-speed --quick --set variants={"a":{"speed":1,"kernels":{"3":8}}}',
            "variants: the claims of fig3-speed cannot be judged",
        ),
        (
            'experiment fig13-gates --quick --set variants={"a":{"kernels":{"3":8},"mxi":"gate"}}',
            "variants: a: missing keys [], unknown keys ['mxi']",
        ),
        ("train-classifier . --split . --device nope", "device 'nope'"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in " ".join(run(*args.split(), code=2).split())
    assert not list(tmp_path.iterdir())


def test_a_plan_is_none_where_a_backend_refuses():
    output = run("info", "--plan", "1,4096,4096,3:64", "--dtype", "bfloat16")
    assert "31 bits" in output.split("triton")[1].split("cuda")[0]
