"""GPUs of one process that run a stage together: the mailbox of each, to which the others write (``exchange.cu``)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import Structure, c_int, c_uint64
from typing import TYPE_CHECKING

import numpy as np

from labinfer.backends.cuda.launches import LAUNCHES
from labinfer.backends.cuda.layout import MAX_RANKS, exchange_bytes
from labinfer.backends.exchange import RankPeers
from labinfer.errors import DoesNotFit, LabinferError

if TYPE_CHECKING:
    from labinfer.backends.cuda.device import CudaDevice


class PeersArgument(Structure):
    """``Peers`` of ``exchange.cu``."""

    _fields_ = (("boxes", c_uint64 * MAX_RANKS), ("left", c_uint64), ("rank", c_int))


class Meeting:
    """Where the threads of so many ranks meet before each step, until one leaves for good."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.present, self.number, self.over = ranks, 0, 0, False
        self.changed = threading.Condition()

    def come(self) -> bool:
        """Wait for the others: whether all have come, and so launch (see ``Launches``); if not, one has left."""
        with self.changed:
            number = self.number
            if self.over:
                return False
            self.present += 1
            if self.present == self.ranks:
                LAUNCHES.begin(self.ranks)
                self.present, self.number = 0, number + 1
                self.changed.notify_all()
            self.changed.wait_for(lambda: self.over or self.number != number)
            return self.number != number

    def leave(self) -> None:
        """Come no more."""
        with self.changed:
            self.over = True
            self.changed.notify_all()


class CudaPeers:
    """See ``RankPeers``; ``argument`` is what kernels see of the group."""

    def __init__(self, boxes: Sequence[int], left: np.ndarray, rank: int, meeting: Meeting) -> None:
        self.ranks, self.left, self.meeting = len(boxes), left, meeting
        self.argument = PeersArgument((c_uint64 * MAX_RANKS)(*boxes), left.ctypes.data, rank)

    def leave(self) -> None:
        """See ``RankPeers.leave``; kernels that wait go on, with what they have."""
        self.left[0] = 1
        self.meeting.leave()

    @contextmanager
    def together(self) -> Iterator[None]:
        """See ``RankPeers.together``; whoever comes after a rank has left is told so, and launches nothing."""
        if not self.meeting.come():
            self.check()
        with LAUNCHES.rank():
            yield

    def check(self) -> None:
        """See ``RankPeers.check``."""
        if self.left[0]:
            raise LabinferError("run.rank-left", "another rank of this stage has failed", remedy="load the model again")


class CudaExchange:
    """The mailboxes of ``devices``, which must reach each other's memory; see ``Exchange``."""

    def __init__(self, devices: Sequence[CudaDevice]) -> None:
        self.devices = devices
        for device in devices:
            for other in devices:
                if not device.reach(other.number):
                    message = f"'{device.name}' cannot write to the memory of '{other.name}'"
                    raise DoesNotFit("device.no-peers", message, remedy="make them stages of a pipeline")
        self.buffers = []
        try:
            for device in devices:
                self.buffers.append(device.allocate(exchange_bytes(len(devices)), "parts of other ranks"))
                device.synchronize()  # it is cleared by now
            left = devices[0].host_memory(4).view(np.int32)
        except BaseException:
            self.close()
            raise
        boxes, meeting = [buffer.memory.ptr for buffer in self.buffers], Meeting(len(devices))
        self.peers: Sequence[RankPeers] = [CudaPeers(boxes, left, rank, meeting) for rank in range(len(devices))]

    def close(self) -> None:
        """See ``Exchange.close``; where a rank has failed, the others may still write to its mailbox until then."""
        for device in self.devices:
            device.synchronize()
        for device, buffer in zip(self.devices, self.buffers, strict=False):
            device.deallocate(buffer)
