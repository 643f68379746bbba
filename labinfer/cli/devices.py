"""``labinfer devices``: what this machine can run plans on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from labinfer.cli.options import json_option
from labinfer.cli.output import current
from labinfer.units import human_bytes

if TYPE_CHECKING:
    from labinfer.runtime.grants import Grant


@click.command()
@json_option
def devices(as_json: bool) -> None:
    """List the devices of this machine.

    Their names are what --devices takes. A backend whose package is missing is listed with the command that installs
    it. Below stands what models that are loaded now, in any process, were granted.
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
    granted = [
        [each.device, human_bytes(each.nbytes), compute_of(each), each.owner, str(each.pid)]
        for report in found
        for each in report.granted
    ]
    if granted:
        out.table(["GRANTED", "MEMORY", "COMPUTE", "TO", "PROCESS"], granted, right=["MEMORY", "PROCESS"])


def compute_of(grant: Grant) -> str:
    """The cores, or how many processors of its own, that a device was granted."""
    if grant.processors:
        return f"{grant.processors} processors"
    return f"cores {','.join(map(str, grant.cores))}" if grant.cores else "all"
