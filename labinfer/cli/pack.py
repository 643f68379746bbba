"""``labinfer pack``: pack the buffers of a CSV file into one arena."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from labinfer.compiler.packing import Packing
    from labinfer.errors import DoesNotFit


@click.command()
@click.argument("problem", type=click.Path(dir_okay=False))
@click.option("--capacity", type=click.IntRange(min=0), help="Bytes of the arena to fit in.")
@click.option("--json", "as_json", is_flag=True, help="Print the packing as JSON.")
@click.option(
    "--effort",
    type=click.FloatRange(min=0),
    default=8.0,
    show_default=True,
    help="Seconds to search before giving up; less is used when the lower bound or the capacity is reached.",
)
def pack(problem: str, capacity: int | None, as_json: bool, effort: float) -> None:
    """Pack buffers with known lifetimes into one arena.

    PROBLEM is a CSV file with the columns id, lower, upper and size: a buffer of SIZE bytes is alive in the half-open
    interval [lower, upper). The arena is made as small as can be. Exits with 4 when --capacity is given and
    not reached; the best packing found is then still printed with --json (its peak is above the capacity), and the
    error goes to standard error. Exits with 3 when the file is not valid.
    """
    from labinfer.compiler.packing import pack as pack_buffers
    from labinfer.compiler.packing import read_problem

    buffers = read_problem(problem)
    packing = pack_buffers(buffers, capacity=capacity, effort_seconds=effort)
    if as_json:
        import dataclasses
        import json

        click.echo(json.dumps(dataclasses.asdict(packing), indent=2))
    if capacity is not None and packing.peak > capacity:
        error = _does_not_fit(packing, capacity)
        if not as_json:
            raise error
        click.echo(error, err=True)  # raised, it would become a second JSON document on standard output
        raise SystemExit(error.exit_code)
    if not as_json:
        _print_table(packing, len(buffers), capacity)


def _does_not_fit(packing: Packing, capacity: int) -> DoesNotFit:
    from labinfer.errors import DoesNotFit

    if packing.lower_bound > capacity:
        message = f"{packing.lower_bound} bytes are alive at one time, more than the capacity of {capacity}"
        return DoesNotFit("pack.does-not-fit", message, remedy=f"give a capacity of at least {packing.lower_bound}")
    if packing.optimal:
        message = f"no packing within {capacity} bytes exists; the smallest takes {packing.peak}"
        return DoesNotFit("pack.does-not-fit", message, remedy=f"give a capacity of at least {packing.peak}")
    message = f"no packing within {capacity} bytes found in {packing.seconds:.1f} s; the best takes {packing.peak}"
    return DoesNotFit("pack.not-found", message, remedy="one may exist: search longer with --effort")


def _print_table(packing: Packing, count: int, capacity: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    gap = packing.peak / packing.lower_bound - 1 if packing.lower_bound else 0.0
    rows = {
        "buffers": f"{count:,}",
        "peak": f"{packing.peak:,} bytes",
        "lower bound": f"{packing.lower_bound:,} bytes",
        "above the bound": f"{gap:.2%}",
        "optimal": "yes, proved" if packing.optimal else "not proved",
        "capacity": "none given" if capacity is None else f"{capacity:,} bytes, fits",
        "algorithm": packing.algorithm,
        "seconds": f"{packing.seconds:.3f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
