"""Loads an object file into this process: on Linux x86-64 by ourselves, so that no LLVM is needed; elsewhere by LLVM.

What ``build`` writes has one global symbol, ``kernel``, position-independent code, constants, and calls of libc and
libm. Loading is: sections to memory, relocations applied, memory made executable and read-only (System V ABI, AMD64
supplement, 4.4).
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from labinfer.backends.cpu.features import X86
from labinfer.errors import LabinferError

SYMBOL = "kernel"

_SECTION, _SYMBOL, _RELOCATION = struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ"), struct.Struct("<QQq")
_SYMTAB, _RELA, _NOBITS, _ALLOC = 2, 4, 8, 2
_ABSOLUTE, _RELATIVE, _SLOT = 1, (2, 4), (9, 41, 42)
"""Types of relocations: R_X86_64_64; PC32 and PLT32; GOTPCREL, GOTPCRELX and REX_GOTPCRELX."""

_STUB = struct.Struct("<2siHQ")
"""``jmp *2(%rip)`` in eight bytes, then the address it goes to: the slot that code may read itself."""

_STUB_BYTES, _SLOT_IN_STUB = 16, 8
_READ_AND_RUN = mmap.PROT_READ | mmap.PROT_EXEC

_loaded: list[Any] = []
"""What was loaded lives as long as the process: addresses of it are everywhere."""


def load(data: bytes) -> int:
    """Load an object file; the address of ``kernel``. Raises ValueError for what is damaged."""
    if sys.platform != "linux" or not X86:
        return load_with_llvm(data)
    try:
        return _Object(data).load()
    except (struct.error, IndexError, StopIteration) as error:
        raise ValueError(str(error) or "it has no kernel") from None


def load_with_llvm(data: bytes) -> int:
    """``load`` by LLVM, for any system that it knows."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    engine = llvm.create_mcjit_compiler(
        llvm.parse_assembly(""), llvm.Target.from_default_triple().create_target_machine()
    )
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(data))
    engine.finalize_object()
    _loaded.append(engine)
    return int(engine.get_function_address(SYMBOL))


@dataclass(slots=True)
class _Section:
    """A section of the file; ``at`` is where it lies in memory, None if it does not."""

    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    at: int | None = None

    def records(self, size: int) -> range:
        """Where in the file its records of ``size`` bytes begin."""
        return range(self.offset, self.offset + self.size, size)


class _Object:
    """An ELF64 relocatable file being loaded; places are offsets in its memory until that has a base."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        start, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
        headers = [_SECTION.unpack_from(data, start + i * _SECTION.size) for i in range(count)]
        self.sections = [_Section(h[1], h[2], h[4], h[5], h[6], h[7], h[8]) for h in headers]
        table = next(section for section in self.sections if section.kind == _SYMTAB)
        self.symbols = [_SYMBOL.unpack_from(data, at) for at in table.records(_SYMBOL.size)]
        self.names = self.sections[table.link].offset
        self.stubs: dict[int, int] = {}

    def load(self) -> int:
        """Place, relocate and protect everything; the address of ``kernel``."""
        placed, end = [], 0
        for section in self.sections:
            if section.flags & _ALLOC and section.size:
                at = -(-end // max(section.align, 1)) * max(section.align, 1)
                section.at, end = at, at + section.size
                placed.append((at, section))
        relocations = [each for section in self.sections if section.kind == _RELA for each in self.relocations(section)]
        outside = {number for _, kind, number, _ in relocations if kind in _SLOT or self.symbols[number][3] == 0}
        self.stubs = {number: end + _STUB_BYTES * (i + 1) for i, number in enumerate(sorted(outside))}
        memory = mmap.mmap(-1, end + _STUB_BYTES * (len(outside) + 2))
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for at, section in placed:
            if section.kind != _NOBITS:
                memory[at : at + section.size] = self.data[section.offset : section.offset + section.size]
        for number, at in self.stubs.items():
            target = base + self.place(number) if self.symbols[number][3] else _external(self.name(number))
            memory[at : at + _STUB_BYTES] = _STUB.pack(b"\xff\x25", 2, 0, target)
        for at, kind, number, addend in relocations:
            self.relocate(memory, base, at, kind, number, addend)
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(base), ctypes.c_size_t(len(memory)), _READ_AND_RUN) != 0:
            raise LabinferError("device.machine-code", "this system does not let a process run code that it has loaded")
        _loaded.append(memory)
        return base + next(self.place(number) for number in range(len(self.symbols)) if self.name(number) == SYMBOL)

    def relocations(self, section: _Section) -> Iterator[tuple[int, int, int, int]]:
        """Place, type, symbol and addend of each relocation, if what it changes is in memory at all."""
        changed = self.sections[section.info]
        if changed.at is not None:
            for record in section.records(_RELOCATION.size):
                offset, info, addend = _RELOCATION.unpack_from(self.data, record)
                yield changed.at + offset, info & 0xFFFFFFFF, info >> 32, addend

    def relocate(self, memory: mmap.mmap, base: int, at: int, kind: int, number: int, addend: int) -> None:
        """Apply one relocation."""
        if kind in _SLOT:
            target = self.stubs[number] + _SLOT_IN_STUB
        elif number in self.stubs and self.symbols[number][3] == 0:
            target = self.stubs[number]
        else:
            target = self.place(number)
        if kind == _ABSOLUTE:
            struct.pack_into("<Q", memory, at, base + target + addend)
        elif kind in _RELATIVE or kind in _SLOT:
            struct.pack_into("<i", memory, at, target + addend - at)
        else:
            raise ValueError(f"it has a relocation of unknown type {kind}")

    def place(self, number: int) -> int:
        """Where a symbol of this file lies."""
        section, value = int(self.symbols[number][3]), int(self.symbols[number][4])
        at = self.sections[section].at if section < len(self.sections) else None
        if at is None:
            raise ValueError(f"symbol '{self.name(number)}' has no place")
        return at + value

    def name(self, number: int) -> str:
        """The name of a symbol."""
        start = self.names + int(self.symbols[number][0])
        return str(self.data[start : self.data.index(b"\0", start)], "ascii")


def _external(name: str) -> int:
    """The address of a function of libc or libm."""
    for library in (ctypes.CDLL(None), ctypes.CDLL("libm.so.6")):
        if hasattr(library, name):
            return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    raise ValueError(f"it calls '{name}', which is nowhere in libc and libm")
