"""``align dat``: look into a `.dat` file, check it, compare two; `transfer_cli` adds import and export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from tabulate import tabulate

from alignment import transfer_cli
from alignment.show import harmless

app = typer.Typer(no_args_is_help=True, help="Look into a .dat file, check it, compare two, import and export.")
app.command("import")(transfer_cli.import_)
app.command("export")(transfer_cli.export)

File = Annotated[Path, typer.Argument(help="A .dat file.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="For a program: JSON instead of a table.")]


@app.command()
def inspect(file: File, as_json: JsonOption = False) -> None:
    """Show every tensor of a file: how it is stored, its shape, parameters, bytes and place; then what is odd.

    Example: align dat inspect artifacts/demo.dat
    """
    from trainer.dat import DatReader
    from trainer.dat_pairs import find_pairs, stored_as, tensors
    from trainer.files import sha256_file

    with DatReader(file) as reader:
        pairs, problems = find_pairs(reader.entries)
        rows: list[dict[str, Any]] = [
            {
                "tensor": name,
                "stored as": stored_as(tensor),
                "shape": list(tensor.shape),
                "parameters": math.prod(tensor.shape),
                "bytes": tensor.nbytes,
                "offset": tensor.offset,
            }
            for name, tensor in tensors(reader.entries, pairs).items()
        ]
        answer: dict[str, Any] = {
            "file": str(file),
            "sha256": sha256_file(file),
            "bytes": file.stat().st_size,
            "entries": len(reader.entries),
            "pairs": len(pairs),
            "parameters": sum(row["parameters"] for row in rows),
            "odd": [str(problem) for problem in problems],
            "tensors": rows,
        }
    if as_json:
        typer.echo(json.dumps(answer, ensure_ascii=False, indent=2))
        return
    shown = [{key: harmless(str(v)) if isinstance(v, str | list) else v for key, v in row.items()} for row in rows]
    typer.echo(tabulate(shown, headers="keys", intfmt=",", disable_numparse=[0, 1, 2]))
    typer.echo("")
    typer.echo(f"file        {harmless(str(file))}, {answer['bytes']:,} bytes")
    typer.echo(f"sha256      {answer['sha256']}")
    typer.echo(
        f"entries     {answer['entries']:,}, of which {2 * len(pairs):,} are halves of {len(pairs):,} NVFP4 weights"
    )
    typer.echo(f"parameters  {answer['parameters']:,}")
    for problem in answer["odd"]:
        typer.echo(f"odd         {harmless(problem)}")


@app.command()
def verify(file: File) -> None:
    """Check a file by every rule of the format and by the hash its manifest records: exit code 0, or 1 when one fails.

    Example: align dat verify artifacts/demo.dat
    """
    from alignment.manifest import path_of
    from trainer.dat import DatReader
    from trainer.dat_errors import DatError
    from trainer.dat_verify import value_problems
    from trainer.files import sha256_file

    manifest, recorded = path_of(file), None
    try:
        with DatReader(file) as reader:
            entries = len(reader.entries)
            problems = [str(error) for error in (*reader.pair_problems(), *value_problems(reader))]
        recorded = _recorded_hash(manifest)
        if recorded and (found := sha256_file(file)) != recorded:
            problems.append(
                f"its sha256 is {found}, {manifest.name} beside it records {recorded}: the file was changed"
            )
    except DatError as error:
        problems = [str(error)]
    for problem in problems:
        typer.echo(f"{harmless(str(file))}: {harmless(problem)}", err=True)
    if problems:
        raise typer.Exit(1)
    by_hash = "its hash is the recorded one" if recorded else "no manifest beside it says what its hash should be"
    typer.echo(f"{harmless(str(file))}: {entries:,} entries, every rule of the format holds; {by_hash}")


def _recorded_hash(manifest: Path) -> str | None:
    """The SHA-256 in an artifact's manifest or a base's record, if it can be read."""
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="The file before.")],
    second: Annotated[Path, typer.Argument(help="The file after.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two files group by group: codes and scales that changed, how far, and what did not change.

    Exit code 0 when no stored value differs, 1 when one does.

    Example: align dat diff models/smollm2-135m/base.dat artifacts/demo.dat
    """
    from trainer import dat_diff

    found = dat_diff.diff(first, second)
    if as_json:
        answer = {"groups": [g.to_json() for g in found.groups], "odd": found.odd, "changed": found.changed}
        typer.echo(json.dumps(answer, indent=2))
        raise typer.Exit(int(found.changed))
    changed = [group for group in found.groups if group.changed]
    if changed:
        table = [
            {
                "group": harmless(group.name),
                "tensors": group.tensors,
                "parameters": f"{group.parameters:,}",
                "codes changed": f"{group.codes_changed:,} ({group.codes_changed / max(1, group.parameters):.2%})",
                "scales changed": f"{group.scales_changed:,}",
                "relative change": f"{group.relative_change:.4f}",
            }
            for group in changed
        ]
        typer.echo(tabulate(table, headers="keys", disable_numparse=True, colalign=("left", *["right"] * 5)))
        typer.echo("")
    for group in found.groups:
        if not group.changed:
            typer.echo(f"{harmless(group.name)}: no stored value changed")
    for sentence in found.odd:
        typer.echo(harmless(sentence))
    if not found.changed:
        typer.echo("No stored value differs: the two files hold the same weights.")
    raise typer.Exit(int(found.changed))
