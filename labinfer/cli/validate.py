"""``labinfer validate``: a map against a config and a checkpoint."""

from __future__ import annotations

import click

from labinfer.cli.options import json_option
from labinfer.cli.output import current


@click.command()
@click.argument("model")
@click.option("--config", metavar="FILE", help="A config.json to check the map against.")
@click.option("--weights", metavar="PATH", help="Weights whose tensor names and shapes to check; they are not loaded.")
@json_option
def validate(model: str, config: str | None, weights: str | None, as_json: bool) -> None:
    """Check a map against a config and a checkpoint.

    MODEL is whatever `labinfer compile` takes. All errors are shown at once; tensors that are missing, unused or of
    another shape are errors too. A map alone is checked against its example model.
    """
    from labinfer.api import validate as check

    out = current()
    with out.progress() as progress:
        found = check(model, weights=weights, config=config, progress=progress)
    if as_json:
        out.json({"ok": True, **found})
    else:
        out.data(f"{found['map']}: ok, {found['weights']:,} weights, {found['parameters']:,} parameters")
