"""The arena planner on packing problems: ``python benchmarks/packing.py FILE.csv ... [--effort S] [--json FILE]``.

A number between dots in a file name (as in ``A.1048576.csv``) is taken as its capacity.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from labinfer.compiler.packing import pack, read_problem, verify


def measure(path: Path, effort: float) -> dict[str, object]:
    buffers = read_problem(path)
    named = re.search(r"\.(\d+)\.csv$", path.name)
    capacity = int(named[1]) if named else None
    packing = pack(buffers, capacity=capacity, effort_seconds=effort)
    verify(buffers, packing.offsets, packing.peak)
    return {
        "file": path.name,
        "n": len(buffers),
        "lower_bound": packing.lower_bound,
        "peak": packing.peak,
        "ratio": round(packing.peak / max(packing.lower_bound, 1), 4),
        "fits": None if capacity is None else packing.peak <= capacity,
        "seconds": round(packing.seconds, 3),
        "algorithm": packing.algorithm,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the arena planner on packing problems.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--effort", type=float, default=8.0, help="seconds a problem")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    results = []
    print(f"{'file':24} {'n':>6} {'lower bound':>14} {'peak':>14} {'ratio':>7} {'fits':>5} {'seconds':>8}  algorithm")
    for path in arguments.files:
        row = measure(path, arguments.effort)
        results.append(row)
        print(
            f"{row['file']:24} {row['n']:>6} {row['lower_bound']:>14} {row['peak']:>14} {row['ratio']:>7.4f}"
            f" {row['fits']!s:>5} {row['seconds']:>8.3f}  {row['algorithm']}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
