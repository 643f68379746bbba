"""``labinfer diff``: what differs between two plans."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from labinfer.cli.options import json_option
from labinfer.cli.output import current

LONGEST = 60
"""Characters of a value in the table."""


@click.command()
@click.argument("before")
@click.argument("after")
@json_option
def diff(before: str, after: str, as_json: bool) -> None:
    """Tell what differs between two plans.

    Sources, limits, devices, who runs what, bytes, predictions, calls by kind; not where things lie within an arena.
    """
    from labinfer.compiler.plan import load_plan
    from labinfer.render.diff import differences

    out = current()
    found = differences(load_plan(before), load_plan(after))
    if as_json:
        out.json([asdict(each) for each in found])
        return
    if not found:
        out.note("the plans do the same")
        return
    out.table(["WHAT", before, after], [[each.what, _text(each.before), _text(each.after)] for each in found])


def _text(value: Any) -> str:
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
