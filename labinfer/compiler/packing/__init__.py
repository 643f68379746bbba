"""Offline memory planning: buffers with known lifetimes and sizes get offsets in one arena (see ``pack``)."""

from labinfer.compiler.packing.csvfile import read_problem
from labinfer.compiler.packing.planner import pack
from labinfer.compiler.packing.problem import Buffer, Packing
from labinfer.compiler.packing.verify import verify

__all__ = ["Buffer", "Packing", "pack", "read_problem", "verify"]
