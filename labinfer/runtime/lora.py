"""LoRA adapters of a model: which is in which slot of its pools, and who uses it.

A slot is one row of every pool that the plan made (``lora_add`` reads it). An adapter is loaded when the first request
that names it is admitted, and stays until its slot is needed: the least recently used one that nobody uses goes first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from labinfer.compiler.graph import LORA_A, LORA_B
from labinfer.errors import ErrorSink, Place, UsageError, WeightsError, did_you_mean
from labinfer.ops.base import NO_ADAPTER
from labinfer.runtime.parameters import Parameters, transformed
from labinfer.runtime.peft import CONFIG, TENSORS, PeftAdapter
from labinfer.runtime.variables import Parameter
from labinfer.runtime.weights.tensor_info import quoted

SUFFIXES = {"A": LORA_A, "B": LORA_B}


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """The adapter that a request runs with: a ``name`` to call it by, and the ``path`` of its PEFT folder."""

    name: str
    path: str | Path

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UsageError("lora.name", f"an adapter needs a name, got {self.name!r:.60}")
        if not isinstance(self.path, str | Path) or not str(self.path):
            raise UsageError("lora.path", f"adapter '{self.name}' needs the path of a folder, got {self.path!r:.60}")


@dataclass(slots=True)
class Slot:
    """What a slot holds: the adapter's ``salt`` (None when empty), the modules it fills, and how many use it."""

    salt: str | None = None
    filled: set[str] = field(default_factory=set)
    users: int = 0


class Adapted(Protocol):
    """What runs with an adapter, or with none: a sequence, a session. ``adapter`` is the slot, or ``NO_ADAPTER``."""

    adapter: int


class Adapters:
    """The adapters of one model. ``memory`` are its weights on every device; those that are pools are filled here."""

    def __init__(self, max_loras: int, memory: Iterable[Parameters]) -> None:
        self.slots = [Slot() for _ in range(max_loras)]
        self.order = list(range(max_loras))  # least recently used first
        self.pools: dict[str, dict[str, tuple[Parameters, Parameter]]] = {}
        self.checked: set[str] = set()
        for parameters in memory:
            for parameter in parameters.by_name.values():
                for part, suffix in SUFFIXES.items():
                    if parameter.weight.adapter and parameter.weight.tensor.endswith(suffix):
                        module = parameter.weight.tensor.removesuffix(suffix)
                        self.pools.setdefault(module, {})[part] = parameters, parameter

    def check(self, request: LoRARequest) -> None:
        """Raise what is wrong with the adapter of ``request``, or with naming one to this model."""
        if not self.slots:
            message = f"the plan has no room for adapters, such as '{request.name}'"
            remedy = "compile it with --max-loras, or open the model with enable_lora=True"
            raise UsageError("lora.disabled", message, remedy=remedy)
        salt = fingerprint(request.path)
        if salt not in self.checked:
            with PeftAdapter(request.path) as adapter:
                self.fit(adapter)
            self.checked.add(salt)

    def give(self, sequence: Adapted, request: LoRARequest | None) -> bool:
        """Give ``sequence`` the adapter of ``request``; False while every slot is in use."""
        slot = self.acquire(request) if request else NO_ADAPTER
        if slot is None:
            return False
        sequence.adapter = slot
        return True

    def share(self, sequence: Adapted, into: Adapted) -> None:
        """``into`` uses the adapter of ``sequence``, if it has one, beside it."""
        into.adapter = sequence.adapter
        if into.adapter != NO_ADAPTER:
            self.slots[into.adapter].users += 1

    def take(self, sequence: Adapted) -> None:
        """Take the adapter of ``sequence`` back, if it has one."""
        if sequence.adapter != NO_ADAPTER:
            self.release(sequence.adapter)
            sequence.adapter = NO_ADAPTER

    def salt(self, sequence: Adapted) -> tuple[str, ...]:
        """What keeps the cached blocks of ``sequence`` apart from those that other adapters, or none, have made."""
        salt = self.slots[sequence.adapter].salt if sequence.adapter != NO_ADAPTER else None
        return (salt,) if salt else ()

    def acquire(self, request: LoRARequest) -> int | None:
        """The slot of the adapter of ``request``, loaded if it must be; None while all slots are in use.

        Each call is one user more; ``release`` takes it back.
        """
        salt = fingerprint(request.path)
        number = next((number for number, slot in enumerate(self.slots) if slot.salt == salt), None)
        if number is None:
            number = next((number for number in self.order if not self.slots[number].users), None)
            if number is None:
                return None
            self.load(number, request, salt)
        self.slots[number].users += 1
        self.order.remove(number)
        self.order.append(number)
        return number

    def release(self, number: int) -> None:
        """One user of slot ``number`` less."""
        self.slots[number].users -= 1

    def close(self) -> None:
        """Let go of the memory."""
        self.pools.clear()

    def load(self, number: int, request: LoRARequest, salt: str) -> None:
        """Fill slot ``number``; modules that only its last adapter had become zero."""
        slot = self.slots[number]
        slot.salt = None
        with PeftAdapter(request.path) as adapter:
            targets = self.fit(adapter)
            for module in slot.filled - set(targets):
                self.store(number, module, None, "")
            slot.filled |= set(targets)
            for module, name in targets.items():
                self.store(number, module, adapter, name)
        slot.salt, slot.filled = salt, set(targets)

    def store(self, number: int, module: str, adapter: PeftAdapter | None, name: str) -> None:
        """Write both matrices that ``adapter`` has under ``name`` for ``module``, or zeros."""
        for part, (parameters, pool) in self.pools[module].items():
            shape = pool.weight.shape[1:]
            padded = np.zeros(shape, np.float32)
            if adapter is not None:
                matrix = adapter.down(name) if part == "A" else adapter.up(name)
                padded[: matrix.shape[0], : matrix.shape[1]] = matrix
            raw = transformed(padded.view(np.uint8).reshape(-1), "f32", shape, pool.weight.transform)
            parameters.device.store(pool.array, raw, "f32", shape, number)

    def fit(self, adapter: PeftAdapter) -> dict[str, str]:
        """The adapter's name for each module of the model that it adapts; raises what does not fit the pools."""
        sink, found = ErrorSink(), dict[str, str]()
        for name, rank in adapter.modules.items():
            module = self.module(name)
            if module is None:
                sink.add(self.unknown(adapter, name))
                continue
            (_, down), (_, up) = self.pools[module]["A"], self.pools[module]["B"]
            most, out_features, in_features = down.weight.shape[1], up.weight.shape[1], down.weight.shape[2]
            a, b = adapter.parts[name]["A"], adapter.parts[name]["B"]
            if module in found:
                sink.add(adapter.wrong("lora.tensor", a, f"adapts '{module}' again"))
            if rank > most:
                remedy = f"compile with --max-lora-rank {adapter.rank}"
                sink.add(adapter.wrong("lora.rank", a, f"has rank {rank}, the plan has room for {most}", remedy))
            for info, wanted in ((a, (rank, in_features)), (b, (out_features, rank))):
                if info.shape != wanted:
                    message = f"is {list(info.shape)}, but '{module}' needs {list(wanted)}"
                    sink.add(adapter.wrong("lora.shape", info, message, "is this adapter for another model?"))
            found[module] = name
        sink.check()
        return found

    def module(self, name: str) -> str | None:
        """The model's name of the module that an adapter calls ``name``: the same, or one is the end of the other."""
        if name in self.pools:
            return name
        ends = [module for module in self.pools if name.endswith(f".{module}") or module.endswith(f".{name}")]
        return ends[0] if len(ends) == 1 else None

    def unknown(self, adapter: PeftAdapter, name: str) -> WeightsError:
        """The error for a module that has no pool."""
        remedy = did_you_mean(name, self.pools) or "linear layers can be adapted: no head, no embedding, no expert"
        info = adapter.parts[name]["A"]
        return adapter.wrong("lora.unknown-module", info, f"adapts {quoted(name)}, which the plan cannot", remedy)


def fingerprint(path: str | Path) -> str:
    """What tells the adapter at ``path`` from every other, and from itself before its files changed.

    It is the slot's identity, and the salt of cached prefixes: keys and values computed with an adapter are its own.
    """
    parts = []
    for name in (CONFIG, TENSORS):
        try:
            folder = os.path.realpath(path)
            status = os.stat(os.path.join(folder, name))
            parts.append(f"{status.st_mtime_ns}.{status.st_size}.{status.st_ino}")
        except (OSError, ValueError) as error:
            place, remedy = Place(str(path)), f"give a folder with {CONFIG} and {TENSORS}"
            message = f"cannot open {name}: {getattr(error, 'strerror', None) or error}"
            raise WeightsError("lora.missing-file", message, place=place, remedy=remedy) from None
    return ":".join([folder, *parts])


def adapter_rank(path: str | Path) -> int:
    """The greatest rank in the adapter at ``path``: what a plan for it alone needs."""
    with PeftAdapter(path) as adapter:
        return adapter.rank
