"""What this CPU can do, found without anything that compiles. Nothing else in the backend asks for CPU features.

Three levels: ``avx512vnni`` (byte dot products over 512 bits), ``avx2`` (with FMA and F16C) and ``generic`` (plain LLVM
vectors: any CPU). ``LABINFER_CPU_ISA`` forces a lower level.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache

from labinfer.errors import UsageError

LEVELS = ("avx512vnni", "avx2", "generic")
"""Feature levels, best first."""

_NEEDED = {
    "avx512vnni": ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx2", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "generic": (),
}

X86 = platform.machine().lower() in ("x86_64", "amd64")


def cpu_features() -> frozenset[str]:
    """Names of the CPU's features, in small letters without ``-`` and ``_``: from Linux itself, elsewhere from LLVM."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith(("flags", "Features"))]
        names = lines[0].partition(":")[2].split() if lines else []
    except OSError:
        import llvmlite.binding as llvm

        names = [name for name, has in llvm.get_host_cpu_features().items() if has]
    return frozenset(name.replace("-", "").replace("_", "") for name in names)


def choose_level(features: frozenset[str], forced: str | None) -> str:
    """The best level that ``features`` allow, or ``forced``; raises UsageError for one the CPU does not have."""
    usable = [level for level in LEVELS if features.issuperset(_NEEDED[level])]
    if forced is None:
        return usable[0]
    if forced not in usable:
        message = f"LABINFER_CPU_ISA is '{forced}', this CPU has {', '.join(usable)}"
        raise UsageError("device.isa", message, remedy="unset LABINFER_CPU_ISA to take the best")
    return forced


FEATURES = cpu_features()
FORCED = os.environ.get("LABINFER_CPU_ISA") or None
LEVEL = choose_level(FEATURES, FORCED)
HAS_HALF = LEVEL != "generic" or not X86
"""Whether float16 is converted by the CPU; x86-64 without F16C would call a library function for each number."""

WORDS = LEVEL != "avx512vnni"
"""Whether the two digits of an activation are one number of 16 bits: without VNNI that makes fewer products."""

DIGIT_MAX = {1: 64 if WORDS else 127, 2: 127}
"""Greatest size of the first of so many activation digits.

Without VNNI a pair of products of bytes must fit in 16 bits (2 * 255 * 64 < 2**15).
"""


_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@cache
def has_matrix_unit() -> bool:
    """Whether this process may use the CPU's matrix unit (AMX); Linux grants its registers to processes that ask."""
    if (
        LEVEL != "avx512vnni"
        or sys.platform != "linux"
        or not FEATURES.issuperset(("amxtile", "amxbf16", "avx512vbmi"))
    ):
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)
