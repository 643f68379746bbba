"""``labinfer pull``, ``ls`` and ``rm``: models by name."""

from __future__ import annotations

from pathlib import Path

import click

from labinfer import catalogue
from labinfer.cli.output import current
from labinfer.units import human_bytes


@click.command()
@click.argument("name", default=catalogue.DEFAULT_MODEL)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull(name: str, as_json: bool) -> None:
    """Download a model by name.

    NAME is a model of the catalogue (see `labinfer ls`; default: smollm2-135m), or hf:ORG/REPO[@REVISION][/FILE].
    A model that is already there is checked against its SHA-256 and fetched again if it does not match. Prints
    the path of the model.
    """
    out = current()
    with out.progress() as progress:
        path = catalogue.pull(name, progress)
    if as_json:
        out.json({"name": name, "path": str(path), "bytes": catalogue.bytes_on_disk(path)})
    else:
        out.data(str(path))


def _format(path: Path | None, entry: catalogue.Entry) -> str:
    """``gguf`` or ``safetensors``, by what is there or will be."""
    name = path.name if path and path.is_file() else entry.file_name
    return "gguf" if name and name.endswith(".gguf") else "safetensors"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def ls(as_json: bool) -> None:
    """List the models known by name.

    Pulled models come first, with their path. Add your own to catalogue.yaml in $LABINFER_HOME (or in
    ~/.config/labinfer).
    """
    out = current()
    rows = []
    for entry in catalogue.listing():
        path = entry.pulled()
        rows.append(
            {
                "name": entry.name,
                "pulled": path is not None,
                "size": catalogue.bytes_on_disk(path) if path else entry.size,
                "format": _format(path, entry),
                "license": entry.license,
                "description": entry.description,
                "path": str(path) if path else None,
            }
        )
    rows.sort(key=lambda row: not row["pulled"])
    if as_json:
        out.json(rows)
        return
    cells = [
        [
            str(row["name"]),
            human_bytes(row["size"]) if isinstance(row["size"], int) else "?",
            str(row["format"]),
            "yes" if row["pulled"] else "no",
            str(row["path"] or row["description"]),
        ]
        for row in rows
    ]
    out.table(["NAME", "SIZE", "FORMAT", "PULLED", "PATH OR DESCRIPTION"], cells, right=["SIZE"])


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def rm(names: tuple[str, ...], as_json: bool) -> None:
    """Remove pulled models from the cache."""
    out = current()
    freed = {name: catalogue.remove(name) for name in names}
    if as_json:
        out.json([{"name": name, "bytes_freed": count} for name, count in freed.items()])
    else:
        for name, count in freed.items():
            out.note(f"removed {name}, {human_bytes(count)} freed")
