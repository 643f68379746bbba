"""Logical weights of a map matched with the tensors of a checkpoint, by name and shape, without loading any."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal

from labinfer.compiler.blueprint import Blueprint, Regroup, WeightEntry
from labinfer.compiler.expressions import Scope, parse_expression
from labinfer.compiler.graph import Transform, Weight
from labinfer.compiler.settings import ModelSource, as_list
from labinfer.errors import ErrorSink, InvalidFile, Place, WeightsError, did_you_mean

MAX_STACK = 4096
MAX_ELEMENTS = 1 << 48


@dataclass(frozen=True, slots=True)
class User:
    """Who asks for a weight: the repeat it stands in (``group``, ``layer``) and the values it sees."""

    group: str | None
    layer: int | None
    scope: Scope


def evaluate(entry: WeightEntry, key: str, text: Any, scope: Scope) -> Any:
    """The value of the expression under ``key`` of a weight entry."""
    return parse_expression(text, entry.place(key)).evaluate(scope) if isinstance(text, str) else text


class WeightTable:
    """Resolves weight names as ops ask for them into ``weights``; ``check_unused`` tells what is left over."""

    def __init__(self, blueprint: Blueprint, source: ModelSource, sink: ErrorSink) -> None:
        self.blueprint, self.source, self.sink = blueprint, source, sink
        self.groups = blueprint.weights
        self.weights: dict[str, Weight] = {}
        self.modules: dict[str, Weight] = {}
        self.used: set[str] = set()

    def resolve(self, name: str, shape: tuple[int, ...], place: Place | None, user: User) -> str | None:
        """The full name of weight ``name`` as a line of ``user`` means it, or None when this model has no such weight.

        Missing tensors and wrong shapes go to the sink, so that one run shows them all.
        """
        owner = user.group if user.group and name in self.groups.get(user.group, {}) else "model"
        entry = self.groups.get(owner, {}).get(name)
        if entry is None:
            remedy = did_you_mean(name, {*self.groups.get("model", {}), *self.groups.get(user.group or "", {})})
            raise InvalidFile("map.unknown-weight", f"there is no weight '{name}' here", place=place, remedy=remedy)
        if not evaluate(entry, "when", entry.when, user.scope):
            return None
        full = f"{owner}.{user.layer}.{name}" if owner != "model" else name
        if full in self.weights:
            self.check_same_shape(full, shape, place)
            return full
        candidates = self.candidates(entry, owner, user, self.source.kind)
        found = self.find(candidates, entry)
        if entry.tie and self.is_tied(entry, found, user.scope):
            self.used.update(found.tensors() if found else ())
            return self.resolve(entry.tie, shape, place, user)
        if found is None:
            if entry.optional:
                return None
            self.sink.add(self.missing(full, entry, candidates))
            return full
        self.weights[full] = self.checked(replace(found, name=full, shape=shape), entry, place, user.scope)
        if module := self.module(self.weights[full], entry, owner, user):
            self.modules[full] = module
        return full

    def module(self, weight: Weight, entry: WeightEntry, owner: str, user: User) -> Weight | None:
        """``weight`` as the Hugging Face model holds it; None for a stack, and where the map names no such tensor."""
        if self.source.kind == "gguf":
            names = self.candidates(entry, owner, user, "hf")
            if not names:
                return None
            fix = self.transform(entry.hf_fix, user.scope) if entry.hf_fix else Transform()
            weight = replace(names[0], name=weight.name, shape=weight.shape, transform=fix)
        return weight if weight.stack is None else None

    def check_same_shape(self, full: str, shape: tuple[int, ...], place: Place | None) -> None:
        """A weight that is used twice must be used alike."""
        if self.weights[full].shape != shape:
            message = f"weight '{full}' is used as {list(shape)} and as {list(self.weights[full].shape)}"
            raise InvalidFile("map.shape-mismatch", message, place=place)

    def is_tied(self, entry: WeightEntry, found: Weight | None, scope: Scope) -> bool:
        """Tied by the config; or by a GGUF file, which leaves the tied tensor out."""
        return bool(evaluate(entry, "tie_when", entry.tie_when, scope)) or (
            self.source.kind == "gguf" and found is None
        )

    def candidates(self, entry: WeightEntry, owner: str, user: User, kind: Literal["hf", "gguf"]) -> list[Weight]:
        """Every way a checkpoint of ``kind`` may hold the weight, best first."""
        prefix = self.groups.get(owner, {}).get("prefix")
        prefixes = as_list(getattr(prefix, kind)) if prefix else [""]
        names = [start + name for start in prefixes for name in as_list(getattr(entry, kind))]
        found = []
        for name in (name.replace("{i}", str(user.layer)) for name in names):
            stack = self.stack(entry, user.scope) if "{e}" in name else None
            found.append(Weight("", (), self.source.format, name, stack))
        return found

    def stack(self, entry: WeightEntry, scope: Scope) -> int:
        """How many tensors ``{e}`` stands for."""
        count = evaluate(entry, "stack", entry.stack, scope)
        if not isinstance(count, int) or not 1 <= count <= MAX_STACK:
            message = f"'stack' must be a number from 1 to {MAX_STACK}, got {count!r}"
            raise InvalidFile("map.stack", message, place=entry.place("stack"))
        return count

    def find(self, candidates: list[Weight], entry: WeightEntry) -> Weight | None:
        """The first candidate the checkpoint has any tensor of; without a checkpoint, the first one."""
        table = self.source.tensors
        if table is None:
            return None if entry.optional or not candidates else candidates[0]
        return next((each for each in candidates if any(name in table for name in each.tensors())), None)

    def missing(self, full: str, entry: WeightEntry, candidates: list[Weight]) -> WeightsError:
        """The error for a weight that no candidate gives."""
        if not candidates:
            message = f"the map names no {self.source.kind} tensor for '{full}'"
            return WeightsError("weights.no-name", message, place=entry.place())
        name = candidates[0].tensors()[0]
        message = f"{self.source.place} has no tensor '{name}', which '{full}' needs"
        return WeightsError("weights.missing-tensor", message, remedy=did_you_mean(name, self.source.tensors or ()))

    def checked(self, weight: Weight, entry: WeightEntry, place: Place | None, scope: Scope) -> Weight:
        """``weight`` with its transform and stored format, once sizes and tensors are right."""
        if min(weight.shape) < 1 or prod(weight.shape) > MAX_ELEMENTS:
            message = f"weight '{weight.name}' would have shape {list(weight.shape)}"
            raise InvalidFile("map.weight-size", message, place=place)
        fix = entry.hf_fix if self.source.kind == "hf" else entry.gguf_fix
        weight = replace(weight, transform=self.transform(fix, scope) if fix else Transform())
        self.used.update(weight.tensors())
        return weight if self.source.tensors is None else replace(weight, format=self.check_tensors(weight))

    def transform(self, fix: Regroup, scope: Scope) -> Transform:
        """``fix`` with its expressions evaluated."""
        sizes = [parse_expression(row, fix.place("rows")).evaluate(scope) for row in fix.rows]
        rows = tuple(size for size in sizes if isinstance(size, int) and size > 0)
        if len(rows) != len(sizes) or sorted(fix.order) != list(range(len(rows))):
            message = f"'order' must permute the axes of 'rows', got {fix.order} for {sizes}"
            raise InvalidFile("map.regroup", message, place=fix.place())
        return Transform(rows, tuple(fix.order), fix.transpose)

    def check_tensors(self, weight: Weight) -> str:
        """The stored format of the weight's tensors, which must all have the expected shape and one format."""
        table = self.source.tensors or {}
        expected = weight.shape if weight.stack is None else weight.shape[1:]
        expected = expected[::-1] if weight.transform.transpose else expected
        formats: dict[str, str] = {}
        for name in weight.tensors():
            if name not in table:
                message = f"{self.source.place} has no tensor '{name}', which '{weight.name}' needs"
                self.sink.add(WeightsError("weights.missing-tensor", message))
                continue
            formats[table[name].format] = name
            if table[name].shape != expected:
                shape = list(table[name].shape)
                message = (
                    f"tensor '{name}' of {self.source.place} is {shape}, but '{weight.name}' needs {list(expected)}"
                )
                self.sink.add(WeightsError("weights.shape", message))
        if len(formats) > 1:
            self.sink.add(WeightsError("weights.format", f"tensors of '{weight.name}' differ in format: {formats}"))
        return next(iter(formats), weight.format)

    def check_unused(self) -> None:
        """Report the tensors that nothing uses: a map that ignores part of a checkpoint computes something else."""
        left = [name for name in self.source.tensors or () if name not in self.used]
        unused = [name for name in left if not any(fnmatchcase(name, glob) for glob in self.blueprint.ignore)]
        if unused:
            shown = ", ".join(f"'{name}'" for name in unused[:5])
            shown += f" and {len(unused) - 5} more" if len(unused) > 5 else ""
            message = f"{self.source.place}: family '{self.blueprint.family}' does not use {shown}"
            remedy = "is this the right family? tensors that may stay unused are listed under 'ignore' in the map"
            self.sink.add(WeightsError("weights.unused-tensor", message, remedy=remedy))
