"""Graph passes: each takes the op graph and gives it back changed; the rules are verified after every one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from labinfer.compiler.graph import OpGraph
from labinfer.compiler.passes.fuse import fuse
from labinfer.compiler.passes.lora import insert_lora
from labinfer.compiler.passes.prune import prune
from labinfer.compiler.passes.shard import shard
from labinfer.compiler.rules import verify_graph
from labinfer.ops.fusions import Fusion


@dataclass(frozen=True, slots=True)
class Trace:
    """What one step of the compiler did: milliseconds, ops before and after, and its effect in words."""

    name: str
    milliseconds: float
    ops_before: int
    ops_after: int
    effect: str


class Tracer:
    """Times the steps of a compile for ``labinfer compile --trace``."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []
        self.started = time.perf_counter()

    def done(self, name: str, ops_before: int, ops_after: int, effect: str) -> None:
        """Record the step that ends now and began when the last one ended."""
        now = time.perf_counter()
        self.traces.append(Trace(name, (now - self.started) * 1e3, ops_before, ops_after, effect))
        self.started = now


Pass = Callable[[OpGraph], str]
"""Changes a graph in place and returns its effect in words."""


def run_passes(
    graph: OpGraph,
    fusions: Iterable[Fusion],
    tracer: Tracer,
    max_loras: int = 0,
    max_lora_rank: int = 0,
    split: Sequence[float] = (1.0,),
    rank: int = 0,
) -> None:
    """Run the pipeline on ``graph``; a broken rule after a pass is an error that names the pass.

    With ``max_loras`` the graph gets room for so many adapters of at most ``max_lora_rank``. With a ``split`` among
    several ranks it becomes what ``rank`` runs.
    """
    chosen = tuple(fusions)
    pipeline: list[tuple[str, Pass]] = [("prune", prune), ("fuse", lambda graph: fuse(graph, chosen))]
    if max_loras:
        pipeline.insert(1, ("lora", lambda graph: insert_lora(graph, max_loras, max_lora_rank)))
    if len(split) > 1:
        pipeline.insert(1, ("shard", lambda graph: shard(graph, split, rank)))
    verify_graph(graph, "lower")
    tracer.done("verify lower", len(graph.ops), len(graph.ops), "all rules hold")
    for name, run in pipeline:
        before = len(graph.ops)
        effect = run(graph)
        verify_graph(graph, name)
        tracer.done(name, before, len(graph.ops), effect)
