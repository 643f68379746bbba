"""GPUs of one process that run a stage together: the mailbox of each, to which the others write (``exchange.cu``)."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int, c_uint64
from typing import TYPE_CHECKING

import numpy as np

from labinfer.backends.cuda.layout import MAX_RANKS, exchange_bytes
from labinfer.backends.exchange import RankPeers
from labinfer.errors import DoesNotFit, LabinferError

if TYPE_CHECKING:
    from labinfer.backends.cuda.device import CudaDevice


class PeersArgument(Structure):
    """``Peers`` of ``exchange.cu``."""

    _fields_ = (("boxes", c_uint64 * MAX_RANKS), ("left", c_uint64), ("rank", c_int))


class CudaPeers:
    """See ``RankPeers``; ``argument`` is what kernels see of the group."""

    def __init__(self, boxes: Sequence[int], left: np.ndarray, rank: int) -> None:
        self.ranks, self.left = len(boxes), left
        self.argument = PeersArgument((c_uint64 * MAX_RANKS)(*boxes), left.ctypes.data, rank)

    def leave(self) -> None:
        """See ``RankPeers.leave``; kernels that wait go on, with what they have."""
        self.left[0] = 1

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
        boxes = [buffer.memory.ptr for buffer in self.buffers]
        self.peers: Sequence[RankPeers] = [CudaPeers(boxes, left, rank) for rank in range(len(devices))]

    def close(self) -> None:
        """See ``Exchange.close``."""
        for device, buffer in zip(self.devices, self.buffers, strict=False):
            device.deallocate(buffer)
