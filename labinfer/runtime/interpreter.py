"""The interpreter: binds a stage of a plan to a device as a flat tape of kernel calls, and runs the tape.

A tape is made once and kept for all steps of the sizes that its device lets it serve; a step is one loop over it.
Listeners attach to values by name and switch to a second, slower loop; they cost nothing when there are none.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from labinfer.backends.base import Buffer, Device, Kernel, KernelFailure, Program
from labinfer.backends.exchange import RankPeers
from labinfer.backends.sampling import GreedyRun
from labinfer.compiler.fold import GRAPH_INPUTS, Slot, steps, unfold_inputs, unfold_ops
from labinfer.compiler.graph import Op
from labinfer.compiler.plan import Limits, Stage
from labinfer.errors import DoesNotFit, LabinferError, UsageError, did_you_mean
from labinfer.ops.base import DEFAULT_OPTIONS, Call, Dim, KernelOptions, dim
from labinfer.ops.fusions import is_view
from labinfer.runtime.kv_cache import KVCache
from labinfer.runtime.poison import Poison
from labinfer.runtime.step_memory import StepBatch, StepMemory, filled_up, is_decode
from labinfer.runtime.streamed_window import StreamedWindow

MAX_TAPES = 64

Listener = Callable[[int, Op, Call], None]
"""Called after an op has run with its index, the op and its arrays; may change the outputs in place."""


@dataclass(slots=True)
class Bound:
    """An op with its arrays. A window has no ``kernel``; ``program`` runs the op alone, once it has been asked for."""

    op: Op
    kernel: Kernel | None
    call: Call
    program: Program | None = None


@dataclass(slots=True)
class Tape:
    """A stage bound for at most so many tokens and rows: ``program`` is all that a step runs, ``pieces`` of it are the
    device's own. ``greedy`` runs several decode steps, once it has been asked for.
    """

    program: Program
    pieces: Sequence[Program]
    bound: tuple[Bound, ...]
    values: Mapping[str, Any]
    greedy: GreedyRun | None = None


def kernel_of(device: Device, op: Op) -> Kernel:
    """The kernel that runs ``op`` on ``device``; ``DoesNotFit`` when it has none."""
    kernel = device.F.kernels.get(op.kind)
    if kernel is None:
        message = f"device '{device.name}' has no kernel for op '{op.kind}', which '{op.name}' (from {op.origin}) needs"
        raise DoesNotFit("device.no-kernel", message, remedy="compile for a device that has one: --devices reference")
    return kernel


def check_kernels(stage: Stage, device: Device) -> None:
    """Raise ``DoesNotFit`` unless ``device`` has a kernel for each op of ``stage``; asked before weights are loaded."""
    for op, made in unfold_ops(stage):
        for step in steps(op, made):
            if not is_view(step.kind):
                kernel_of(device, step)


def calls_of(bound: Iterable[Bound]) -> list[tuple[Kernel, Call]]:
    """What runs of ``bound``: all but windows."""
    return [(each.kernel, each.call) for each in bound if each.kernel is not None]


class Interpreter:
    """Runs one stage on one device. ``parameters`` are the stage's weights as device arrays, by name."""

    def __init__(
        self,
        stage: Stage,
        device: Device,
        limits: Limits,
        parameters: Mapping[str, Any],
        cache: KVCache,
        options: KernelOptions = DEFAULT_OPTIONS,
        streamed: StreamedWindow | None = None,
        peers: RankPeers | None = None,
    ) -> None:
        self.stage, self.device, self.limits = stage, device, limits
        self.parameters, self.cache, self.options, self.streamed = parameters, cache, options, streamed
        self.peers = peers
        self.ops: list[Op] = []
        self.slots: dict[str, Slot] = unfold_inputs(stage)
        self.inner: dict[str, Slot] = {}
        self.inner_memory: Buffer | None = None
        for op, made in unfold_ops(stage):
            self.ops.extend(steps(op, made))
            for name, slot in made.items():
                (self.slots if slot.placed else self.inner)[name] = slot
        self.max_decodes = min(limits.max_chosen, limits.max_num_batched_tokens)
        self.step_memory = StepMemory(device, limits)
        try:
            self.arena = device.allocate(stage.arena.size, "arena")
        except BaseException:
            self.step_memory.close()
            raise
        self.reuses_tapes = os.environ.get("LABINFER_TAPE_REUSE") != "0"
        self.tapes: OrderedDict[tuple[int, int], Tape] = OrderedDict()
        self.bounds: dict[tuple[int, int], int] = {}  # what the device has said of a count and its limit
        self.output_rows = [(name, self.rows_symbol(name)) for name in stage.outputs]
        self.listeners: list[Listener] = []
        self.poison()

    def run(self, batch: StepBatch, received: Mapping[str, tuple[Device, Any]]) -> dict[str, Any]:
        """Run ``batch`` on ``received`` (the stage's inputs, with the devices whose arrays they are); the stage's
        outputs as device arrays.

        The outputs are windows of the arena: they hold until the next step.
        """
        tokens, rows = len(batch.token_ids), len(batch.logits_rows)
        tape = self.prepare(batch)
        for name, (device, array) in received.items():
            self.device.move_from(device, array, tape.values[name][: len(array)])
        return self.execute(tape, tokens, rows)

    def greedy(self, batch: StepBatch) -> GreedyRun:
        """What runs a decode step and those after it; tables of blocks in ``batch`` have room for all of them."""
        tape = self.prepare(batch)
        if tape.greedy is None:
            logits = tape.values[self.stage.outputs[-1]]
            tape.greedy = self.device.greedy_decode(calls_of(tape.bound), logits, self.step_memory.steps)
        return tape.greedy

    def execute(self, tape: Tape, tokens: int, rows: int) -> dict[str, Any]:
        """Run a prepared tape whose received values are in place; see ``run``."""
        self.compute(tape, tokens, rows)
        return {name: tape.values[name][: dim(symbol, tokens, rows)] for name, symbol in self.output_rows}

    def compute(self, tape: Tape, tokens: int, rows: int) -> None:
        """``execute`` for whoever knows already where the outputs are."""
        try:
            if self.peers is None:
                self.run_tape(tape, tokens, rows)
            else:
                self.get_ready(tape)
                with self.peers.together():
                    self.run_tape(tape, tokens, rows)
                self.peers.check()
        except KernelFailure as failure:
            self.leave()
            error, op = failure.__cause__, next(each.op for each in tape.bound if each.call is failure.call)
            if isinstance(error, LabinferError):
                raise error from None
            message = f"while running '{op.name}' ({op.kind}, from {op.origin}): {type(error).__name__}: {error}"
            raise LabinferError("run.op-failed", message) from error
        except BaseException:
            self.leave()
            raise
        finally:
            if self.streamed is not None:
                self.streamed.end()

    def leave(self) -> None:
        """Let the other ranks of the stage know that this one computes no more."""
        if self.peers is not None:
            self.peers.leave()

    def get_ready(self, tape: Tape) -> None:
        """Have the device make and load what the tape needs, or each of its ops where somebody listens."""
        alone = (self.program_of(bound) for bound in tape.bound if bound.kernel is not None)
        for program in alone if self.listeners else tape.pieces:
            self.device.ready(program)

    def run_tape(self, tape: Tape, tokens: int, rows: int) -> None:
        """All ops, seen by the listeners if there are any."""
        if self.listeners:
            self.run_listened(tape, tokens, rows)
        else:
            tape.program(tokens, rows)

    def program_of(self, bound: Bound) -> Program:
        """What runs one op alone."""
        if bound.program is None:
            bound.program = self.device.program(calls_of([bound]))
        return bound.program

    def run_listened(self, tape: Tape, tokens: int, rows: int) -> None:
        """The slow loop: each op's kernel, if it has one, then every listener."""
        for index, bound in enumerate(tape.bound):
            if self.streamed is not None:
                self.streamed.reach(bound.op.layer)
            if bound.kernel is not None:
                self.program_of(bound)(tokens, rows)
            for listener in self.listeners:
                listener(index, bound.op, bound.call)

    def prepare(self, batch: StepBatch) -> Tape:
        """The tape for a batch of this size, with its arrays in place."""
        try:
            return self.tape_for(batch)
        except BaseException:
            self.leave()
            raise

    def tape_for(self, batch: StepBatch) -> Tape:
        """See ``prepare``."""
        reuses = self.reuses_tapes and not self.listeners  # which see arrays of just this size
        if reuses and is_decode(batch) and not self.stage.inputs:  # values come for the batch's own rows only
            batch = filled_up(batch, self.device.decodes_for(len(batch.token_ids), self.max_decodes))
        self.step_memory.load(batch)
        size = len(batch.token_ids), len(batch.logits_rows)
        if reuses:
            size = self.bound_for(*size)
        tape = self.tapes.get(size)
        if tape is None:
            tape = self.tapes[size] = self.bind(*size)
            if len(self.tapes) > MAX_TAPES:
                self.tapes.popitem(last=False)
        self.tapes.move_to_end(size)
        return tape

    def bound_for(self, tokens: int, rows: int) -> tuple[int, int]:
        """The size of the tape that serves steps of ``tokens`` tokens and ``rows`` logit rows."""
        limits = self.limits
        return self.most(tokens, limits.max_num_batched_tokens), self.most(rows, limits.max_logits_rows)

    def most(self, count: int, limit: int) -> int:
        """The most tokens or rows, within ``limit``, that run alike with ``count``; the device is asked once."""
        if (count, limit) not in self.bounds:
            self.bounds[count, limit] = self.device.bound_for(count, limit, self.options)
        return self.bounds[count, limit]

    def warm(self, compiling: Callable[[int, int], None]) -> None:
        """Get the kernels of steps ready, of decodes, of prompts and of both, and bind the tape of a lone decode."""
        device, limits = self.device, self.limits
        decodes = device.kinds_of_decode(self.max_decodes)
        steps = [(self.calls(n, n), n) for n in decodes]
        steps += [(self.calls(n, 1), 1) for n in device.kinds_of_prompt(limits.max_num_batched_tokens)]
        largest = self.calls(limits.max_num_batched_tokens, limits.max_logits_rows)
        device.prepare([*steps, *((largest, n) for n in decodes)], compiling)
        size = self.bound_for(1, 1)
        self.tapes[size] = self.bind(*size)

    def calls(self, tokens: int, rows: int) -> list[tuple[Kernel, Call]]:
        """What runs for ``tokens`` tokens and ``rows`` rows of logits."""
        return calls_of(self.resolve(tokens, rows)[0])

    def bind(self, tokens: int, rows: int) -> Tape:
        """The tape for steps of ``tokens`` tokens and ``rows`` logit rows, and what else its device lets it serve."""
        bound, values = self.resolve(tokens, rows)
        if self.streamed is not None:
            return Tape(*self.in_pieces(bound, self.streamed), bound, values)
        program = self.device.program(calls_of(bound))
        return Tape(program, [program], bound, values)

    def in_pieces(self, bound: Sequence[Bound], streamed: StreamedWindow) -> tuple[Program, Sequence[Program]]:
        """One program for each streamed layer, run once that has arrived, and for what lies between two of them; and
        what runs all of these.
        """
        places = streamed.places
        layers = groupby(bound, key=lambda each: each.op.layer if each.op.layer in places else None)
        runs = [(layer, calls_of(run)) for layer, run in layers]
        programs = [(layer, self.device.program(calls)) for layer, calls in runs if calls]

        def run(*size: int) -> None:
            for layer, program in programs:
                streamed.reach(layer)
                program(*size)

        return run, [program for _, program in programs]

    def resolve(self, tokens: int, rows: int) -> tuple[tuple[Bound, ...], dict[str, Any]]:
        """Every op with its kernel and arrays, and every value's array."""
        values = {name: self.step_memory.arrays[name][:tokens] for name in GRAPH_INPUTS}
        for name, slot in self.slots.items():
            shape = tuple(dim(size, tokens, rows) for size in slot.type.shape)
            values[name] = self.device.view(self.arena, slot.at, shape, slot.type.dtype, slot.row_bytes)
        values.update(self.inner_values(tokens, rows))
        bound = []
        for op in self.running():
            kernel = None if is_view(op.kind) else kernel_of(self.device, op)
            bound.append(Bound(op, kernel, self.call(op, values)))
        return tuple(bound), values

    def poison(self) -> None:
        """With ``LABINFER_POISON=1``, fill dead memory with NaN after each op that runs."""
        self.listeners = [each for each in self.listeners if not isinstance(each, Poison)]
        if os.environ.get("LABINFER_POISON") == "1":
            dead = Poison(self.running(), self.slots, self.stage, self.limits, self.device, self.arena)
            self.listeners.insert(0, dead)

    def running(self) -> list[Op]:
        """The ops as they run: while fused ones are taken apart, their parts, with the scratch memory of the whole."""
        if self.inner_memory is None:
            return self.ops
        return [replace(part, workspace=op.workspace) for op in self.ops for part in op.primitives()]

    def inner_values(self, tokens: int, rows: int) -> dict[str, Any]:
        """Arrays for the values inside fused ops, while these are taken apart."""
        values: dict[str, Any] = {}
        memory, offset = self.inner_memory, 0
        if memory is None:
            return values
        for name, slot in self.inner.items():
            shape = tuple(dim(size, tokens, rows) for size in slot.type.shape)
            values[name] = self.device.view(memory, offset, shape, slot.type.dtype)
            offset += self.inner_bytes(slot)
        return values

    def inner_bytes(self, slot: Slot) -> int:
        """Bytes of a value at the plan's bounds, in whole cache lines."""
        size = slot.type.nbytes(self.limits.max_num_batched_tokens, self.limits.max_logits_rows)
        return -(-size // 64) * 64

    def take_apart(self) -> None:
        """Run fused ops part by part, with memory beside the plan's for what is otherwise only inside them."""
        if self.inner_memory is None:
            size = sum(self.inner_bytes(slot) for slot in self.inner.values())
            self.inner_memory = self.device.allocate(size, "values inside fused ops")
            self.tapes.clear()
            self.poison()

    def put_together(self) -> None:
        """Run fused ops whole again, as planned."""
        if self.inner_memory is not None:
            self.tapes.clear()
            self.device.deallocate(self.inner_memory)
            self.inner_memory = None
            self.poison()

    def call(self, op: Op, values: Mapping[str, Any]) -> Call:
        """``op`` with its arrays."""
        memory = op.workspace and self.device.view(self.arena, op.workspace[0], (op.workspace[1] // 4,), "i32")
        return Call(
            op.attrs,
            tuple(values.get(name) for name in op.inputs),
            tuple(values.get(name) for name in op.outputs),
            {slot: self.parameters[name] for slot, name in op.weights.items()},
            self.cache.parts[op.state] if op.state else {},
            self.step_memory.steps[self.cache.group_of.get(op.state or "", 0)],
            memory,
            tuple(self.call(part, values) for part in op.body),
            self.options,
            self.rows_symbol((op.outputs or op.inputs)[0]),
            self.peers,
        )

    def rows_symbol(self, value: str) -> Dim:
        """What the first dimension of a value stands for."""
        slot = self.slots.get(value) or self.inner[value]
        return slot.type.shape[0]

    def listen(self, value: str, callback: Callable[[Any], Any]) -> Listener:
        """Call ``callback(array)`` whenever ``value`` is made; what it returns, unless None, replaces the value.

        Returns the listener, for ``unlisten``. An unknown name is a ``UsageError``. A value that lives only inside a
        fused op makes all fused ops of the stage run in parts while somebody listens.
        """
        if value in self.inner:
            self.take_apart()
        elif value not in self.slots:
            raise UsageError(
                "run.unknown-value", f"there is no value '{value}'", remedy=did_you_mean(value, self.slots)
            )

        def listener(_: int, op: Op, call: Call) -> None:
            if value in op.outputs:
                array = call.outputs[op.outputs.index(value)]
                changed = callback(self.device.move_out(array))
                if changed is None:
                    return
                try:
                    self.device.move_in(changed, array)
                except (TypeError, ValueError) as error:
                    raise UsageError(
                        "run.edit", f"'{value}' cannot be replaced by what was returned: {error}"
                    ) from None

        self.listeners.append(listener)
        return listener

    def listen_along(self) -> Listener:
        """Run as the ranks beside this one do that somebody listens to: one op at a time, and for just as many rows."""
        self.listeners.append(lambda index, op, call: None)
        return self.listeners[-1]

    def unlisten(self, listener: Listener) -> None:
        """Forget a listener; without any, the fast path is back."""
        self.listeners.remove(listener)
        if all(isinstance(each, Poison) for each in self.listeners):
            self.put_together()

    def close(self) -> None:
        """Give the arena back, once nothing uses it: where a rank has failed, others may still be at work."""
        self.device.synchronize()
        self.put_together()
        self.tapes.clear()
        self.device.deallocate(self.arena)
        self.step_memory.close()
