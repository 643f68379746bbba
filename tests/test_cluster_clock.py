"""Clocks of hosts: how far apart they are is known from beats, and the spans of all stages are by one of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labinfer.cluster.clock import SAMPLES, PeerClock
from labinfer.cluster.fleet import ClusterFleet, load

from .hosts import Hosts
from .service import Served, wait_for
from .test_cluster import FOLDER, LIMITS, PROMPTS

AHEAD = 5000.0
DELAYS = st.floats(1e-5, 0.2)
OTHER_CLOCK = ["unshare", "--time", "--monotonic", str(int(AHEAD))]


@given(ahead=st.floats(-1e6, 1e6), delays=st.lists(st.tuples(DELAYS, DELAYS), min_size=1, max_size=20))
def test_clocks_are_as_far_apart_as_the_quickest_beats_leave_open(
    ahead: float, delays: list[tuple[float, float]]
) -> None:
    ours, theirs, now = PeerClock(), PeerClock(), 1000.0
    for there, back in delays:
        theirs.hear(ours.stamp(now), now + there + ahead)
        now += there + 0.1
        ours.hear(theirs.stamp(now + ahead), now + back)
        now += back + 0.1
    way = min(there + back for there, back in delays)
    assert abs(ours.offset - ahead) <= way / 2 + 1e-6


def test_old_beats_do_not_count() -> None:
    clock = PeerClock()
    for number in range(SAMPLES + 1):
        way = 0.001 if number == 0 else 0.5
        clock.hear({"sent": number + 7.0 * (number > 0), "heard": number - way, "held": 0.0}, number)
    assert clock.offset == pytest.approx(7.25)


@pytest.mark.parametrize("message", [{}, {"sent": "1"}, {"sent": 1e999}, {"sent": 1, "heard": None, "held": []}])
def test_beats_without_times_say_nothing(message: dict[str, Any]) -> None:
    clock = PeerClock()
    clock.hear(message, 1.0)
    assert clock.offset == 0.0


def can_shift_clocks() -> bool:
    """Whether processes can be started here whose clocks are ahead."""
    if shutil.which("unshare") is None:
        return False
    command = [*OTHER_CLOCK, sys.executable, "-c", "import time; print(time.monotonic())"]
    told = subprocess.run(command, capture_output=True, check=False)
    return told.returncode == 0 and float(told.stdout) > time.monotonic() + AHEAD / 2


@pytest.mark.skipif(not can_shift_clocks(), reason="needs time namespaces, and root")
def test_one_trace_has_the_stages_of_all_hosts_by_one_clock(home: Path, tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, ["alpha"])
    hosts.start("beta", OTHER_CLOCK)
    try:
        with load(FOLDER, hosts.file, **LIMITS) as model, closing(Served(model)) as api:
            body = {"prompt": PROMPTS[0], "max_tokens": 8, "ignore_eos": True}
            assert isinstance(model.fleet, ClusterFleet)
            found = [model.fleet.hosts[name] for name in ("alpha", "beta")]
            wait_for(lambda: all(host.round_trip for host in found))
            unsure = sum(host.round_trip or 0.0 for host in found) / 2  # the quickest beats leave so much open
            assert api.http.post("/v1/completions", json=body).status_code == 200
            events = api.http.get("/labinfer/v1/trace", params={"format": "perfetto"}).json()["traceEvents"]
            assert api.http.get("/labinfer/v1/trace", params={"format": "x"}).status_code == 400
    finally:
        hosts.close()
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["stage 0 (reference@alpha)", "stage 1 (reference@beta)"]
    steps = [event for event in events if event["ph"] == "X"]
    first, second = ([event["ts"] for event in steps if event["tid"] == stage] for stage in range(2))
    assert len(first) == len(second) >= 8
    in_order = [time for both in zip(first, second, strict=True) for time in both]
    assert all(after >= before - 1e6 * unsure for before, after in pairwise(in_order)), json.dumps(in_order)
