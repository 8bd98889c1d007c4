"""The command ``mkconvlstm``."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import __version__, classifier_cli, experiment_cli
from .bench.precision import PRECISIONS, defaults

app = typer.Typer(help="Multi-kernel convolutional LSTM for PyTorch.", no_args_is_help=True, add_completion=False)
app.add_typer(classifier_cli.app)
app.add_typer(experiment_cli.app)
console = Console()
PROGRESS_SECONDS = 10.0  # between lines of progress where there is no terminal


class DType(str, Enum):
    """dtypes by name."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Precision = Enum("Precision", {name: name for name in PRECISIONS}, type=str)


DeviceOption = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")]  # noqa: UP045


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mkconvlstm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Only print the version.")
    ] = False,
) -> None:
    """Those ahead of a command's name."""


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or a GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"device {name!r}: {str(error).splitlines()[0]}") from error
    return device


@app.command()
def info(
    plan: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="B,H,W,K:F_r,...", help="Only show how each family of kernels would run this recurrence."),
    ] = None,
    dtype: Annotated[Optional[DType], typer.Option(help="dtype for --plan, float32 by default.")] = None,  # noqa: UP045
) -> None:
    """Versions, devices, and which backends can run here or why not."""
    from . import dispatch, library

    if plan is not None:
        console.print(show_plans(plan, getattr(torch, (dtype or DType.float32).value)))
        return
    if dtype is not None:
        raise typer.BadParameter("--dtype is for --plan: got no --plan")
    software = Table("software", "version")
    software.add_row("python", platform.python_version())
    for package in ("mkconvlstm_cuda", "torch", "triton", "numpy"):
        try:
            software.add_row(package, version(package))
        except PackageNotFoundError:
            software.add_row(package, "[dim]not installed[/dim]")
    for key, value in build_info().items():
        software.add_row(f"built with: {key}", "[dim]none[/dim]" if value is None else str(value))
    devices = Table("device", "name")
    devices.add_row("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")
    for k in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(k)
        devices.add_row(f"cuda:{k}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    backends = Table("backend", "available")
    for backend in dispatch.BACKENDS.values():
        reason = backend.available()
        backends.add_row(backend.name, f"[yellow]no: {escape(reason)}[/yellow]" if reason else "[green]yes[/green]")
    libraries = Table("compiled gate step", "loaded", caption="without the CPU's, aten takes torch operations there")
    for kind in ("cpu", "cuda"):
        reason = library.load(kind)
        libraries.add_row(kind, f"[yellow]no: {escape(reason)}[/yellow]" if reason else "[green]yes[/green]")
    for table in (software, devices, backends, libraries):
        console.print(table)


def build_info() -> dict:
    """What the host module says of its build, or why there is none."""
    try:
        from . import _C
    except ImportError as error:
        return {"host module": f"missing: {error}"}
    return _C.build_info()


def show_plans(problem: str, dtype: torch.dtype) -> Table:
    from . import plans

    table = Table("kernels", "launch", title=f"{problem}, {dtype}")
    try:
        for family, launch in plans.describe(problem, dtype):
            table.add_row(family, escape(launch))
    except (ImportError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    return table


@app.command()
def check(
    device: DeviceOption = None,
    dtype: Annotated[
        Optional[list[DType]],  # noqa: UP045
        typer.Option(help="May be given several times; all by default. Not with --problem."),
    ] = None,
    fuzz: Annotated[Optional[int], typer.Option(min=1, help="In place of that: so many random problems.")] = None,  # noqa: UP045
    seed: Annotated[Optional[int], typer.Option(help="Of the random problems, with --fuzz; 0 by default.")] = None,  # noqa: UP045
    jobs: Annotated[Optional[int], typer.Option(min=1, help="Processes, with --fuzz.")] = None,  # noqa: UP045
    problem: Annotated[Optional[str], typer.Option(help="In place of that: one problem, as --fuzz prints it.")] = None,  # noqa: UP045
) -> None:
    """Gradcheck and agreement with float64 of every available backend; exit code 1 if anything fails."""
    from . import check as checks

    if fuzz is not None and problem is not None:
        raise typer.BadParameter("--fuzz draws problems, --problem is one: got both")
    for name, value in (("--seed", seed), ("--jobs", jobs)):
        if value is not None and fuzz is None:
            raise typer.BadParameter(f"{name} is for --fuzz: got no --fuzz")
    if dtype and problem is not None:
        raise typer.BadParameter("--dtype: got --problem too, which says its dtype itself")
    dtypes = [d.value for d in dtype or DType]
    if pick_device(device).type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"device {device!r}: wanted cpu or cuda")
    if fuzz is not None or problem is not None:
        failed = fuzz_check(pick_device(device), dtypes, fuzz, seed or 0, jobs, problem)
        raise typer.Exit(1 if failed else 0)
    with console.status("checking") as status:
        results = []
        for r in checks.run(pick_device(device), tuple(getattr(torch, name) for name in dtypes)):
            status.update(f"checking {r.backend}, {r.dtype}: {r.check}")
            results.append(r)
    table = Table(
        "backend", "dtype", "problems", "worst error", "its limit", "", title=f"largest error over {checks.COVERS}"
    )
    for group in dict.fromkeys((r.backend, r.dtype, r.error is None) for r in results):
        same = [r for r in results if (r.backend, r.dtype, r.error is None) == group]
        worst = max(same, key=lambda r: 0 if r.error is None else r.error / r.limit)
        bad, skipped = (sum(r.passed is verdict for r in same) for verdict in (False, None))
        verdict = f"[red]{bad} FAILED[/red]" if bad else "[yellow]not run[/yellow]" if skipped else "[green]ok[/green]"
        numbers = ["", ""] if worst.error is None else [f"{worst.error:.1e}", f"{worst.limit:.1e}"]
        what = str(len(same)) if worst.error is not None else ", ".join(dict.fromkeys(r.check for r in same))
        table.add_row(worst.backend, worst.dtype, what, *numbers, f"{verdict} {escape(worst.note)}".strip())
    console.print(table)
    for r in results:
        if r.passed is False:
            numbers = "" if r.error is None else f": error {r.error:.1e}, limit {r.limit:.1e}"
            console.print(f"[red]failed[/red]: {r.backend}, {r.dtype}, {escape(f'{r.check}{numbers} {r.note}')}")
    failed = sum(r.passed is False for r in results)
    console.print(
        f"{sum(r.passed is True for r in results)} passed, {failed} failed, "
        f"{sum(r.passed is None for r in results)} not run"
    )
    raise typer.Exit(1 if failed else 0)


def fuzz_check(
    device: torch.device, dtypes: list[str], problems: int | None, seed: int, jobs: int | None, problem: str | None
) -> int:
    """``check --fuzz`` and ``check --problem``; returns how many problems failed."""
    from . import dispatch, fuzz

    start = time.perf_counter()
    try:
        if problem is not None:
            failure = fuzz.examine(fuzz.Problem.from_json(problem), device)
            count, failures = fuzz.Count(1, 1), [] if failure is None else [failure]
        else:
            with console.status("drawing") as status:
                latest = start

                def report(count: fuzz.Count) -> None:
                    nonlocal latest
                    now = time.perf_counter()
                    done = f"{count.problems} of {several(problems, 'problem')}"
                    line = f"{done}, {count.failed} failed, {now - start:.0f} s"
                    status.update(line)
                    if not console.is_terminal and now - latest > PROGRESS_SECONDS:
                        console.print(line)
                        latest = now

                count, failures = fuzz.run(
                    problems, seed, device, fuzz.served_backends(), dtypes, jobs or fuzz.default_jobs(device), report
                )
    except (ValueError, dispatch.Refusal) as error:
        raise typer.BadParameter(str(error)) from error
    for failure in failures:
        console.print(f"[red]{failure.kind}[/red]: {escape(failure.message)}")
        console.print(failure.command(device), soft_wrap=True, markup=False, highlight=False)
    seconds = time.perf_counter() - start
    backends = ", ".join(fuzz.served_backends())
    console.print(
        f"{several(count.problems, 'problem')}, {several(count.compared, 'run')} of {backends}, {count.refused} "
        f"refused, {len(failures)} failed; {seconds:.0f} s, {count.problems / seconds:.1f} problems a second"
    )
    if not count.compared:
        raise typer.BadParameter("nothing was compared: every problem was refused")
    return len(failures)


@app.command()
def bench(
    workloads: Annotated[
        list[str] | None, typer.Argument(help="Names; see --list. Default: those for the device.")
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[
        Optional[list[Precision]],  # noqa: UP045
        typer.Option(help="May be given several times. Default: float32, on a GPU tf32, and bfloat16."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="For each workload, dtype and pass, all layers together.")] = 10.0,
    output: Annotated[Path, typer.Option(help="Folder for JSON, Markdown and PNG.")] = Path("bench-results"),
    with_compile: Annotated[
        bool, typer.Option("--compile", help="Also a peer under torch.compile; takes minutes to compile.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Write to bench/reports, for committing.")] = False,
    with_sweeps: Annotated[bool, typer.Option("--sweeps", help="Also time against T, B, F and image size.")] = False,
    list_workloads: Annotated[bool, typer.Option("--list", help="Only list the workloads.")] = False,
) -> None:
    """Throughput of every available backend against what people write today; checked first, timed by turns."""
    from .bench import measure, sweeps
    from .bench import report as reports
    from .bench.workloads import WORKLOADS

    if list_workloads:
        rows = [
            (w.name, str(w.shape), str(w.kernels), f"{w.forward_flops / 1e9:.3g}", w.stands_for)
            for w in WORKLOADS.values()
        ]
        show(("workload", "B, T, C, H, W", "kernels", "forward, GFLOP", "stands for"), rows)
        return
    if not 0 < seconds < math.inf:
        raise typer.BadParameter(f"--seconds: got {seconds:g}, wanted a positive number")
    target = pick_device(device)
    if not workloads:
        workloads = [name for name in WORKLOADS if name.startswith("cpu_") == (target.type == "cpu")]
    if unknown := [name for name in workloads if name not in WORKLOADS]:
        raise typer.BadParameter(f"no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    precisions = [PRECISIONS[name] for name in ([d.value for d in dtype] if dtype else defaults(target))]
    if target.type != "cuda" and any(p.tf32 for p in precisions):
        raise typer.BadParameter("tf32 is a precision of GPUs")
    with console.status("") as status:
        results = measure.run(workloads, target, precisions, seconds, with_compile, status.update)
        if with_sweeps:
            results["sweeps"] = sweeps.run(target, precisions[-1], seconds / 10, status.update)
    show(reports.COLUMNS, reports.rows(results))
    folder = Path(measure.__file__).resolve().parent / "reports" if report else output
    try:
        paths = reports.write(results, folder)
    except ImportError as error:  # the numbers are written by then, the picture is not
        console.print(f"[red]{escape(str(error))}[/red] (JSON and Markdown are in {folder})")
        raise typer.Exit(2) from None
    for path in paths:
        console.print(f"wrote {path}")


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, or its rows in Markdown where the terminal is too narrow for it or there is none: nothing is cut."""
    from .bench.report import line

    table = Table(*columns)
    for row in rows:
        table.add_row(*map(escape, row))
    if (
        console.is_terminal
        and console.measure(table, options=console.options.update(max_width=1000)).maximum <= console.width
    ):
        console.print(table)
        return
    for row in (columns, ["---"] * len(columns), *rows):
        console.print(line(row), soft_wrap=True, markup=False, highlight=False)


@app.command()
def forecast(
    output: Annotated[Path, typer.Option(help="Folder for pictures, metrics and checkpoint.")] = Path("demo"),
    minutes: Annotated[Optional[float], typer.Option(help="Training time, 1.4 by default; not with --steps.")] = None,  # noqa: UP045
    steps: Annotated[Optional[int], typer.Option(help="Training steps, for a run that repeats exactly.")] = None,  # noqa: UP045
    mnist: Annotated[
        Path | None, typer.Option(help="Folder with MNIST's IDX files, in place of scikit-learn's digits.")
    ] = None,
    speed: Annotated[
        list[float] | None,
        typer.Option(help="Mean speed of a digit in pixels per frame, once for each digit; one digit at 2 by default."),
    ] = None,
    channels: Annotated[Optional[int], typer.Option(help="Hidden channels of each kernel size, 16 by default.")] = None,  # noqa: UP045
    kernel: Annotated[Optional[list[int]], typer.Option(help="Kernel size, once for each; 3 and 5 by default.")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="Of the weights and of the sequences.")] = 0,
    backend: Annotated[str, typer.Option(help="auto, or a name that `mkconvlstm info` lists.")] = "auto",
    device: DeviceOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the checkpoint in the output folder.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew though there is a checkpoint.")] = False,
) -> None:
    """Trains a forecaster on moving handwritten digits, and shows truth and prediction side by side."""
    from . import forecast as forecasting
    from .runs import how_to_resume

    settings: dict = {"seed": seed}
    if speed:
        settings["speeds"] = tuple(speed)
    if kernel and len(set(kernel)) < len(kernel):
        raise typer.BadParameter(f"--kernel: got {', '.join(map(str, kernel))}, wanted each size once")
    if kernel or channels is not None:
        settings["kernels"] = dict.fromkeys(kernel or [3, 5], 16 if channels is None else channels)
    try:
        metrics = forecasting.run(
            output,
            minutes=minutes,
            steps=steps,
            mnist=mnist,
            backend=backend,
            device=pick_device(device),
            resume=resume,
            overwrite=overwrite,
            console=console,
            **settings,
        )
    except KeyboardInterrupt:
        console.print(f"stopped; continue with {how_to_resume(overwrite)} ({escape(str(output))})")
        raise typer.Exit(130) from None
    except (ValueError, TypeError, OSError, ImportError) as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(2) from None
    console.print(summary(metrics))
    console.print(
        f"look at {output / 'forecast.png'} and {output / 'forecast.gif'}; numbers in {output / 'metrics.json'}"
    )


def several(count: int, what: str) -> str:
    """The count of what is told, in the singular or the plural."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def summary(metrics: dict) -> Table:
    """The numbers of a forecast against those of copying the last frame."""
    scores, training = metrics["evaluation"], metrics["training"]
    clips, steps = several(scores["clips"], "unseen sequence"), several(training["steps"], "step")
    title = f"{clips}; {steps} in {training['seconds']:.0f} s"
    table = Table("", "prediction", "copying the last frame", title=title)
    shown = {
        "mse": "mean squared error",
        "cross_entropy": "cross-entropy, nats per sequence",
        "csi": "critical success index",
    }
    for key, words in shown.items():
        table.add_row(words, *(f"{scores[who][key]:.4g}" for who in ("prediction", "last_frame")))
    table.add_row("error over that of copying", f"{scores['mse_ratio']:.1%}", "100%")
    return table


if __name__ == "__main__":
    app()
