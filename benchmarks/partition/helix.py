"""Placements for a network of nodes and links: ``python benchmarks/partition/helix.py FILE [INSTANCE]``, JSON out.

FILE has the format of the instances published with Helix (ASPLOS 2025); see docs/partition.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from labinfer.compiler.partition.network import read_network
from labinfer.compiler.partition.paths import best_paths
from labinfer.errors import LabinferError


def main() -> int:
    parser = argparse.ArgumentParser(description="Place layers on the nodes of a network for most tokens/s.")
    parser.add_argument("file", type=Path)
    parser.add_argument("instance", nargs="?", help="the first of the file if not given")
    parser.add_argument("--effort", type=float, default=0.9, help="seconds to search where the bound is not met")
    parser.add_argument("--placement", action="store_true", help="print the placement and its flows as well")
    arguments = parser.parse_args()
    try:
        name, network = read_network(arguments.file, arguments.instance)
        plan = best_paths(network, effort_seconds=arguments.effort)
    except LabinferError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    row = {
        "instance": name,
        "objective": plan.value,
        "bound": plan.upper_bound,
        "gap": plan.gap,
        "seconds": round(plan.seconds, 4),
    }
    if arguments.placement:
        row |= {"placement": plan.placement, "flows": plan.flows}
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
