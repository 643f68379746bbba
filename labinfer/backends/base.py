"""What a backend is: three classes, ``Device``, ``Allocator`` and ``FunctionTable``, that know arrays and nothing else.

A backend lives in one package, which states its ``CAPABILITIES``, and is named in ``BACKENDS``. It knows neither maps
nor requests.
"""

from __future__ import annotations

import importlib
import platform
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from labinfer import __version__
from labinfer.errors import DoesNotFit, UsageError, did_you_mean
from labinfer.ops.base import OPS, Call, KernelBounds, KernelOptions, Step, TensorType

if TYPE_CHECKING:
    from labinfer.backends.exchange import Exchange
    from labinfer.backends.sampling import GreedyRun, TokenSampler

Kernel = Callable[[Call], None]
"""Runs one op: reads ``call.inputs``, ``weights``, ``cache`` and ``step``, writes ``call.outputs``."""

Program = Callable[[int, int], None]
"""Runs bound ops for a step of (tokens, rows of logits)."""

BACKENDS: dict[str, str] = {
    "reference": "labinfer.backends.reference.device:ReferenceDevice",
    "cpu": "labinfer.backends.cpu.device:CpuDevice",
    "cuda": "labinfer.backends.cuda.device:CudaDevice",
}
"""Device kinds and the class that implements each; a device is named ``kind`` or ``kind:number``."""


def no_workspace(bounds: KernelBounds) -> int:
    """For kernels that need no scratch memory."""
    return 0


def processor() -> str:
    """The processor of this machine, the same on every machine like it."""
    names: dict[str, str] = {}
    with suppress(OSError), open("/proc/cpuinfo") as file:
        names = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in file)}
    return " ".join([platform.machine(), *filter(None, map(names.get, ("model name", "cpu family", "model")))])


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the compiler must know of a device.

    ``parameters`` names the layout weights take there and ``weight_bytes(format, shape)`` gives its size; ``fusions``
    are the fused ops it has kernels for; ``workspace`` gives the scratch bytes that a kernel needs at its bounds;
    ``kv_dtypes`` are the formats it can keep keys and values in; ``tables(attrs, max_model_len)`` gives the bytes of
    constants it keeps for all ops with these attributes, and ``sampling(rows, groups)`` those it takes to choose tokens
    of so many rows of logits, of that many micro-batches in turn; ``threads`` how many it uses unless told otherwise;
    ``block_multiple`` is what the cache's block size must be a multiple of; ``activations`` says how exactly it can
    multiply, and ``matrix_unit(activations)`` the fewest tokens, by weight format, for which its matrix unit pays.
    ``exchange(ranks)`` gives the bytes of its own memory through which it and others of its kind exchange parts, each a
    rank of a stage; 0 for one that does so in the host's memory.
    ``machine`` says what it runs on, and ``kernels`` which version of its kernels: measured times depend on both.
    ``processors(name)`` are those of a device that has its own, of which it can be opened with some (as its
    ``threads``); None for one that computes with the machine's cores.
    """

    parameters: str
    weight_bytes: Callable[[str, Sequence[int]], int]
    fusions: tuple[str, ...] = ()
    workspace: Callable[[KernelBounds], int] = no_workspace
    kv_dtypes: tuple[str, ...] = ("f32",)
    tables: Callable[[Any, int], int] = lambda attrs, max_model_len: 0
    sampling: Callable[[int, int], int] = lambda rows, groups: 0
    threads: Callable[[], int | None] = lambda: None
    block_multiple: int = 1
    activations: tuple[str, ...] = ("exact",)
    matrix_unit: Callable[[str], Mapping[str, int]] = lambda activations: {}
    exchange: Callable[[int], int] = lambda ranks: 0
    machine: Callable[[], str] = processor
    kernels: Callable[[], str] = lambda: __version__
    processors: Callable[[str], int | None] = lambda name: None


@dataclass(eq=False, slots=True)
class Buffer:
    """A piece of device memory; ``memory`` is the backend's own handle."""

    nbytes: int
    label: str
    memory: Any


class Allocator(ABC):
    """Hands out device memory and counts it, so that what a plan promises can be compared with what was taken."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.allocated, self.peak = limit, 0, 0
        self.buffers: set[Buffer] = set()

    @abstractmethod
    def reserve(self, nbytes: int) -> Any:
        """Device memory of ``nbytes`` bytes, set to zero."""

    def allocate(self, nbytes: int, label: str) -> Buffer:
        """A buffer of exactly ``nbytes`` bytes; raises ``DoesNotFit`` beyond the limit."""
        if self.limit is not None and self.allocated + nbytes > self.limit:
            message = f"{label} needs {nbytes} bytes, {self.limit - self.allocated} of {self.limit} are left"
            raise DoesNotFit("device.memory", message)
        try:
            buffer = Buffer(nbytes, label, self.reserve(nbytes))
        except MemoryError:
            raise DoesNotFit("device.memory", f"{label} needs {nbytes} bytes, the machine has not that much") from None
        self.buffers.add(buffer)
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)
        return buffer

    def deallocate(self, buffer: Buffer) -> None:
        """Give ``buffer`` back; giving it back twice is an error."""
        self.buffers.remove(buffer)
        self.allocated -= buffer.nbytes
        self.release(buffer.memory)
        buffer.memory = None

    def release(self, memory: Any) -> None:  # noqa: B027  most backends' memory goes with the last array over it
        """Give back what ``reserve`` made; arrays over it are not used any more."""


class Lane(ABC):
    """Copies to a device beside its computing, one after another; the host only asks for them."""

    @abstractmethod
    def send(self, host: Any, destination: Any) -> Any:
        """Copy ``host``, in ``host_memory``, once all that the device was asked to compute is done; its ticket."""

    @abstractmethod
    def hold(self, ticket: Any) -> None:
        """Let what the device is asked to compute from now on wait for that copy."""


class KernelFailure(Exception):
    """A kernel raised; ``call`` is what it was given."""

    def __init__(self, call: Call) -> None:
        super().__init__("a kernel failed")
        self.call = call


class FunctionTable:
    """The ops of a device by name: ``device.F.rms_norm(x, weight=w, eps=1e-6)``, and the kernels behind them."""

    def __init__(self, kernels: Mapping[str, Kernel], empty: Callable[[tuple[int, ...], str], Any]) -> None:
        self.kernels, self.empty = kernels, empty

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        if kind not in self.kernels:
            raise AttributeError(did_you_mean(kind, self.kernels) or f"no kernel for op '{kind}'")
        return lambda *inputs, **named: self.call(kind, *inputs, **named)

    def __iter__(self) -> Iterator[str]:
        return iter(self.kernels)

    def call(
        self, kind: str, *inputs: Any, step: Any = None, cache: Mapping[str, Any] | None = None, **named: Any
    ) -> Any:
        """Run one op on arrays and return its result, or a tuple of them; ``named`` are weights and attributes."""
        spec = OPS[kind]
        slots = {slot.name for slot in spec.weights}
        weights = {name: value for name, value in named.items() if name in slots and value is not None}
        attrs = spec.Attrs(**{name: value for name, value in named.items() if name not in slots})
        rows = inputs[0].shape[0]
        types = [TensorType(("T", *x.shape[1:]), "i32" if x.dtype.kind == "i" else "f32") for x in inputs]
        picked = rows if step is None else len(step.logits_rows)
        sizes = {"T": rows, "R": picked}
        made = tuple(
            self.empty(tuple(sizes[d] if isinstance(d, str) else d for d in kind.shape), kind.dtype)
            for kind in spec.infer(attrs, types)
        )
        self.kernels[kind](Call(attrs, inputs, made, weights, cache or {}, step))
        return made[0] if len(made) == 1 else made


class Device(ABC):
    """One place that holds memory and runs ops. Shared: look it up by name through the manager, never copy it."""

    F: FunctionTable
    allocator: Allocator
    loaders = 1
    """Threads that store weights at the same time."""
    copy_bytes: int | None = None
    """Bytes to move in at a time where the host itself copies, so that several threads can share a copy."""
    fills_host = False
    """Whether it computes with all cores of the host, so that whoever copies meanwhile is in its way."""
    decodes_alone = False
    """Whether it can run several decode steps in one call, by ``greedy_decode``."""
    overlaps = False
    """Whether the host has nothing to do while the device computes, and can prepare the next step."""

    def __init__(self, name: str, memory_limit: int | None = None, threads: int | None = None) -> None:
        self.name = name

    def allocate(self, nbytes: int, label: str) -> Buffer:
        """Device memory, from ``allocator``."""
        return self.allocator.allocate(nbytes, label)

    def deallocate(self, buffer: Buffer) -> None:
        """Give memory back to ``allocator``."""
        self.allocator.deallocate(buffer)

    @abstractmethod
    def view(
        self, buffer: Buffer, offset: int, shape: tuple[int, ...], dtype: str, row_bytes: int | None = None
    ) -> Any:
        """An array over ``buffer`` from byte ``offset``; ``row_bytes`` from row to row, else contiguous."""

    @abstractmethod
    def move_in(self, host: Any, destination: Any) -> None:
        """Copy a numpy array into a device array of the same shape."""

    def copier(self, host: Any, destination: Any) -> Callable[[], None]:
        """A ``move_in`` that is done again and again, with all that the device computes with where that helps."""
        return partial(self.move_in, host, destination)

    @abstractmethod
    def move_out(self, source: Any, out: Any = None) -> Any:
        """A numpy copy of a device array, written to ``out`` where that is given."""

    def move_from(self, device: Device, source: Any, destination: Any) -> None:
        """Copy an array of ``device``, as it is once that has computed what it was asked for, to one of the same shape.

        ``device`` may be asked to write to ``source`` again at once.
        """
        self.move_in(device.host_array(source), destination)

    def copy(self, source: Any, destination: Any) -> None:
        """Copy one of its arrays to another."""
        destination[...] = source

    def move_all_in(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """``move_in`` of (host, destination) pairs, host in ``host_memory``, which can change when it returns."""
        for host, destination in pairs:
            self.move_in(host, destination)

    def move_all_out(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """``move_out`` of (source, out) pairs, out in ``host_memory``."""
        for source, out in pairs:
            self.move_out(source, out)

    def lane(self) -> Lane | None:
        """A lane of its own; None where the host copies, or copying and computing cannot overlap."""
        return None

    def host_array(self, source: Any) -> Any:
        """A device array as a numpy array that holds until the device runs again; its memory, where numpy sees that."""
        return self.move_out(source)

    def host_memory(self, nbytes: int) -> Any:
        """Bytes of host memory, a numpy array, that ``move_in`` and ``move_out`` are fastest with; ``DoesNotFit``."""
        import numpy as np

        try:
            return np.zeros(nbytes, np.uint8)
        except (MemoryError, ValueError):  # the latter beyond what any machine can address
            raise DoesNotFit("host.memory", f"the machine has no {nbytes} bytes for cache blocks") from None

    @abstractmethod
    def parameter(self, buffer: Buffer, offset: int, format: str, shape: tuple[int, ...]) -> Any:
        """The weight at byte ``offset`` of ``buffer``, in the device's own layout: what kernels get as a weight."""

    @abstractmethod
    def store(self, parameter: Any, raw: Any, format: str, shape: tuple[int, ...], index: int | None) -> None:
        """Fill ``parameter`` (or its part ``index`` of a stack) from the stored bytes of a tensor, uint8."""

    def bound_for(self, count: int, limit: int, options: KernelOptions) -> int:
        """For how many tokens or logit rows, at most ``limit``, a program is bound that serves ``count`` of them."""
        return count

    def decodes_for(self, count: int, limit: int) -> int:
        """To how many sequences, at most ``limit``, a decode step of ``count`` is filled up.

        For devices whose programs take long to make and serve one size only: few sizes are then enough.
        """
        return count

    def kinds_of_decode(self, limit: int) -> Sequence[int]:
        """Numbers of sequences, at most ``limit``, such that their decode steps need all kernels that others do."""
        return (1,)

    def kinds_of_prompt(self, limit: int) -> Sequence[int]:
        """Numbers of tokens such that steps with a part of one prompt, of at most ``limit`` tokens, need all kernels
        that theirs do, together with a step of ``limit`` and one token's.
        """
        return ()

    def program(self, calls: Sequence[tuple[Kernel, Call]]) -> Program:
        """One callable that runs ``calls`` in order; a failing kernel is a ``KernelFailure``.

        It serves every step of a size for which ``bound_for`` gives the size of the calls' arrays.
        """
        listed = tuple(calls)

        def run(tokens: int, rows: int) -> None:
            call = listed[0][1]
            try:
                for kernel, call in listed:
                    kernel(call)
            except Exception as error:
                raise KernelFailure(call) from error

        return run

    def greedy_decode(self, calls: Sequence[tuple[Kernel, Call]], logits: Any, steps: Sequence[Step]) -> GreedyRun:
        """What runs decode steps by itself: ``calls`` compute one of them from its arrays ``steps``, to ``logits``."""
        raise NotImplementedError(f"'{self.name}' cannot choose tokens")

    def ready(self, program: Program) -> None:  # noqa: B027  most devices make nothing on the way
        """Make and load what running ``program`` on the present step needs, so that this only launches it."""

    def timed(self, calls: Sequence[tuple[Kernel, Call]]) -> Callable[[], Sequence[float]]:
        """Like ``program``, but the callable returns the seconds that each call took."""
        programs = [self.program([call]) for call in calls]

        def run() -> list[float]:
            seconds = []
            for program in programs:
                start = time.perf_counter()
                program(0, 0)  # runs on arrays of one size
                self.synchronize()
                seconds.append(time.perf_counter() - start)
            return seconds

        return run

    def prepare(  # noqa: B027
        self, steps: Sequence[tuple[Sequence[tuple[Kernel, Call]], int]], progress: Callable[[int, int], None]
    ) -> None:
        """Get ready what the calls of ``steps``, each with its number of sequences, need.

        A device that compiles does it here and tells ``progress`` (done, total).
        """

    @abstractmethod
    def fill(self, buffer: Buffer, byte: int) -> None:
        """Set every byte of ``buffer``."""

    def exchange(self, devices: Sequence[Device]) -> Exchange:
        """What ``devices`` exchange parts through, which are of this one's kind and the ranks of a stage."""
        raise DoesNotFit("device.exchange", f"'{self.name}' exchanges nothing with other devices by itself")

    def sampler(self, rows: int, vocab_size: int, groups: int = 1) -> TokenSampler | None:
        """What chooses the tokens of up to ``rows`` rows of logits on the device, for steps of so many ``groups`` in
        turn; None where only the host can.
        """
        return None

    def reaches(self, device: Device) -> bool:
        """Whether kernels of this device can read the memory of ``device``."""
        return device is self

    def tune(self, formats: Iterable[str]) -> None:  # noqa: B027  most devices have nothing to choose
        """Measure what later plans choose by, for weights in ``formats``, and keep the results on this machine."""

    def synchronize(self) -> None:  # noqa: B027  most devices finish before they return
        """Wait until everything asked of the device is done."""

    def close(self) -> None:  # noqa: B027  most devices hold nothing but memory
        """Give back what the device holds beside its buffers; it cannot run any more."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Bytes free and bytes in all."""

    @property
    @abstractmethod
    def compute_share(self) -> float:
        """The part of the device's compute that is granted here, 0 to 1."""

    @abstractmethod
    def describe(self) -> str:
        """What it is, in a few words."""


def local_name(name: str) -> str:
    """``cuda:1`` for ``cuda:1@alpha``: what a device is called on its own host."""
    return name.partition("@")[0]


def device_kind(name: str) -> str:
    """``reference`` for ``reference:1``; an unknown kind or a bad number is a ``DoesNotFit`` or ``UsageError``.

    ``cuda:0.1`` is a part of ``cuda:0``.
    """
    kind, colon, number = local_name(name).partition(":")
    if kind not in BACKENDS:
        remedy = did_you_mean(kind, BACKENDS) or f"known devices: {', '.join(BACKENDS)}"
        raise DoesNotFit("device.unknown", f"there is no device '{name}'", remedy=remedy)
    if colon and not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,4})?", number):
        raise UsageError("device.name", f"'{name}' should be '{kind}', '{kind}:NUMBER' or '{kind}:NUMBER.PART'")
    return kind


def backend_class(name: str) -> type[Device]:
    """The class that implements the device called ``name``."""
    module, _, attribute = BACKENDS[device_kind(name)].partition(":")
    found: type[Device] = getattr(importlib.import_module(module), attribute)
    return found


def capabilities(name: str) -> Capabilities:
    """What the backend of device ``name`` can do, said by its package so that compiling imports no array library."""
    package = BACKENDS[device_kind(name)].partition(":")[0].rpartition(".")[0]
    found: Capabilities = importlib.import_module(package).CAPABILITIES
    return found


def fingerprint(name: str, threads: int | None) -> dict[str, Any]:
    """What times measured on device ``name`` with so many threads depend on."""
    known = capabilities(name)
    return {"kind": device_kind(name), "machine": known.machine(), "threads": threads, "kernels": known.kernels()}
