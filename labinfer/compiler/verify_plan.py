"""Checks a plan from its text alone, sharing nothing with the planner: what a hand edit may have broken.

Every value must be made before it is read, have the type its op gives it, and lie where no value that is still needed
lies, except for the windows and in-place results that ops declare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import prod

from labinfer.compiler.fold import (
    GRAPH_INPUTS,
    Slot,
    natural_row,
    steps,
    unfold_inputs,
    unfold_ops,
    unfold_states,
    unfold_weights,
)
from labinfer.compiler.graph import LORA_A, LORA_B, Op, State
from labinfer.compiler.passes.fuse import matches
from labinfer.compiler.plan import Limits, Plan, Stage
from labinfer.compiler.verify_ranks import verify_ranks
from labinfer.errors import ErrorSink, InvalidFile, LabinferError, Place, did_you_mean
from labinfer.ops import OPS
from labinfer.ops.base import ShapeMismatch, TensorType, dim
from labinfer.ops.fusions import BY_KIND, inplace_of, is_view


def verify_plan(plan: Plan, name: str) -> None:
    """Raise everything that is wrong with ``plan`` as ``InvalidFile``; ``name`` is the file named in errors."""
    sink = ErrorSink()

    def complain(code: str, message: str, remedy: str | None = None) -> None:
        sink.add(InvalidFile(code, message, place=Place(name), remedy=remedy))

    arrived: dict[str, TensorType] = {}
    try:
        check = _PlanCheck(plan)
        for code, message in (*check.weight_lines(), *check.state_lines(), *verify_ranks(plan)):
            complain(code, message)
        before: dict[str, TensorType] = {}
        for number, stage in enumerate(plan.stages):
            if stage.device not in plan.devices:
                remedy = did_you_mean(stage.device, plan.devices)
                complain(
                    "plan.unknown-device", f"stage {number} runs on '{stage.device}', which is not a device", remedy
                )
                continue
            received = arrived if stage.rank == 0 else dict(before)  # ranks of a stage receive the same
            before = dict(arrived) if stage.rank == 0 else before
            for code, message in check.stage(stage, received):
                complain(code, f"stage {number} ({stage.device}): {message}")
        for code, message in check.whole(arrived):
            complain(code, message)
    except LabinferError as error:
        complain(error.code, error.message, error.remedy)
    sink.check()


@dataclass(frozen=True, slots=True)
class _Rows:
    """The bytes a value occupies: ``rows`` runs of ``width`` bytes, ``pitch`` apart, from ``at`` on."""

    at: int
    width: int
    pitch: int
    rows: int

    @property
    def end(self) -> int:
        return self.at + (self.rows - 1) * self.pitch + self.width

    def overlaps(self, other: _Rows) -> bool:
        if self.at >= other.end or other.at >= self.end:
            return False
        if self.pitch != other.pitch:
            return True
        step = (other.at - self.at) % self.pitch  # equal pitches: the rows interleave, compare columns
        return step < self.width or step + other.width > self.pitch


def _rows(slot: Slot, limits: Limits) -> _Rows:
    first = slot.type.shape[0] if slot.type.shape else 1
    count = dim(first, limits.max_num_batched_tokens, limits.max_logits_rows)
    return _Rows(slot.at, natural_row(slot.type), slot.row_bytes, count)


class _PlanCheck:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.weights, self.states = unfold_weights(plan), unfold_states(plan)
        self.complaints: list[tuple[str, str]] = []

    def weight_lines(self) -> list[tuple[str, str]]:
        """Complaints about the plan's weights: stacks and regrouped rows must fit the shapes."""
        found = []
        for line in self.plan.weights:
            each = line.shape[1:] if line.adapter else line.shape
            rows = each[0] if each and line.stack is None else None
            if line.part is not None and line.part.axis == 0 and line.stack is None:
                rows = line.part.size
            if line.stack is not None and (len(line.shape) < 2 or line.stack != line.shape[0]):
                found.append(("plan.weight", f"'{line.name}' stacks {line.stack} tensors into shape {line.shape}"))
            if (line.rows or line.order) and (
                prod(line.rows) != rows or sorted(line.order) != list(range(len(line.rows)))
            ):
                message = f"'{line.name}' regroups rows {line.rows} in order {line.order}, its shape is {line.shape}"
                found.append(("plan.weight", message))
        return found

    def state_lines(self) -> list[tuple[str, str]]:
        """Complaints about the cache: every state must be in a group, and groups follow one another by window."""
        groups = self.plan.limits.groups
        found = [
            ("plan.state", f"'{line.name}' is in cache group {line.group}, there are {len(groups)}")
            for line in self.plan.states
            if line.group >= len(groups)
        ]
        for number in range(1, len(groups)):
            if all(line.group != number for line in self.plan.states):
                found.append(("plan.groups", f"nothing is in cache group {number}"))
        for group in groups:
            if group.num_blocks * self.plan.limits.block_size >= 1 << 31:
                found.append(("plan.groups", f"{group.num_blocks} blocks are more than int32 slots can number"))
        for one, other in pairwise(group.window for group in groups):
            if other is None or (one is not None and other >= one):
                found.append(("plan.groups", f"cache groups go from all to the narrowest window, not {one} to {other}"))
        return found

    def whole(self, arrived: Mapping[str, TensorType]) -> list[tuple[str, str]]:
        """Complaints about all stages together: what comes out in the end, and what each device must hold."""
        found = []
        logits = TensorType(("R", self.plan.vocab_size))
        last = self.plan.stages[-1].outputs[-1:] if self.plan.stages else []
        if not last or arrived.get(last[0]) not in (logits, None):
            found.append(("plan.outputs", f"the last output of the last stage must be the logits, {logits}"))
        for name, device in self.plan.devices.items():
            needed = sum(stage.bytes.total for stage in self.plan.stages if stage.device == name)
            if device.memory is not None and needed > device.memory:
                found.append(("plan.memory", f"'{name}' has {device.memory} bytes, its stages need {needed}"))
        placement = self.plan.placement
        if placement is not None:
            named = [stage.device for stage in placement.stages]
            if named != [stage.device for stage in self.plan.stages]:
                found.append(("plan.placement", f"the placement is of stages on {', '.join(named) or 'nothing'}"))
            for name in placement.reasons.keys() - placement.origins.keys():
                found.append(("plan.placement", f"the placement does not say how the times of '{name}' are known"))
        return found

    def stage(self, stage: Stage, arrived: dict[str, TensorType]) -> list[tuple[str, str]]:
        """Complaints about ``stage``; ``arrived`` are the values made by earlier stages, extended by this one's."""
        self.complaints = []
        slots = self.receive(stage, arrived)
        ops: list[Op] = []
        running: list[Op] = []
        for op, made in unfold_ops(stage):
            ops.extend(op.primitives())
            running.extend(steps(op, made))
            if op.body:
                self.fused(op, whole=running[-1] is op, stage=stage)
            for name, slot in made.items():
                if name in slots or name in GRAPH_INPUTS:
                    self.complain("plan.value", f"'{name}' is made twice")
                slots[name] = slot
        self.residency(stage, running)
        if self.follow_types(ops, slots, stage) and self.all_placed(running, slots, stage):
            self.memory(running, {name: slot for name, slot in slots.items() if slot.placed}, stage)
            self.sizes(ops, stage)
            arrived.update({name: slots[name].type for name in stage.outputs})
        return self.complaints

    def residency(self, stage: Stage, ops: list[Op]) -> None:
        """Streamed layers must be run once each, in order, and need a window with room for two at least."""
        if not stage.streamed:
            if stage.bytes.window or stage.bytes.host:
                self.complain(
                    "plan.residency", "there is a window or host memory for weights, and no layer is streamed"
                )
            return
        runs = [layer for layer, _ in groupby(op.layer for op in ops) if layer in set(stage.streamed)]
        if runs != stage.streamed:
            self.complain("plan.residency", f"layers {stage.streamed} are streamed, the schedule runs {runs} of them")
        if not stage.bytes.window or stage.bytes.window % 128:
            message = f"a window of {stage.bytes.window} bytes is not two slots of whole cache lines"
            self.complain("plan.residency", message)

    def complain(self, code: str, message: str) -> None:
        self.complaints.append((code, message))

    def receive(self, stage: Stage, arrived: Mapping[str, TensorType]) -> dict[str, Slot]:
        """Slots of the values that the stage receives, which an earlier one must send as they are."""
        slots = unfold_inputs(stage)
        for name, slot in slots.items():
            if name not in arrived:
                self.complain("plan.value", f"receives '{name}', which no earlier stage sends")
            elif arrived[name] != slot.type:
                self.complain("plan.type", f"receives '{name}' as {slot.type}, it is {arrived[name]}")
        return slots

    def follow_types(self, ops: list[Op], slots: Mapping[str, Slot], stage: Stage) -> bool:
        """Whether every op has its inputs, weights, state and output types right."""
        before = len(self.complaints)
        known = {"token_ids": TensorType(("T",), "i32"), "positions": TensorType(("T",), "i32")}
        known.update({name: slots[name].type for name in stage.inputs})
        for op in ops:
            spec = OPS[op.kind]
            missing = [name for name in op.inputs if name not in known]
            if missing:
                self.complain("plan.value", f"'{op.name}' reads '{missing[0]}', which is not made before it")
                return False
            inputs = [known[name] for name in op.inputs]
            if not len(spec.inputs) - spec.optional_inputs <= len(inputs) <= len(spec.inputs):
                self.complain("plan.value", f"'{op.name}' takes {', '.join(spec.inputs)}, 'in' has {len(inputs)}")
                return False
            try:
                types = spec.infer(op.attrs, inputs)
                self.operands(op, inputs)
            except (ShapeMismatch, ValueError, IndexError) as mismatch:
                self.complain("plan.type", f"'{op.name}': {mismatch}")
                return False
            if [slots[name].type for name in op.outputs] != types:
                self.complain("plan.type", f"'{op.name}' makes {', '.join(map(str, types))}, the plan says otherwise")
                return False
            known.update(zip(op.outputs, types, strict=True))
        for name in stage.outputs:
            if name not in slots:
                self.complain("plan.value", f"sends '{name}', which it does not make")
        return len(self.complaints) == before

    def operands(self, op: Op, inputs: list[TensorType]) -> None:
        """An op has the weights and the state that its kind asks for, of the right shapes."""
        spec = OPS[op.kind]
        shapes = spec.weight_shapes(op.attrs, inputs)
        for slot in spec.weights:
            if not slot.optional and slot.name not in op.weights:
                self.complain("plan.weight", f"'{op.name}' lacks its weight '{slot.name}'")
        for name, weight in op.weights.items():
            if weight not in self.weights:
                self.complain("plan.weight", f"'{op.name}' uses weight '{weight}' ({name}), which is not in the plan")
            elif self.weights[weight].adapter != spec.inserted:
                self.complain("plan.weight", f"'{op.name}' uses '{weight}': pools of adapters are for 'lora_add' alone")
            elif shapes.get(name) != self.weights[weight].shape:
                needs = f"needs {list(shapes[name])} as" if name in shapes else "takes no"
                shape = list(self.weights[weight].shape)
                self.complain("plan.weight", f"'{op.name}' {needs} '{name}'; '{weight}' is {shape}")
        if op.kind == "lora_add":
            self.pools(op)
        state = self.states.get(op.state or "")
        if (spec.state and state is None) or (op.state and not spec.state):
            self.complain("plan.state", f"'{op.name}' uses state '{op.state}', which is not in the plan or not its own")
        elif state and not self.keeps_enough(op, state):
            window = self.plan.limits.groups[state.group].window
            self.complain("plan.groups", f"'{op.name}' sees more than the {window} tokens that its cache group keeps")
        elif state and (widths := spec.state_widths(op.attrs, inputs)) != state.widths:
            self.complain(
                "plan.state", f"'{op.name}' takes '{op.state}' to have widths {widths}, it has {state.widths}"
            )

    def keeps_enough(self, op: Op, state: State) -> bool:
        """Whether the group of ``state`` keeps all tokens that ``op`` sees; one that only writes sees none."""
        groups = self.plan.limits.groups
        kept = groups[state.group].window if state.group < len(groups) else None
        seen = getattr(op.attrs, "window", None)
        return kept is None or not op.outputs or (seen is not None and seen <= kept)

    def pools(self, op: Op) -> None:
        """The pools of a ``lora_add`` are both of one module, and have the room that the limits say."""
        limits, attrs = self.plan.limits, op.attrs.model_dump()
        if (attrs["max_loras"], attrs["rank"]) != (limits.max_loras, limits.max_lora_rank):
            self.complain("plan.lora", f"'{op.name}' has room for other adapters than the limits say")
        a, b = (self.weights.get(op.weights.get(slot, "")) for slot in "ab")
        named = a and b and a.tensor.endswith(LORA_A) and b.tensor == a.tensor.removesuffix(LORA_A) + LORA_B
        if a and b and not (named and a.format == b.format == "f32"):
            self.complain("plan.lora", f"'{op.name}' does not use both pools of one module")

    def fused(self, op: Op, whole: bool, stage: Stage) -> None:
        """A fused op is made of the parts that are declared for it, and its device can run it whole if it is to."""
        fusion = BY_KIND.get(op.kind)
        made = {name for part in op.body for name in part.outputs}
        inputs = dict.fromkeys(name for part in op.body for name in part.inputs if name not in made)
        if fusion is None or not matches(fusion, op.body) or op.inputs != tuple(inputs):
            self.complain("plan.fused", f"'{op.name}' is not a '{op.kind}' of what its body says")
        elif whole and op.kind not in self.plan.devices[stage.device].fusions:
            self.complain("plan.fused", f"'{stage.device}' cannot run '{op.name}' whole: its values need places")

    def all_placed(self, ops: list[Op], slots: Mapping[str, Slot], stage: Stage) -> bool:
        """Whether everything that the ops read and write has a place in the arena."""
        before = len(self.complaints)
        used = dict.fromkeys(name for op in ops for name in (*op.inputs, *op.outputs))
        for name in (*used, *stage.inputs, *stage.outputs):
            if name in slots and not slots[name].placed:
                self.complain("plan.value", f"'{name}' has no place in the arena")
        return len(self.complaints) == before

    def memory(self, ops: list[Op], slots: Mapping[str, Slot], stage: Stage) -> None:
        """No value, and no kernel's scratch memory, may lie over a value that is still needed."""
        rows = {name: _rows(slot, self.plan.limits) for name, slot in slots.items()}
        scratch = {f"{op.name}#": op.workspace for op in ops if op.workspace}
        rows.update({name: _Rows(at, size, size, 1) for name, (at, size) in scratch.items()})
        for name, place in rows.items():
            if place.at % 4 or place.pitch % 4:
                self.complain("plan.arena-bounds", f"'{name}' does not lie on a multiple of 4 bytes")
            if place.end > stage.arena.size or place.pitch < place.width:
                self.complain(
                    "plan.arena-bounds", f"'{name}' reaches byte {place.end} of an arena of {stage.arena.size}"
                )
        last = {name: index for index, op in enumerate(ops) for name in (*op.outputs, *op.inputs)}
        last.update(dict.fromkeys(stage.outputs, len(ops)))
        base = self.windows(ops, slots)
        live = dict.fromkeys(stage.inputs)
        for index, op in enumerate(ops):
            over = self.overwritten(op, slots)
            for name in (*op.outputs, f"{op.name}#") if op.workspace else op.outputs:
                for other in live:
                    shared = base.get(name, name) == base.get(other, other)
                    legal = shared or ((name, other) in over and last[other] == index)
                    if not legal and last.get(other, -1) >= index and rows[name].overlaps(rows[other]):
                        self.complain("plan.arena-overlap", f"'{name}' lies over '{other}', which is still needed")
                live[name] = None
            live = {name: None for name in live if last.get(name, -1) > index}

    def windows(self, ops: list[Op], slots: Mapping[str, Slot]) -> dict[str, str]:
        """The value that each window is a window of; a window at the wrong column is complained of."""
        base: dict[str, str] = {}
        for op in ops:
            column = 0
            for name in op.outputs if is_view(op.kind) else ():
                of, own = slots[op.inputs[0]], slots[name]
                base[name] = base.get(op.inputs[0], op.inputs[0])
                if own.row_bytes != of.row_bytes or own.at != of.at + column:
                    self.complain(
                        "plan.window", f"'{name}' is not the window of '{op.inputs[0]}' that '{op.kind}' makes"
                    )
                column += natural_row(own.type)
        return base

    def overwritten(self, op: Op, slots: Mapping[str, Slot]) -> set[tuple[str, str]]:
        """Pairs (output, input) at one place, where the op is declared to work in place."""
        return {
            (name, op.inputs[operand])
            for position, name in enumerate(op.outputs)
            for operand in inplace_of(op.kind).get(position, ())
            if operand < len(op.inputs) and slots.get(op.inputs[operand]) == slots[name]
        }

    def sizes(self, ops: list[Op], stage: Stage) -> None:
        """The stage's byte figures must be what its states and arena add up to (its device checks the weights)."""
        limits = self.plan.limits
        states = [self.states[name] for name in dict.fromkeys(op.state for op in ops if op.state)]
        if any(state.group >= len(limits.groups) for state in states):
            return
        size = limits.cache_bytes_per_number * limits.block_size
        groups = [limits.groups[state.group] for state in states]
        cache, swap = (
            sum(size * count * state.width for count, state in zip(counts, states, strict=True))
            for counts in ([group.num_blocks for group in groups], [group.swap_blocks for group in groups])
        )
        for kind, stated, found in (
            ("kv_cache", stage.bytes.kv_cache, cache),
            ("swap", stage.bytes.swap, swap),
            ("arena", stage.bytes.arena, stage.arena.size),
            ("step", stage.bytes.step, limits.step_bytes),
        ):
            if stated != found:
                self.complain("plan.bytes", f"{kind} takes {found} bytes, the plan says {stated}")
