"""Hosts that measure their devices and the ways between them: what plans are made of, and what they say of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from labinfer.backends.base import fingerprint
from labinfer.cli.main import main
from labinfer.cluster import profiling
from labinfer.cluster.control import Control, open_control
from labinfer.cluster.fleet import load
from labinfer.cluster.profiling import profile_hosts, rounds
from labinfer.cluster.token import kept_token
from labinfer.compiler.cluster import read_cluster
from labinfer.compiler.costs.store import store_hosts, stored_hosts
from labinfer.compiler.costs.table import DeviceProfile, Fingerprint
from labinfer.compiler.target import Target
from labinfer.errors import LabinferError
from labinfer.placing import REMOTE_LINK, cluster_target, link_between, measured_there
from labinfer.profile.quiet import Patience
from labinfer.profile.session import profile_device
from labinfer.progress import silent
from labinfer.runtime.pipeline.transport import ChannelClosed, Credentials

from .hosts import Hosts
from .tiny import GOLDEN

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

FOLDER = GOLDEN / "llama-llama3"
LIMITS = {"max_num_batched_tokens": 16}


@pytest.fixture
def hosts(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    monkeypatch.setenv("LABINFER_PATIENCE", "0")
    hosts = Hosts(tmp_path, ["alpha", "beta"])
    yield hosts
    hosts.close()


def origins(hosts: Hosts) -> dict[str, str]:
    """How the numbers of a plan over the hosts are known."""
    with load(FOLDER, hosts.file, max_model_len=64, **LIMITS) as model:
        assert model.plan.placement is not None
        return model.plan.placement.origins


def test_hosts_measure_their_devices_and_links_and_plans_say_so(hosts: Hosts) -> None:
    seen = list[str]()
    found = profile_hosts(FOLDER, hosts.file, lambda phase, *_: seen.append(phase), quick=True, **LIMITS)
    assert set(found) == {"reference@alpha", "reference@beta"}
    assert set(seen) == {"measuring reference@alpha", "measuring reference@beta", "measuring links between hosts"}
    assert all(profile.ops for profile in found.values())
    known = stored_hosts()
    addresses = [f"127.0.0.1:{port}" for port in hosts.ports.values()]
    assert set(known.devices) == {f"reference@{address}" for address in addresses}
    [(name, link)] = known.links.items()
    assert name == " and ".join(sorted(addresses))
    assert link.origin == "measured"
    assert 0 < link.latency < 0.05
    assert link.bandwidth > 1e6
    assert link_between(read_cluster(hosts.file), "reference@alpha", "reference@beta") == link
    told = origins(hosts)
    assert set(told.values()) == {"measured"}
    seen.clear()
    again = profile_hosts(FOLDER, hosts.file, lambda phase, *_: seen.append(phase), quick=True, **LIMITS)
    assert again.keys() == found.keys()
    assert seen == []


def test_what_this_machine_has_measured_is_borrowed_for_other_hosts(hosts: Hosts) -> None:
    profile_device(FOLDER, "reference", None, silent, Patience(0), quick=True, **LIMITS)
    told = origins(hosts)
    assert set(told.values()) == {"borrowed"}


def test_links_that_the_file_gives_are_not_measured(hosts: Hosts) -> None:
    file = hosts.file
    file.write_text(f"{file.read_text()}\nlinks: [{{between: [alpha, beta], latency: 1ms, bandwidth: 1GB/s}}]")
    profile_hosts(FOLDER, file, silent, quick=True, **LIMITS)
    assert not stored_hosts().links
    assert link_between(read_cluster(file), "reference@alpha", "reference@beta").latency == 1e-3
    assert link_between(read_cluster(hosts.file), "reference@alpha", "reference@beta") == REMOTE_LINK


def test_a_profile_with_other_threads_is_another_devices(hosts: Hosts) -> None:
    file = hosts.file
    known = stored_hosts()
    for name, port in hosts.ports.items():
        device = Fingerprint(**{**fingerprint("reference", None), "machine": name, "threads": 3})
        known.devices[f"reference@127.0.0.1:{port}"] = device
    store_hosts(known)
    cluster = read_cluster(file)
    target = cluster_target(cluster, "reference@alpha", cluster.devices["reference@alpha"])
    assert measured_there(cluster, target) is None
    found = measured_there(cluster, replace(target, threads=3))
    assert found is not None
    assert found.device.machine == "alpha"


def test_what_a_host_cannot_measure_is_told(hosts: Hosts) -> None:
    file = hosts.file
    file.write_text(file.read_text().replace("reference@beta: {}", "cuda:7@beta: {}"))
    with pytest.raises(LabinferError, match="'cuda:7@beta' was not measured"):
        profile_hosts(FOLDER, file, silent, quick=True, **LIMITS)
    hosts.kill("beta")
    with pytest.raises(LabinferError, match="agent of 'beta' does not answer") as caught:
        profile_hosts(FOLDER, hosts.file, silent, quick=True, **LIMITS)
    assert caught.value.remedy is not None
    assert "labinfer cluster up" in caught.value.remedy


def test_what_one_host_cannot_measure_stops_the_others(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []

    def measure(control: Control, target: Target, *_: object) -> DeviceProfile:
        if target.name == "reference@beta":
            raise LabinferError("profile.host", "beta has no such device")
        with pytest.raises(ChannelClosed) as caught:
            control.hear(60)
        stopped.append(str(caught.value))
        raise LabinferError("profile.host", "alpha was stopped")

    monkeypatch.setattr(profiling, "device_profile", measure)
    with pytest.raises(LabinferError, match="beta has no such device"):
        profile_hosts(FOLDER, hosts.file, silent, quick=True, **LIMITS)
    assert len(stopped) == 1
    assert "no answer came" not in stopped[0]


def test_a_head_that_is_gone_is_not_measured_for(hosts: Hosts) -> None:
    control = open_control(("127.0.0.1", hosts.ports["alpha"]), Credentials(kept_token()))
    order = {"model": str(FOLDER), "name": "reference@alpha", "threads": None, "max_num_batched_tokens": 16}
    control.say(do="profile", order=order)
    assert "progress" in control.hear(60)[0]
    assert len(hosts.stages("alpha")) == 1
    control.release()
    until = time.monotonic() + 60
    while hosts.stages("alpha"):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_frames_of_other_sizes_are_refused(hosts: Hosts) -> None:
    control = open_control(("127.0.0.1", hosts.ports["alpha"]), Credentials(kept_token()))
    control.say(do="echo", channel="a", size=1 << 40)
    address = ["127.0.0.1", hosts.ports["alpha"]]
    with pytest.raises(LabinferError, match="KeyError"):
        control.ask(do="hops", channel="a", size=1 << 40, address=address)
    control.release()


def test_each_host_measures_one_way_at_a_time() -> None:
    pairs = [(one, other) for one in range(6) for other in range(one)]
    names = [(str(one), str(other)) for one, other in pairs]
    done = list(rounds(names))
    assert sorted(pair for each in done for pair in each) == sorted(names)
    assert all(len({name for pair in each for name in pair}) == 2 * len(each) for each in done)
    assert len(done) <= 2 * 5  # never more than twice the best


def test_the_command_line_shows_what_hosts_measured(hosts: Hosts, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["profile", str(FOLDER), "--cluster", str(hosts.file), "--quick", "--max-num-batched-tokens", "16"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "reference@beta: kind reference" in out
    assert f"127.0.0.1:{hosts.ports['alpha']} and " in out or f" and 127.0.0.1:{hosts.ports['alpha']}" in out
    assert main([*command, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"reference@alpha", "reference@beta"}
