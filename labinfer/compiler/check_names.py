"""Checks a map's text for one mistake that lowering sees only where a model takes that branch: undefined names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from labinfer.compiler.blueprint import Blueprint, Line, OpLine, Placed, RepeatLine
from labinfer.compiler.expressions import parse_expression, undefined_name
from labinfer.compiler.settings import as_list
from labinfer.errors import InvalidFile, LabinferError, Place, did_you_mean
from labinfer.ops import OPS


def check_names(blueprint: Blueprint) -> Iterator[LabinferError]:
    """An error for every expression that cannot be read or names nothing, and for every value that nothing makes."""
    lines = [*blueprint.graph, *(line for block in blueprint.blocks.values() for line in block)]
    known = {"source", *blueprint.config, *(line.index for line in lines if isinstance(line, RepeatLine))}
    for text, place in expressions(blueprint, lines):
        try:
            names = parse_expression(text, place).names
        except InvalidFile as error:
            yield error
            continue
        yield from (undefined_name(name, known, place) for name in sorted(names - known))
    made = {*blueprint.inputs, *(name for line in lines if isinstance(line, OpLine) for name in as_list(line.out))}
    for line in lines:
        key, names_read = ("in", line.inputs) if isinstance(line, OpLine) else ("carry", getattr(line, "carry", None))
        for name in as_list(names_read):
            if name.rpartition(".")[2] not in made:
                place, remedy = line.place(key), did_you_mean(name, made)
                yield InvalidFile("map.undefined-name", f"'{name}' is not defined here", place=place, remedy=remedy)


def expressions(blueprint: Blueprint, lines: list[Line]) -> Iterator[tuple[str, Place | None]]:
    """Every expression of the map and its place."""
    for entry in blueprint.config.values():
        yield from texts(entry, ("default", "if_null", "value", "only", "otherwise"))
    for check in blueprint.check:
        yield from texts(check, ("that",))
    for widths in blueprint.states.values():
        yield from ((text, None) for text in widths.values() if isinstance(text, str))
    for line in lines:
        yield from texts(line, ("when", "times", "device"))
        if isinstance(line, OpLine) and line.op in OPS:
            attributes = OPS[line.op].Attrs.model_fields
            extra = line.model_extra or {}
            yield from ((extra[n], line.place(n)) for n in extra if n in attributes and isinstance(extra[n], str))
    for group in blueprint.weights.values():
        for weight in group.values():
            yield from texts(weight, ("when", "tie_when", "stack"))
            for fix in filter(None, (weight.hf_fix, weight.gguf_fix)):
                yield from ((row, fix.place("rows")) for row in fix.rows if isinstance(row, str))


def texts(element: Placed, names: tuple[str, ...]) -> Iterator[tuple[str, Place | None]]:
    """The fields of ``element`` that hold the text of an expression."""
    for name in names:
        value: Any = getattr(element, name, None)
        field = type(element).model_fields.get(name)
        if isinstance(value, str) and field is not None and name in element.model_fields_set:
            yield value, element.place(field.alias or name)
