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
            help="A Hugging Face folder, an id (org/name or org/name@revision), a .gguf, or a .dat.", show_default=False
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


def export(
    file: Annotated[Path, typer.Argument(help="A .dat file.", show_default=False)],
    to: Annotated[str, typer.Option(help="hf (a folder for transformers) or gguf (a file for llama.cpp).")],
    out: Annotated[Path, typer.Option(help="The folder or file to make; it must not exist.")],
    layout: Annotated[
        str, typer.Option(help="Of hf: bfloat16, or nvfp4 (compressed-tensors; keeps the 4-bit weights).")
    ] = "bfloat16",
    model_folder: FolderOption = None,
) -> None:
    """Write a .dat as a Hugging Face folder or a GGUF file; decoded NVFP4 weights stay exact in both.

    Example: align dat export artifacts/demo.dat --to hf --out exported
    """
    from alignment.manifest import model_folder_of
    from trainer.export_gguf import write_gguf
    from trainer.export_hf import write_hf
    from trainer.transfer import TransferError

    if to not in ("hf", "gguf"):
        raise TransferError(f"--to {to}: choose hf or gguf")
    if layout not in ("bfloat16", "nvfp4"):
        raise TransferError(f"--layout {layout}: choose bfloat16 or nvfp4")
    if to == "gguf" and layout != "bfloat16":
        raise TransferError(f"--layout {layout} is for --to hf; a GGUF file holds the decoded weights")
    folder = model_folder_of(file, model_folder)
    if to == "gguf":
        write_gguf(file, folder, out)
    else:
        rounded = write_hf(file, folder, out, layout=layout)  # type: ignore[arg-type]
        if rounded:
            typer.echo(
                f"rounded to bfloat16: {len(rounded)} tensors that were not NVFP4 (first {harmless(rounded[0])})"
            )
    typer.echo(harmless(str(out)))
