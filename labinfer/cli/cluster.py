"""``labinfer cluster``: the agents of a cluster's hosts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from labinfer.cli.options import json_option
from labinfer.cli.output import current
from labinfer.errors import LabinferError
from labinfer.units import human_bytes

COLUMNS = ["HOST", "ADDRESS", "ANSWERS", "FREE", "DEVICES", "STAGES"]


@click.command()
@click.argument("action", type=click.Choice(["up", "status", "down"]))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--token-file", type=click.Path(path_type=Path), help="The cluster's token (default: a kept one).")
@click.option("--watch", is_flag=True, help="With status: show it again each second.")
@json_option
def cluster(action: str, file: Path, token_file: Path | None, watch: bool, as_json: bool) -> None:
    """Start, show or end the agents of a cluster's hosts.

    FILE is a cluster file with hosts. Agents start on this machine, or over ssh where the file says how. The token
    that heads and agents show each other is made with the first start. `status` ends with 1 if a host does not answer.

    \b
    labinfer cluster up cluster.yaml
    labinfer cluster status cluster.yaml --watch
    labinfer serve model.gguf --cluster cluster.yaml
    labinfer cluster down cluster.yaml
    """
    from labinfer.cluster import agents

    found, out = agents.hosts_of(file), current()
    if action != "status":
        done = (agents.up if action == "up" else agents.down)(found, token_file)
        if as_json:
            out.json(done)
            return
        for name, what in done.items():
            out.data(f"{name} ({found.hosts[name].address}): {what}")
        return
    while True:
        reports = agents.status(found, token_file)
        if as_json:
            out.json(reports)
        else:
            if watch:
                click.clear()
            rows = [[name, found.hosts[name].address, *_cells(report)] for name, report in reports.items()]
            out.table(COLUMNS, rows, right=["ANSWERS", "FREE"])
        if not watch:
            break
        time.sleep(1)
    missing = [name for name, report in reports.items() if report is None]
    if missing and not as_json:
        message = f"no answer from {', '.join(missing)}"
        raise LabinferError("cluster.no-answer", message, remedy=f"labinfer cluster up {file}")


def _cells(report: dict[str, Any] | None) -> list[str]:
    """The rest of a host's row."""
    if report is None:
        return ["no", "", "", ""]
    devices = [each["name"] for each in report["devices"]]
    free = max((each["memory_free"] for each in report["devices"]), default=0)
    stages = [f"{each['stage']} {each['state']}" for each in report["stages"]]
    answers = f"{1e3 * report['round_trip_seconds']:.1f} ms"
    return [answers, human_bytes(free), ", ".join(devices), "; ".join(stages) or "none"]
