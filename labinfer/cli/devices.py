"""``labinfer devices``: what this machine can run plans on."""

from __future__ import annotations

import click

from labinfer.cli.options import json_option
from labinfer.cli.output import current
from labinfer.units import human_bytes


@click.command()
@json_option
def devices(as_json: bool) -> None:
    """List the devices of this machine.

    Their names are what --devices takes. A backend whose package is missing is listed with the command that installs
    it.
    """
    from labinfer.runtime.devices import list_devices

    out = current()
    found = list_devices()
    if as_json:
        out.json([each.to_json() for each in found])
        return
    rows = [
        [each.name, "yes", human_bytes(each.memory_free), human_bytes(each.memory_total), f"{each.compute_share:.0%}",
         each.description]
        if each.available
        else [each.name, "no", "", "", "", f"{each.description}: {each.remedy}" if each.remedy else each.description]
        for each in found
    ]  # fmt: skip
    out.table(["DEVICE", "READY", "FREE", "MEMORY", "COMPUTE", "WHAT IT IS"], rows, right=["FREE", "MEMORY", "COMPUTE"])
