"""Storage sets and the arena: windows, in-place results, lifetimes; checked on random programs by running them."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from labinfer.compiler.arena import ALIGNMENT, aligned, fold_layers, peak, plan_arena
from labinfer.compiler.graph import Op, Origin
from labinfer.compiler.packing import Buffer
from labinfer.compiler.storage import Window, plan_storage, row_bytes
from labinfer.ops import OPS
from labinfer.ops.base import Call, TensorType, dim

PLACE = Origin("test", 1, 1)
HERE = TensorType(("T", 8))


def op(kind: str, inputs: str, outputs: str, **attrs: object) -> Op:
    """An op of no layer, its operands named in a text."""
    names = tuple(outputs.split())
    return Op(names[0] if names else kind, kind, tuple(inputs.split()), names, OPS[kind].Attrs(**attrs), {}, PLACE)


def typed(ops: list[Op], inputs: dict[str, TensorType]) -> dict[str, TensorType]:
    values = dict(inputs)
    for each in ops:
        values |= dict(
            zip(each.outputs, OPS[each.kind].infer(each.attrs, [values[n] for n in each.inputs]), strict=True)
        )
    return values


def storages_of(ops: list[Op], inputs: dict[str, TensorType], outputs: list[str]) -> dict[str, str]:
    """The storage of every value."""
    _, windows = plan_storage(ops, typed(ops, inputs), list(inputs), outputs)
    return {name: window.storage for name, window in windows.items()}


def test_an_op_writes_over_an_input_that_dies() -> None:
    ops = [op("add", "a b", "c"), op("scale", "c", "d", by=2.0)]
    assert storages_of(ops, {"a": HERE, "b": HERE}, ["d"]) == {"a": "a", "b": "b", "c": "a", "d": "a"}


def test_an_op_spares_an_input_that_lives() -> None:
    ops = [op("add", "a b", "c"), op("add", "a c", "d")]
    assert storages_of(ops, {"a": HERE, "b": HERE}, ["d"]) == {"a": "a", "b": "b", "c": "b", "d": "a"}
    kept = storages_of(ops, {"a": HERE, "b": HERE}, ["d", "a", "b"])
    assert kept == {"a": "a", "b": "b", "c": "c", "d": "c"}


def test_an_input_that_is_read_twice_is_not_written_over() -> None:
    assert storages_of([op("add", "a a", "b")], {"a": HERE}, ["b"]) == {"a": "a", "b": "b"}


def test_an_op_that_does_not_allow_it_never_works_in_place() -> None:
    assert "select_rows" in OPS
    ops = [op("select_rows", "a", "b")]
    assert storages_of(ops, {"a": HERE}, ["b"]) == {"a": "a", "b": "b"}


def test_windows_lie_in_what_they_are_windows_of() -> None:
    ops = [op("split", "a", "b c", sizes=(2, 6)), op("scale", "b", "d", by=2.0), op("scale", "c", "e", by=2.0)]
    storages, windows = plan_storage(ops, typed(ops, {"a": HERE}), ["a"], ["d", "e"])
    assert windows == {
        "a": Window("a", 0, 32), "b": Window("a", 0, 32), "c": Window("a", 8, 32),
        "d": Window("a", 0, 32), "e": Window("a", 8, 32),
    }  # fmt: skip
    assert [(each.lower, each.upper) for each in storages] == [(0, 4)]


def test_a_window_keeps_its_base_from_being_written_over() -> None:
    ops = [op("split", "a", "b c", sizes=(4, 4)), op("scale", "a", "d", by=2.0), op("add", "b c", "e")]
    assert storages_of(ops, {"a": HERE}, ["d", "e"]) == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "a"}


def test_a_base_that_lives_keeps_its_windows_from_being_written_over() -> None:
    ops = [op("split", "a", "b c", sizes=(4, 4)), op("scale", "b", "d", by=2.0)]
    assert storages_of(ops, {"a": HERE}, ["a", "d"])["d"] == "d"


@given(st.integers(0, 1 << 40))
def test_alignment(size: int) -> None:
    assert aligned(size) % ALIGNMENT == 0
    assert 0 <= aligned(size) - size < ALIGNMENT


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8), st.integers(0, 50)), min_size=1, max_size=20))
def test_the_peak_is_where_most_is_live(spans: list[tuple[int, int, int]]) -> None:
    buffers = [Buffer(str(i), lower, lower + length, size) for i, (lower, length, size) in enumerate(spans)]
    load = {at: sum(b.size for b in buffers if b.lower <= at < b.upper) for at in range(30)}
    step, live = peak(buffers)
    assert load[step] == max(load.values())
    assert sum(b.size for b in buffers if b.id in live) == load[step]


def random_program(rng: random.Random, length: int) -> tuple[list[Op], dict[str, TensorType], list[str]]:
    """Adds, scales and splits of random earlier values, in two layers and before and after them."""
    values = {"x0": HERE, "x1": HERE}
    ops: list[Op] = []
    for index in range(length):
        name, known = f"v{index}", list(values)
        first = rng.choice(known)
        width = int(values[first].shape[1])
        same = [each for each in known if values[each] == values[first]]
        kind = rng.choice(["add", "scale", "split"])
        if kind == "add":
            made = op("add", f"{first} {rng.choice(same)}", name)
        elif kind == "split" and width > 1:
            cut = rng.randrange(1, width)
            made = op("split", first, f"{name}a {name}b", sizes=(cut, width - cut))
        else:
            made = op("scale", first, name, by=0.5 + index)
        ops.append(made)
        values = typed(ops, {"x0": HERE, "x1": HERE})
    outputs = rng.sample([name for each in ops for name in each.outputs], k=min(2, length))
    return ops, values, outputs


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32), length=st.integers(1, 25), tokens=st.integers(1, 5))
def test_a_program_in_its_arena_computes_what_it_does_with_memory_for_everything(
    seed: int, length: int, tokens: int
) -> None:
    ops, values, outputs = random_program(random.Random(seed), length)
    plan = plan_arena(ops, values, ["x0", "x1"], outputs, tokens, 1)
    memory = np.full(plan.size, 0xFF, np.uint8)
    rng = np.random.default_rng(seed)
    apart = {name: rng.standard_normal((tokens, 8), np.float32) for name in ("x0", "x1")}
    views = {}
    for name, window in plan.windows.items():
        shape = tuple(dim(size, tokens, 1) for size in values[name].shape)
        at = plan.offsets[window.storage] + window.offset
        assert at + (tokens - 1) * window.row_bytes + row_bytes(values[name]) <= plan.size
        views[name] = np.ndarray(shape, np.float32, memory, at, (window.row_bytes, 4))
    for name, array in apart.items():
        views[name][...] = array
    for each in ops:
        results = OPS[each.kind].reference(Call(each.attrs, tuple(apart[name] for name in each.inputs)))
        apart |= dict(zip(each.outputs, results, strict=True))
        if each.kind != "split":
            [out] = OPS[each.kind].reference(Call(each.attrs, tuple(views[name] for name in each.inputs)))
            views[each.outputs[0]][...] = out
    for name in outputs:
        np.testing.assert_array_equal(views[name], apart[name])
    assert plan.size >= plan.lower_bound
    assert plan.optimal == (plan.size == plan.lower_bound)


def test_layers_that_are_alike_share_offsets() -> None:
    layers = [
        Op(f"layers.{i}.{name}", "scale", (f"layers.{i}.{of}" if of != "h" else f"h{i}",), (f"layers.{i}.{name}",),
           OPS["scale"].Attrs(by=2.0), {}, PLACE, i)
        for i in range(3) for name, of in (("a", "h"), ("b", "a"))
    ]  # fmt: skip
    values = {f"layers.{i}.{name}": HERE for i in range(3) for name in "ab"} | {f"h{i}": HERE for i in range(3)}
    storages, _ = plan_storage(layers, values, [f"h{i}" for i in range(3)], [])
    buffers = {each.name: Buffer(each.name, each.lower, each.upper, 256) for each in storages}
    for copy, model in fold_layers(storages, buffers, layers).items():
        assert copy.split(".")[2:] == model.split(".")[2:]
        assert buffers[copy].upper - buffers[copy].lower == buffers[model].upper - buffers[model].lower
