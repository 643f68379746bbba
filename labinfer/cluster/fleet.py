"""A model over the hosts of a cluster file: planned over those that answer, planned anew when that changes."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from labinfer.api import compile_options, is_plan, read_model
from labinfer.catalogue import resolve
from labinfer.cluster.agents import hosts_of
from labinfer.cluster.control import CONTROL_PURPOSE, END_SECONDS, MESSAGE_BYTES
from labinfer.cluster.host import Host
from labinfer.cluster.ray_hosts import RayAgents, is_ray
from labinfer.cluster.stages import HostedStages
from labinfer.cluster.token import credentials_of, kept_token
from labinfer.compiler.cluster import Cluster
from labinfer.compiler.compile import compile_plan
from labinfer.compiler.plan import Limits, Plan
from labinfer.compiler.workload import parse_workload
from labinfer.errors import DoesNotFit, UsageError
from labinfer.llm import LLM, loading
from labinfer.placing import cluster_target, goal_of
from labinfer.progress import Progress, silent
from labinfer.replanning import pinned
from labinfer.runtime.batch import Part
from labinfer.runtime.pipeline.process import StageDied
from labinfer.runtime.pipeline.transport import ChannelClosed, Credentials, Distrusted, Sealed
from labinfer.runtime.pipeline.transport.sealed import connect
from labinfer.runtime.pipeline.workers import FleetReport, HostReport, Start

_log = logging.getLogger(__name__)

PROBE_SECONDS = 0.7
"""How long a host may take to answer before a plan is made without it."""

MAX_STARTS = 20
"""Starts of the stages that are remembered."""

REJOIN_SECONDS = 2.0
"""How long a host that was lost must answer again before it is taken back in."""


def load(
    model: str | Path | None,
    cluster: str | Path,
    *,
    weights: str | Path | None = None,
    token_file: Path | None = None,
    objective: str = "latency",
    workload: str = "",
    progress: Progress | None = None,
    seed: int | None = None,
    **options: Any,
) -> LLM:
    """The model over the hosts of the ``cluster`` file, whose agents must run; ``options`` are the compiler's.

    ``auto`` and ``ray://HOST:PORT`` are the hosts of a Ray cluster, which starts the agents. Raises ``DoesNotFit``
    where no host answers, or those that do cannot hold the model.
    """
    if model is not None and is_plan(model):
        message = "a plan cannot be planned anew when a host is lost"
        raise UsageError("cluster.plan", message, remedy="give the model that it was compiled from")
    with contextlib.ExitStack() as started:
        if is_ray(cluster):
            agents = started.enter_context(contextlib.closing(RayAgents(str(cluster), kept_token(token_file))))
            cluster = agents.file
        found, source = hosts_of(cluster), resolve(None, progress) if model is None else model
        planner = Planner(source, weights, found, objective, workload, options)
        fleet = ClusterFleet(planner, credentials_of(found, token_file))
        fleet.used = fleet.answering()
        plan = planner.plan(fleet.used)
        show = progress or silent
        fleet.progress, fleet.compiling = loading(plan, show), partial(show, "preparing kernels")
        llm = LLM(plan, weights=weights, progress=progress, seed=seed, transport=fleet)
        fleet.agents = started.pop_all()
        return llm


@dataclass(slots=True)
class Planner:
    """Makes plans for one model over some hosts of a cluster."""

    model: str | Path
    weights: str | Path | None
    cluster: Cluster
    objective: str
    workload: str
    options: dict[str, Any]

    def plan(self, hosts: Collection[str], like: Limits | None = None) -> Plan:
        """The plan over ``hosts``, by cost where it was measured, else evenly; with the limits ``like``, if given."""
        cluster, workload = self.cluster.over(hosts), parse_workload(self.workload)
        places = [cluster_target(cluster, name, device) for name, device in cluster.devices.items()]
        blueprint, source, checkpoint = read_model(self.model, self.weights)
        chosen = compile_options({"max_num_seqs": workload.concurrency, **self.options, **pinned(like)})
        goal = goal_of(cluster, places, self.objective, workload)
        try:
            return compile_plan(blueprint, source, places, chosen, checkpoint, None, goal)
        except DoesNotFit as error:
            if error.code != "profile.unmeasured":
                raise
            return compile_plan(blueprint, source, places, chosen, checkpoint)


@dataclass(slots=True)
class ClusterFleet:
    """The hosts of a cluster; see ``Fleet``."""

    planner: Planner
    credentials: Credentials
    progress: Callable[[int], None] = lambda nbytes: None
    compiling: Callable[[int, int], None] = lambda done, total: None
    owner: str = field(default_factory=lambda: secrets.token_hex(8))
    used: frozenset[str] = frozenset()
    plans: dict[frozenset[str], Plan] = field(default_factory=dict)
    back_since: dict[str, float] = field(default_factory=dict)
    closing: threading.Event = field(default_factory=threading.Event)
    prober: threading.Thread | None = None
    hosts: dict[str, Host] = field(default_factory=dict)
    """Those that the stages are on, or that were so last."""
    runs: int = 0
    starts: deque[Start] = field(default_factory=lambda: deque(maxlen=MAX_STARTS))
    agents: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Ends the agents that were started for this model alone."""

    def start(self, plan: Plan) -> HostedStages:
        """See ``Fleet.start``."""
        if self.prober is None:
            self.plans[self.used] = plan
            self.prober = threading.Thread(target=self.probe, name="labinfer-hosts", daemon=True)
            self.prober.start()
        self.runs, began = self.runs + 1, time.monotonic()
        names = [self.planner.cluster.host_of(stage.device) for stage in plan.stages]
        self.connect(names)
        hosts, path = [self.hosts[name] for name in names], Path(plan.source.checkpoint or "")
        stages = HostedStages(plan, hosts, self.credentials, self.runs, path, self.progress, self.compiling)
        self.note(Start(time.time(), time.monotonic() - began, tuple(names), stages.loaded, stages.kept))
        return stages

    def connect(self, names: Collection[str]) -> None:
        """Be connected to the hosts called ``names``, and to no other: what rests on those is ended."""
        for name, host in list(self.hosts.items()):
            if name not in names or not host.alive:
                self.hosts.pop(name).close()
        missing = [name for name in dict.fromkeys(names) if name not in self.hosts]
        with ThreadPoolExecutor(len(missing) or 1) as pool:
            found = [(name, pool.submit(self.open_host, name)) for name in missing]
        try:
            self.hosts |= {name: opening.result() for name, opening in found if opening.exception() is None}
            for _, opening in found:
                opening.result()
        except ChannelClosed as error:
            raise StageDied("pipeline.start", f"a host was lost while its stages were started: {error}") from None

    def open_host(self, name: str) -> Host:
        """A connection to a host."""
        return Host(name, self.planner.cluster.hosts[name].endpoint, self.credentials, self.owner)

    def note(self, start: Start) -> None:
        """Keep what a start has cost, and tell of it where it was not the first."""
        self.starts.append(start)
        if self.runs > 1:
            _log.warning("%s", start)

    def replan(self, plan: Plan) -> Plan:
        """The plan over the hosts that answer now; each set of hosts is planned for once."""
        self.used = self.answering()
        self.back_since.clear()
        if self.used not in self.plans:
            self.plans[self.used] = self.planner.plan(self.used, plan.limits)
        return self.plans[self.used]

    @property
    def improved(self) -> bool:
        """Whether a host that the plan does without has answered for a while."""
        now = time.monotonic()
        back = list(self.back_since.items())  # perhaps with one that was asked while the plan was made that uses it
        return any(name not in self.used and now - since > REJOIN_SECONDS for name, since in back)

    def observe(self, times: np.ndarray, part: Part) -> None:
        """Steps may take as long as they take."""

    def report(self) -> FleetReport:
        """See ``Fleet.report``."""
        connected = dict(self.hosts)
        hosts = []
        for name, known in self.planner.cluster.hosts.items():
            host = connected.get(name)
            alive = host is not None and host.alive
            state = "running" if alive else "back" if name in self.back_since else "lost"
            if state == "lost" and name in self.used and name not in connected:
                state = "idle"
            hosts.append(HostReport(name, known.address, state, host.round_trip if host and alive else None))
        return FleetReport(hosts, list(self.starts))

    def answering(self) -> frozenset[str]:
        """The hosts whose agents answer; ``DoesNotFit`` if there is none."""
        hosts = self.planner.cluster.hosts
        with ThreadPoolExecutor(len(hosts)) as pool:
            found = dict(zip(hosts, pool.map(self.refusal, hosts), strict=True))
        refused = {name: reason for name, reason in found.items() if reason is not None}
        for name, reason in refused.items():
            if reason:
                _log.warning("host '%s' is left out: %s", name, reason)
        if len(refused) == len(hosts):
            told = [f"{name} ({hosts[name].address}){': ' * bool(why)}{why}" for name, why in refused.items()]
            message = f"no host of the cluster answers: {', '.join(told)}"
            raise DoesNotFit("cluster.no-hosts", message, remedy="start their agents: labinfer cluster up FILE")
        return frozenset(found.keys() - refused)

    def refusal(self, name: str) -> str | None:
        """Why the agent of a host cannot be used, "" where it does not answer; None if it can."""
        endpoint = self.planner.cluster.hosts[name].endpoint
        try:
            connection, keys = connect(endpoint, self.credentials, CONTROL_PURPOSE, PROBE_SECONDS)
            with contextlib.closing(connection):
                Sealed(connection, MESSAGE_BYTES, keys).agree(PROBE_SECONDS)
        except Distrusted as error:
            return str(error)
        except ChannelClosed:
            return ""
        return None

    def probe(self) -> None:
        """Look for hosts that have come back, once a second."""
        while not self.closing.wait(1):
            for name in set(self.planner.cluster.hosts) - self.used:
                if self.refusal(name) is None:
                    self.back_since.setdefault(name, time.monotonic())
                else:
                    self.back_since.pop(name, None)

    def close(self) -> None:
        """End the thread, and the agents that were started for it."""
        self.closing.set()
        if self.prober is not None:
            self.prober.join(END_SECONDS)
        self.connect([])
        self.agents.close()
