"""The command ``mkconvlstm experiment``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer()
console = Console()


@app.command()
def experiment(
    name: Annotated[Optional[str], typer.Argument(help="Which; see --list.")] = None,  # noqa: UP045
    list_names: Annotated[bool, typer.Option("--list", help="Only print the names, one a line.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small: about a minute on a CPU.")] = False,
    output: Annotated[Path, typer.Option("--out", help="Folder; results go to OUT/NAME.")] = Path("experiments"),
    resume: Annotated[bool, typer.Option("--resume", help="Keep the runs in the folder that are done.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw the runs in the folder away.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=JSON", help="A setting of its own, as results.json names it: steps=100."),
    ] = None,
    page: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FOLDER", help="Only write FOLDER.md, beside FOLDER: a page of all results in it."),
    ] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")] = None,  # noqa: UP045
) -> None:
    """One of the paper's experiments: several seeds, intervals, and what has become of the paper's claims.

    Started by torchrun, the processes share out the runs.
    """
    from . import experiments
    from .cli import pick_device
    from .experiments.page import ends, text
    from .runs import how_to_resume

    if list_names:
        typer.echo("\n".join(experiments.EXPERIMENTS))
        return
    if page is not None:
        if not page.is_dir():
            raise typer.BadParameter(f"--page: there is no folder {page}")
        folder = page.resolve()
        target = folder.with_name(folder.name + ".md")
        try:
            target.write_text(text(folder, experiments.EXPERIMENTS.values()))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        console.print(f"wrote {escape(str(target))}", soft_wrap=True)
        return
    if name not in experiments.EXPERIMENTS:
        raise typer.BadParameter(f"NAME: got {name or 'none'}, wanted one of {', '.join(experiments.EXPERIMENTS)}")
    chosen = experiments.EXPERIMENTS[name]
    own = dict(parse_setting(each, chosen.full) for each in settings or ())
    try:
        results = experiments.run(
            chosen,
            output,
            quick=quick,
            resume=resume,
            overwrite=overwrite,
            settings=own,
            device=None if device is None else pick_device(device),
            console=console,
        )
    except KeyboardInterrupt:
        console.print(
            f"stopped; continue with {how_to_resume(overwrite)}: what is done is in {escape(str(output / name))}"
        )
        raise typer.Exit(130) from None
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(2) from None
    if results is None:  # another process tells
        return
    table = Table("the paper", "measured", "mean", "95% interval", "", title=f"{name}: {results['question']}")
    for claim in results["claims"]:
        found = claim["interval"]
        told = f"{claim['words']} ({claim['where']})", claim["measured"]
        table.add_row(*map(escape, told), f"{found['mean']:.4g}", ends(found), claim["verdict"])
    console.print(table)
    console.print(f"wrote {output / name / 'results.json'} and {', '.join(results['figures'])} beside it")


def parse_setting(text: str, known: Mapping) -> tuple[str, object]:
    """(key, value) of "KEY=JSON". Raises typer.BadParameter if it is anything else, or no key of ``known``."""
    key, _, value = text.partition("=")
    if key not in known:
        raise typer.BadParameter(f"--set {text!r}: no setting {key!r}; there are {', '.join(known)}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"--set {text!r}: {value!r} is not JSON ({error})") from error
