"""The configuration of one model: a map's ``config`` entries answered from config.json or GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from labinfer.compiler.blueprint import Blueprint, ConfigEntry
from labinfer.compiler.expressions import Expression, Scope, parse_expression
from labinfer.errors import ErrorSink, InvalidFile


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What the compiler needs to know of a checkpoint tensor: shape (row-major) and stored format."""

    shape: tuple[int, ...]
    format: str


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to compile: its configuration and, when weights are at hand, its tensor table.

    ``kind`` tells whose keys and names it uses; ``place`` is shown in errors; ``format`` is the stored format assumed
    for weights when ``tensors`` is None.
    """

    kind: Literal["hf", "gguf"]
    config: Mapping[str, Any]
    place: str
    tensors: Mapping[str, TensorEntry] | None = None
    format: str = "f32"
    name: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)


def as_list(names: str | list[str] | None) -> list[str]:
    """A name or a list of names as a list."""
    return [] if names is None else [names] if isinstance(names, str) else names


def lookup(source: ModelSource, key: str) -> Any:
    """The checkpoint's value for a config key, or None.

    ``a.b`` looks inside nested mappings of config.json. GGUF keys are tried after the architecture's prefix, then as
    they stand; a leading ``#`` gives the length of a list.
    """
    if source.kind == "gguf":
        length, key = key.startswith("#"), key.removeprefix("#")
        value = source.config.get(f"{source.config.get('general.architecture')}.{key}", source.config.get(key))
        return len(value) if length and isinstance(value, Sequence) else value
    found: Any = source.config
    for step in key.split("."):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def says_null(source: ModelSource, key: str) -> bool:
    """Whether config.json answers ``key`` with null: no window, where leaving the key out means the class default."""
    outer, _, name = key.rpartition(".")
    holder = lookup(source, outer) if outer else source.config
    return source.kind == "hf" and isinstance(holder, Mapping) and name in holder and holder[name] is None


def inside(source: ModelSource, key: str | None) -> ModelSource:
    """``source`` with the keys of the mapping ``key`` of config.json put over its own."""
    found = lookup(source, key) if key and source.kind == "hf" else None
    return replace(source, config={**source.config, **found}) if isinstance(found, Mapping) else source


def model_scope(blueprint: Blueprint, source: ModelSource) -> Scope:
    """Every config name of the map as a lazily evaluated value; per-layer values need ``i`` in a derived scope.

    Raises ``InvalidFile`` for keys that the checkpoint must state and does not, and for checks that fail.
    """
    sink = ErrorSink()
    source = inside(source, blueprint.match.hf_inside)
    definitions: dict[str, Any] = {"source": source.kind}
    for name, entry in blueprint.config.items():
        base = _base_value(name, entry, source, sink)
        if entry.only is None:
            definitions[name] = base
            continue
        definitions[f"_{name}"] = base
        choice = f"_{name} if ({entry.only}) else ({entry.otherwise})"
        definitions[name] = parse_expression(choice, entry.place("only"))
    sink.check()
    scope = Scope(definitions)
    for check in blueprint.check:
        if not parse_expression(check.that, check.place("that")).evaluate(scope):
            values = ", ".join(f"{name} = {scope[name]!r}" for name in sorted(parse_expression(check.that).names))
            sink.add(InvalidFile("config.check", f"{check.say} ({source.place}: {values})", place=check.place("that")))
    sink.check()
    return scope


def _base_value(name: str, entry: ConfigEntry, source: ModelSource, sink: ErrorSink) -> Expression | Any:
    if entry.value is not None:
        return parse_expression(entry.value, entry.place("value"))
    keys = as_list(entry.hf if source.kind == "hf" else entry.gguf)
    for key in keys:
        if (found := lookup(source, key)) is not None:
            return found
    if entry.if_null is not None and any(says_null(source, key) for key in keys):
        return parse_expression(entry.if_null, entry.place("if_null"))
    if entry.default is not None:
        return parse_expression(entry.default, entry.place("default"))
    wanted = " or ".join(f"'{key}'" for key in keys) or f"any key for {source.kind}"
    message = f"{source.place} does not state {wanted}, which '{name}' needs"
    sink.add(InvalidFile("config.missing-key", message, place=entry.place()))
    return None
