"""Starting, asking and ending the agents of a cluster file, on this machine and over ssh."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from labinfer.cluster.control import open_control
from labinfer.cluster.token import credentials_of, token_path
from labinfer.compiler.cluster import Cluster, ClusterHost, read_cluster
from labinfer.errors import InvalidFile, LabinferError
from labinfer.home import cache_dir
from labinfer.runtime.pipeline.transport import ChannelClosed, Credentials, Distrusted

START_SECONDS = 30.0

REMOTE_TOKEN = "$HOME/.cache/labinfer/cluster/token"
"""Where the token lies on a host that ssh reaches."""


def hosts_of(path: Path | str) -> Cluster:
    """The cluster file at ``path``, which names hosts."""
    cluster = read_cluster(path)
    if not cluster.hosts:
        remedy = "name them under 'hosts:', with the addresses of their agents"
        raise InvalidFile("cluster.no-hosts", "the cluster file names no hosts", place=cluster.place(), remedy=remedy)
    return cluster


def up(cluster: Cluster, token_file: Path | None = None) -> dict[str, str]:
    """Start the agents that do not answer; what was done, by host. Raises what kept one from starting."""
    credentials = credentials_of(cluster, token_file)
    options = ["--tls", *credentials.tls[:3]] if credentials.tls else []
    file = token_file or token_path()

    def start(name: str) -> str:
        host = cluster.hosts[name]
        if asked(host, credentials) is not None:
            return "runs already"
        (start_here if host.ssh is None else start_there)(name, host, file, options)
        until = time.monotonic() + START_SECONDS
        while asked(host, credentials) is None:
            if time.monotonic() > until:
                message = f"the agent of '{name}' does not answer at {host.address}"
                raise LabinferError("cluster.agent", message, remedy=f"see {log_of(name)}, or the host's own")
            time.sleep(0.1)
        return "started"

    with ThreadPoolExecutor(len(cluster.hosts)) as pool:
        return dict(zip(cluster.hosts, pool.map(start, cluster.hosts), strict=True))


def status(cluster: Cluster, token_file: Path | None = None) -> dict[str, dict[str, Any] | None]:
    """What each host's agent reports; None of those that do not answer."""
    credentials, hosts = credentials_of(cluster, token_file), cluster.hosts
    with ThreadPoolExecutor(len(hosts)) as pool:
        return dict(zip(hosts, pool.map(lambda host: asked(host, credentials), hosts.values()), strict=True))


def down(cluster: Cluster, token_file: Path | None = None) -> dict[str, str]:
    """End the agents, and with them all stages; what was done, by host."""
    credentials, done = credentials_of(cluster, token_file), {}
    for name, host in cluster.hosts.items():
        done[name] = "did not run"
        try:
            control = open_control(host.endpoint, credentials)
            try:
                control.ask(do="shutdown")
                done[name] = "ended"
            finally:
                control.release()
        except Distrusted as error:
            done[name] = f"was not ended: {error}"
        except (ChannelClosed, LabinferError):
            pass
    return done


def asked(host: ClusterHost, credentials: Credentials) -> dict[str, Any] | None:
    """The report of a host's agent; None if it does not answer. Another token, or a wrong certificate, is an error."""
    try:
        control = open_control(host.endpoint, credentials)
    except Distrusted as error:
        raise LabinferError(error.code, f"{host.address}: {error}", remedy=error.remedy) from None
    except ChannelClosed:
        return None
    try:
        started = time.perf_counter()
        control.ask(do="hello", owner="")
        seconds = time.perf_counter() - started
        return {**control.ask(do="hello", owner="", report=True), "round_trip_seconds": seconds}
    except ChannelClosed:
        return None
    finally:
        control.release()


def log_of(name: str) -> Path:
    """Where an agent of this machine writes."""
    return cache_dir() / "cluster" / f"{name}.log"


def start_here(name: str, host: ClusterHost, token_file: Path, options: Sequence[str]) -> None:
    """Start an agent that outlives this process; ``options`` are more of its own."""
    command = [sys.executable, "-m", "labinfer.cluster.agent"]
    command += ["--address", host.address, "--token-file", str(token_file), *options]
    log_of(name).parent.mkdir(parents=True, exist_ok=True)
    with log_of(name).open("ab") as log:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def start_there(name: str, host: ClusterHost, token_file: Path, options: Sequence[str]) -> None:
    """Start an agent over ssh; the token goes through stdin, so that no list of processes shows it."""
    log = '"$HOME/.cache/labinfer/cluster/agent.log"'
    agent = shlex.join(
        [host.python, "-m", "labinfer.cluster.agent", "--address", host.address, *options, "--token-file"]
    )
    script = (
        f'umask 077 && mkdir -p "$HOME/.cache/labinfer/cluster" && cat > "{REMOTE_TOKEN}" && '
        f'(nohup setsid {agent} "{REMOTE_TOKEN}" > {log} 2>&1 < /dev/null &)'
    )
    command = ["ssh", "-o", "BatchMode=yes", str(host.ssh), script]
    done = subprocess.run(command, input=token_file.read_bytes(), capture_output=True, timeout=60, check=False)
    if done.returncode:
        message = f"ssh to '{name}' ({host.ssh}) failed: {done.stderr.decode(errors='replace').strip()[:500]}"
        raise LabinferError("cluster.ssh", message, remedy=f"try it by hand: ssh {host.ssh} true")
