"""``labinfer schema``: the map language for editors."""

from __future__ import annotations

import json

import click

from labinfer.cli.options import json_option
from labinfer.cli.output import current


@click.command()
@click.option("--out", metavar="FILE", help="Write it to a file instead of stdout.")
@json_option
def schema(out: str | None, as_json: bool) -> None:
    """Print the JSON Schema of the map language.

    Editors with a YAML language server complete and check maps by it. Begin a map with this line:

    \b
    # yaml-language-server: $schema=labmap.schema.json
    """
    from labinfer.compiler.map_schema import map_schema
    from labinfer.files import atomic_write

    found = map_schema()
    if out is None:
        current().json(found)
        return
    with atomic_write(out) as stream:
        stream.write(json.dumps(found, indent=2, ensure_ascii=False).encode() + b"\n")
    if as_json:
        current().json({"schema": out})
    else:
        current().note(f"wrote {out}")
