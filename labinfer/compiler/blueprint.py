"""The map language: what a model map may say, read from YAML and checked as a whole.

A map names a family's configuration values, its blocks of ops and its weights; ``extends`` takes another family's map
and replaces whole named entries of it. Everything here is about the text of a map; ``lower`` gives it a meaning for one
model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, ValidationError

from labinfer.compiler.source import Node, load_yaml, place_of, read_text
from labinfer.errors import ErrorSink, InvalidFile, LabinferError, Place, did_you_mean
from labinfer.ops import OPS

Scalar = str | int | float | bool | None
"""A bare expression (``num_heads * head_dim``), or a plain number or flag."""

Names = str | list[str]


class Placed(BaseModel):
    """Base of everything in a map: strict keys, and a memory of where it stands."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, defer_build=True)
    _node: Node | None = PrivateAttr(default=None)

    def place(self, key: str | None = None) -> Place | None:
        """Where this element stands, or where the value of ``key`` in it does."""
        if self._node is None:
            return None
        value = self._node.value
        return value[key].place if key and isinstance(value, dict) and key in value else self._node.place

    def key_place(self, key: str) -> Place | None:
        """Where ``key`` itself stands in this element."""
        return self._node.key_places.get(key, self._node.place) if self._node else None


class ConfigEntry(Placed):
    """A configuration value: where a checkpoint states it, what it is otherwise, and in which layers.

    ``value`` fixes it; else the first of the ``hf`` / ``gguf`` keys that the checkpoint has; else, where config.json
    says null, ``if_null``; else ``default``. With ``only``, that holds in the layers where ``only`` is true and
    ``else`` holds in the others.
    """

    hf: Names | None = Field(None, description="key or keys of config.json, dotted for nested ones")
    gguf: Names | None = Field(None, description="key or keys of the GGUF metadata, after the architecture's prefix")
    default: Scalar = Field(None, description="expression taken when the checkpoint has none of the keys")
    if_null: Scalar = Field(None, description="expression taken, instead of default, when config.json says null")
    value: Scalar = Field(None, description="expression that holds whatever the checkpoint says")
    only: Scalar = Field(None, description="expression in i: the layers where the value holds")
    otherwise: Scalar = Field("none", alias="else", description="expression that holds in the other layers")


class Check(Placed):
    """A condition on the configuration that must hold, and what to say when it does not."""

    that: Scalar = Field(description="must be true; may not depend on the layer")
    say: str = Field(description="what the error says when it is not")


class Match(Placed):
    """The checkpoints that belong to this family."""

    model_type: Names = Field(description="model_type of config.json")
    hf_inside: str | None = Field(None, description="mapping of config.json that holds the keys, as in text_config")
    gguf: Names = Field(default_factory=list, description="general.architecture of a GGUF file")
    gguf_has: str | None = Field(None, description="key its metadata must have too; such a map goes before others")


class OpLine(Placed):
    """One op. Further keys are the op's attributes (expressions) and weight slots (logical weight names)."""

    model_config = ConfigDict(extra="allow")
    op: str = Field(description="kind of op")
    inputs: Names = Field(alias="in", description="values it reads, in the op's order")
    out: Names = Field(default_factory=list, description="names of the values it makes")
    when: Scalar = Field(True, description="false leaves the line out")
    state: str | None = Field(None, description="state of this layer that it reads or writes")
    device: Scalar = Field(None, description="device that runs it, such as `\"'reference:1'\"`")


class UseLine(Placed):
    """Puts a block here; what it makes is known outside as ``name.value``."""

    use: str = Field(description="block to put here")
    name: str | None = Field(
        None, alias="as", description="name under which its values are known; the block's own name when left out"
    )
    when: Scalar = Field(True, description="false leaves it out")


class RepeatLine(Placed):
    """Repeats a block; ``carry`` names the values handed from one round to the next and on to what follows."""

    repeat: str = Field(description="block to repeat")
    name: str = Field(
        alias="as",
        description="name of the repeat: values are called `layers.3.…`, weights come from the group of this name",
    )
    times: Scalar = Field(description="number of rounds, 1 to 1024")
    index: str = Field("i", description="name of the round's number in expressions, from 0")
    carry: Names = Field(description="values that a round hands to the next, and the last to what follows")
    device: Scalar = Field(None, description="device that runs a round; may depend on the index")


def _line_kind(line: Any) -> str:
    return next((kind for kind in ("op", "use", "repeat") if isinstance(line, dict) and kind in line), "op")


Line = Annotated[
    Annotated[OpLine, Tag("op")] | Annotated[UseLine, Tag("use")] | Annotated[RepeatLine, Tag("repeat")],
    Discriminator(_line_kind),
]


class Regroup(Placed):
    """Reorders a tensor: its first axis reshaped to ``rows`` and permuted by ``order``, and/or a 2-D transpose."""

    rows: list[Scalar] = Field(default_factory=list, description="sizes that the first axis is reshaped to")
    order: list[int] = Field(default_factory=list, description="permutation of those axes")
    transpose: bool = Field(False, description="swap both axes of a matrix, before anything else")


class WeightEntry(Placed):
    """A logical weight and the checkpoint tensor it is read from; ``{i}`` is the layer, ``{e}`` the expert."""

    hf: Names | None = Field(None, description="tensor name in safetensors; of several names the first that exists")
    gguf: Names | None = Field(None, description="tensor name in GGUF")
    hf_fix: Regroup | None = Field(None, description="how the safetensors tensor becomes the weight")
    gguf_fix: Regroup | None = Field(None, description="how the GGUF tensor becomes the weight")
    stack: Scalar = Field(None, description="number of tensors {e} stacked along a new first axis")
    tie: str | None = Field(None, description="the weight used instead when tie_when holds")
    tie_when: Scalar = Field(
        None, description="true: there is no tensor of its own; a GGUF file says so by leaving it out"
    )
    optional: bool = Field(False, description="used only when the checkpoint has it")
    when: Scalar = Field(True, description="false: the model has no such weight, and ops go without it")


class Example(Placed):
    """The model that a map describes when it is compiled without weights."""

    name: str = Field(description="name of the model")
    config: dict[str, Any] = Field(description="its config.json")


class Blueprint(Placed):
    """A whole map file; after ``read_map`` also everything it inherits."""

    labmap: Literal[1] = Field(description="version of the map language")
    family: str = Field(description="name of the family")
    extends: str | None = Field(
        None, description="map to take everything from that is not said here: a name in this folder or in graphs/"
    )
    match: Match = Field(description="checkpoints that belong to this family")
    config: dict[str, ConfigEntry] = Field(default_factory=dict, description="configuration values by name")
    check: list[Check] = Field(default_factory=list, description="conditions that must hold")
    inputs: list[Literal["token_ids", "positions"]] = Field(
        default_factory=list, description="values that every step brings"
    )
    outputs: list[str] = Field(
        default_factory=list, description="the result: one value, the logits `f32[R, vocab_size]`"
    )
    states: dict[str, dict[str, Scalar]] = Field(
        default_factory=dict,
        description="what the cache keeps for one token of one layer: state name, part, numbers per row",
    )
    graph: list[Line] = Field(default_factory=list, description="lines of the whole model, in order")
    blocks: dict[str, list[Line]] = Field(default_factory=dict, description="lines by block name")
    weights: dict[str, dict[str, WeightEntry]] = Field(default_factory=dict, description="weights by group and name")
    ignore: list[str] = Field(default_factory=list, description="checkpoint tensors that may stay unused (globs)")
    example: Example | None = Field(None, description="model that the map is compiled for when none is given")
    _files: tuple[Path, ...] = PrivateAttr(default=())

    @property
    def files(self) -> tuple[Path, ...]:
        """The map file and those it extends, nearest first."""
        return self._files


def read_map(path: Path) -> Blueprint:
    """The map at ``path`` with everything it extends; all its errors are raised together as ``InvalidFile``."""
    chain: list[Blueprint] = []
    files: list[Path] = []
    while True:
        blueprint = _read_one(path)
        if path in files:
            place = chain[-1].place("extends")
            raise InvalidFile("map.extends-cycle", f"'{blueprint.family}' extends itself", place=place)
        chain.append(blueprint)
        files.append(path)
        if blueprint.extends is None:
            break
        path = _find_base(path, blueprint)
    merged = chain.pop()
    while chain:
        merged = _inherit(merged, chain.pop())
    merged._files = tuple(files)
    sink = ErrorSink()
    for error in _check_lines(merged):
        sink.add(error)
    sink.check()
    return merged


def _read_one(path: Path) -> Blueprint:
    return _parse(path, read_text(path))


@lru_cache(maxsize=32)  # a model is loaded with one or two maps, each looked at more than once; nothing changes them
def _parse(path: Path, text: str) -> Blueprint:
    node = load_yaml(path, text=text)
    sink = ErrorSink()
    try:
        blueprint = Blueprint.model_validate(node.plain())
    except ValidationError as failure:
        for detail in failure.errors(include_url=False):
            sink.add(_schema_error(node, detail))
        sink.check()
        raise AssertionError("unreachable: a validation error has details") from failure
    _attach(blueprint, node)
    return blueprint


def _schema_error(node: Node, detail: Any) -> LabinferError:
    """A pydantic finding as an error at its place in the text."""
    steps = [step for step in detail["loc"] if step not in ("op", "use", "repeat") or step == detail["loc"][-1]]
    place = place_of(node, steps)
    where = ".".join(str(step) for step in steps)
    if detail["type"] == "extra_forbidden":
        remedy = did_you_mean(str(steps[-1]), _known_keys(detail["loc"][:-1]))
        return InvalidFile("map.unknown-key", f"unknown key '{where}'", place=place, remedy=remedy)
    return InvalidFile("map.schema", f"{where}: {detail['msg']}", place=place)


def _known_keys(steps: Sequence[int | str]) -> list[str]:
    """The keys that the element at ``steps`` (as pydantic counts them, with the kinds of lines) may have."""
    kinds: list[type[Placed]] = [Blueprint]
    for step in steps:
        owners = {
            kind: field for kind in kinds for name, field in kind.model_fields.items() if step in (field.alias, name)
        }
        inner = [kind for field in owners.values() for kind in _models_in(field.annotation)]
        kinds = inner or list(owners) or kinds  # an index or a name of the map's own leads to one of the same kinds
    return [field.alias or name for kind in kinds for name, field in kind.model_fields.items()]


def _models_in(annotation: Any) -> list[type[Placed]]:
    """The models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Placed):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _models_in(part)]


def _attach(model: Any, node: Node) -> None:
    """Give every element of ``model`` the YAML node it was made from."""
    value = node.value
    if isinstance(model, Placed) and isinstance(value, dict):
        model._node = node
        for name, field in type(model).model_fields.items():
            if (key := field.alias or name) in value:
                _attach(getattr(model, name), value[key])
    elif isinstance(model, dict) and isinstance(value, dict):
        for key, item in model.items():
            _attach(item, value[key])
    elif isinstance(model, list) and isinstance(value, list):
        for item, child in zip(model, value, strict=True):
            _attach(item, child)


def _find_base(path: Path, blueprint: Blueprint) -> Path:
    from labinfer.home import graphs_dir

    name = f"{blueprint.extends}.yaml"
    for folder in (path.parent, graphs_dir()):
        if Path(name).name == name and os.path.isfile(folder / name):  # unlike is_file, False for a name too long
            return folder / name
    known = [file.stem for file in graphs_dir().glob("*.yaml")]
    remedy = did_you_mean(str(blueprint.extends), known)
    raise InvalidFile(
        "map.unknown-family", f"no map named '{name}' to extend", place=blueprint.place("extends"), remedy=remedy
    )


def _inherit(base: Blueprint, own: Blueprint) -> Blueprint:
    """``own`` over ``base``: entries replace entries, blocks replace blocks, checks and ignores add up."""
    groups = {
        name: {**base.weights.get(name, {}), **own.weights.get(name, {})} for name in {**base.weights, **own.weights}
    }
    merged = own.model_copy(
        update={
            "config": {**base.config, **own.config},
            "check": base.check + own.check,
            "inputs": own.inputs or base.inputs,
            "outputs": own.outputs or base.outputs,
            "states": {**base.states, **own.states},
            "graph": own.graph or base.graph,
            "blocks": {**base.blocks, **own.blocks},
            "weights": groups,
            "ignore": base.ignore + own.ignore,
            "example": own.example or base.example,
        }
    )
    merged._node = own._node
    return merged


def _check_lines(blueprint: Blueprint) -> Iterator[LabinferError]:
    """Names that no model can make right: unknown ops, attributes, weights, states and blocks."""
    for line in (*blueprint.graph, *(line for block in blueprint.blocks.values() for line in block)):
        if isinstance(line, OpLine):
            yield from _check_op(blueprint, line)
        else:
            target, key = (line.use, "use") if isinstance(line, UseLine) else (line.repeat, "repeat")
            if target not in blueprint.blocks:
                remedy = did_you_mean(target, blueprint.blocks)
                yield InvalidFile(
                    "map.unknown-block", f"there is no block '{target}'", place=line.place(key), remedy=remedy
                )


def _check_op(blueprint: Blueprint, line: OpLine) -> Iterator[LabinferError]:
    spec = OPS.get(line.op)
    if spec is None:
        yield InvalidFile(
            "map.unknown-op", f"there is no op '{line.op}'", place=line.place("op"), remedy=did_you_mean(line.op, OPS)
        )
        return
    if spec.inserted:
        message = f"op '{line.op}' is put in by the compiler, a map cannot write it"
        yield InvalidFile("map.inserted-op", message, place=line.place("op"), remedy="leave the line out")
        return
    slots = {slot.name for slot in spec.weights}
    weights = {name for group in blueprint.weights.values() for name in group}
    extra = line.model_extra or {}
    for key, value in extra.items():
        if key in slots:
            if not isinstance(value, str) or value not in weights:
                remedy = did_you_mean(str(value), weights)
                yield InvalidFile(
                    "map.unknown-weight", f"there is no weight '{value}'", place=line.place(key), remedy=remedy
                )
        elif key not in spec.Attrs.model_fields:
            remedy = did_you_mean(key, [*slots, *spec.Attrs.model_fields])
            yield InvalidFile(
                "map.unknown-attribute",
                f"op '{line.op}' has no attribute '{key}'",
                place=line.key_place(key),
                remedy=remedy,
            )
    missing = [slot.name for slot in spec.weights if not slot.optional and slot.name not in extra]
    missing += [name for name, field in spec.Attrs.model_fields.items() if field.is_required() and name not in extra]
    missing += ["state"] if spec.state and line.state is None else []
    if missing:
        yield InvalidFile("map.missing-attribute", f"op '{line.op}' needs {', '.join(missing)}", place=line.place())
    if line.state is not None and line.state not in blueprint.states:
        remedy = did_you_mean(line.state, blueprint.states)
        yield InvalidFile(
            "map.unknown-state", f"there is no state '{line.state}'", place=line.place("state"), remedy=remedy
        )
