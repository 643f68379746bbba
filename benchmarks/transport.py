"""What a hop between two stages costs: a frame of 16 KB to another thread or process and back, halved.

    python benchmarks/transport.py [--json FILE]

Bars: 60 microseconds over tcp and over sealed tcp (loopback), 25 over shm. The ceiling beside them is a pipe of the
operating system with one byte in it: two system calls and a wake-up, with no frame and nothing copied.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median

from labinfer.profile.hops import hop_seconds
from labinfer.runtime.pipeline.transport import TRANSPORTS

BARS = {"tcp": 60.0, "shm": 25.0, "sealed": 60.0}
SIZE = 16 << 10


def pipe(rounds: int) -> list[float]:
    """Microseconds of a byte through a pipe to another process."""
    (their_in, out), (back, their_out) = os.pipe(), os.pipe()
    code = f"import os\nfor _ in range({rounds}): os.write({their_out}, os.read({their_in}, 1))"
    times = []
    with subprocess.Popen([sys.executable, "-c", code], pass_fds=[their_in, their_out]):
        for _ in range(rounds):
            started = time.perf_counter()
            os.write(out, b"\0")
            os.read(back, 1)
            times.append((time.perf_counter() - started) * 5e5)
    for descriptor in (their_in, out, back, their_out):
        os.close(descriptor)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4000)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    found = {"pipe": median(pipe(options.rounds))}
    print(f"ceiling  {found['pipe']:6.1f} µs  a byte through a pipe")
    for transport in (*TRANSPORTS, "sealed"):
        times = sorted(1e6 * seconds for seconds in hop_seconds(transport, SIZE, options.rounds))
        found[transport] = median(times)
        bar = f"  bar {BARS[transport]:.0f} µs" if transport in BARS else ""
        print(f"{transport:8} {found[transport]:6.1f} µs  (90 %: {times[len(times) * 9 // 10]:.1f}){bar}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"bytes": SIZE, "microseconds": found, "bars": BARS}, file, indent=1)
    sys.exit(any(found[transport] > bar for transport, bar in BARS.items()))


if __name__ == "__main__":
    main()
