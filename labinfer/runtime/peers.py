"""The memory in which ranks of a tensor-parallel group offer one another their parts, as one rank sees it.

One-shot: each rank writes its part, raises its count, waits for the others' counts, and reads all parts. Turns
alternate between two halves: who offers the next part has read all of this turn, so a half is free after two turns.
Compiled kernels do the same on the same memory (``backends/cpu``), so ranks may be of different kinds.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from labinfer.compiler.plan import Plan
from labinfer.errors import LabinferError
from labinfer.runtime.pipeline.transport.ring import private_memory, shared_memory

LINE = 64
"""Bytes of a cache line: counts of different ranks never share one."""

SPINS = 100
"""Looks at a count before the thread lets others run between looks."""


def peer_bytes(plan: Plan, group: int) -> int:
    """Bytes of memory for the ranks of stage ``group``."""
    return _flag_bytes(plan.ranks) + sum(stage.bytes.peers for stage in plan.groups[group])


def shared_peer_memory(plan: Plan, group: int) -> int:
    """The descriptor of such memory, which child processes map (``map_shared``)."""
    memory, file = shared_memory(peer_bytes(plan, group))
    memory.close()
    return file


def private_peer_memory(plan: Plan, group: int) -> mmap.mmap:
    """Such memory for ranks that are threads of this process."""
    return private_memory(peer_bytes(plan, group))


def map_shared(file: int) -> mmap.mmap:
    """The memory behind a descriptor of ``peer_memory``, in a child process."""
    return mmap.mmap(file, os.fstat(file).st_size)


def _flag_bytes(ranks: int) -> int:
    return (ranks + 1) * LINE


class SharedPeers:
    """See ``labinfer.ops.base.Peers``; ``workers`` is how many threads this rank computes with."""

    def __init__(self, memory: mmap.mmap, rank: int, ranks: int, nbytes: int, workers: int) -> None:
        self.rank, self.ranks = rank, ranks
        flags = _flag_bytes(ranks)
        self.flags = np.frombuffer(memory, np.int64, flags // 8).reshape(ranks + 1, LINE // 8)
        self.parts = np.frombuffer(memory, np.float32, ranks * nbytes // 4, flags).reshape(2, ranks, -1)
        self.turns = np.zeros((workers, LINE // 8), np.int64)

    def exchange(self, part: np.ndarray, columns: Sequence[int]) -> list[np.ndarray]:
        """See ``Peers.exchange``; raises ``LabinferError`` where a rank has left."""
        turn = int(self.turns[0, 0]) + 1
        offered = self.parts[turn % 2]
        offered[self.rank, : part.size] = part.reshape(-1)
        self.flags[self.rank, 0] = turn
        spins = 0
        while int(self.flags[: self.ranks, 0].min()) < turn and not self.flags[self.ranks, 0]:
            spins += 1
            if spins > SPINS:
                time.sleep(2e-5)
        self.check()
        self.turns[:, 0] = turn
        rows = len(part)
        return [offered[rank, : rows * count].reshape(rows, count) for rank, count in enumerate(columns)]

    def together(self) -> AbstractContextManager[None]:
        """See ``RankPeers.together``: the host itself waits, and whoever gets ready meanwhile does so undisturbed."""
        return nullcontext()

    def leave(self) -> None:
        """Compute no more: whoever waits for this rank goes on, and finds out by ``check``."""
        self.flags[self.ranks, 0] = 1

    def check(self) -> None:
        """Raise ``LabinferError`` where a rank has left, so that what was computed since is not right."""
        if self.flags[self.ranks, 0]:
            raise LabinferError("run.rank-left", "another rank of this stage has failed", remedy="load the model again")


def peers_of(memory: mmap.mmap, plan: Plan, number: int) -> SharedPeers | None:
    """What the rank that is stage ``number`` of ``plan`` sees of its group's ``memory``; None where it is alone."""
    if plan.ranks == 1:
        return None
    stage = plan.stages[number]
    threads = plan.devices[stage.device].threads or 1
    return SharedPeers(memory, stage.rank, plan.ranks, stage.bytes.peers, threads)
