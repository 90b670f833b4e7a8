"""``align dat import`` and ``align dat export``: weights from and to other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignment.show import harmless

FolderOption = Annotated[
    Path | None,
    typer.Option("--model-folder", help="Where a .dat's config.json and tokenizer are, when not found by themselves."),
]


def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face folder or id (org/name[@revision]), a .gguf, or a .dat.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The model folder to make; it must not exist.")],
    rule: Annotated[str, typer.Option(help="How block scales are chosen: mse or amax.")] = "mse",
    model_folder: FolderOption = None,
) -> None:
    """Make a model folder of a checkpoint: its configuration, its tokenizer, and its weights as NVFP4.

    Example: align dat import Qwen/Qwen3-0.6B --out models/qwen3
    """
    from trainer.importer import import_model
    from trainer.transfer import TransferError

    if rule not in ("mse", "amax"):
        raise TransferError(f"--rule {rule}: choose mse or amax")

    def say(line: str) -> None:
        typer.echo(harmless(line))

    folder = import_model(source, out, rule=rule, model_folder=model_folder, say=say)  # type: ignore[arg-type]
    say(f"{folder / 'base.dat'}")
