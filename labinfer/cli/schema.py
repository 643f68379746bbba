"""``labinfer schema``: the map language and cluster files for editors."""

from __future__ import annotations

import json
from typing import Any

import click

from labinfer.cli.options import json_option
from labinfer.cli.output import current


@click.command()
@click.argument("language", type=click.Choice(["map", "cluster"]), default="map")
@click.option("--out", metavar="FILE", help="Write it to a file instead of stdout.")
@json_option
def schema(language: str, out: str | None, as_json: bool) -> None:
    """Print the JSON Schema of maps or of cluster files.

    Editors with a YAML language server complete and check files by it. Begin a map with this line:

    \b
    # yaml-language-server: $schema=labmap.schema.json
    """
    from labinfer.files import atomic_write

    found = _schema(language)
    if out is None:
        current().json(found)
        return
    with atomic_write(out) as stream:
        stream.write(json.dumps(found, indent=2, ensure_ascii=False).encode() + b"\n")
    if as_json:
        current().json({"schema": out})
    else:
        current().note(f"wrote {out}")


def _schema(language: str) -> dict[str, Any]:
    if language == "cluster":
        from labinfer.compiler.cluster import cluster_schema

        return cluster_schema()
    from labinfer.compiler.map_schema import map_schema

    return map_schema()
