"""Random damage to plain data, for tests that feed damaged maps, configs and plans to the compiler."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 10**9, 2**31, 2**40, 2**60, 2**63, 10**30, -(2**63), 0.0, -0.5, 1.5, 1e300,
    float("nan"), float("inf"), "", "x", "none", "true", "i", "{i}", "$h", "h", "hidden_size", "1/0", "'silu'",
    "9**9**9", "a" * 300, "\u0000", "é", "²", [], {}, [1], ["x"], {"a": 1}, [[[[]]]], {"op": "add"}, [None],
    "f32[T, 8]", "i32[T]", "f32[]", "f32[T, 8, 2]", "linear", "reference:9", "cuda:0", [0, 0], [5, 2], [0, 4095],
    [0, 10**9], "q4_k", "token_ids",
]  # fmt: skip


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every element below ``tree``."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def find(tree: Any, path: tuple[Any, ...]) -> Any:
    """The element at ``path``."""
    for key in path:
        tree = tree[key]
    return tree


def damaged(tree: Any, rng: random.Random) -> Any:
    """A copy of ``tree`` with one to three elements replaced, dropped, doubled, renamed, swapped or nudged."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2, 3])):
        all_paths = list(paths(tree))
        if not all_paths:
            break
        path = rng.choice(all_paths)
        rng.choice([replace, replace, drop, double, rename, swap, nudge, nudge])(tree, path, rng, all_paths)
    return tree


def replace(tree: Any, path: tuple[Any, ...], rng: random.Random, _: list[tuple[Any, ...]]) -> None:
    """Junk instead of the element."""
    find(tree, path[:-1])[path[-1]] = copy.deepcopy(rng.choice(JUNK))


def drop(tree: Any, path: tuple[Any, ...], rng: random.Random, _: list[tuple[Any, ...]]) -> None:
    """The element is gone."""
    del find(tree, path[:-1])[path[-1]]


def double(tree: Any, path: tuple[Any, ...], rng: random.Random, _: list[tuple[Any, ...]]) -> None:
    """The element stands twice."""
    parent = find(tree, path[:-1])
    if isinstance(parent, list):
        parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
    else:
        parent[f"{path[-1]}_"] = copy.deepcopy(parent[path[-1]])


def rename(tree: Any, path: tuple[Any, ...], rng: random.Random, others: list[tuple[Any, ...]]) -> None:
    """A key is called like another key."""
    parent, key = find(tree, path[:-1]), str(rng.choice(others)[-1])
    if isinstance(parent, dict):
        parent[key] = parent.pop(path[-1])


def swap(tree: Any, path: tuple[Any, ...], rng: random.Random, others: list[tuple[Any, ...]]) -> None:
    """Two elements change places."""
    other = rng.choice(others)
    if other[: len(path)] != path and path[: len(other)] != other:
        first, second = find(tree, path), find(tree, other)
        find(tree, path[:-1])[path[-1]] = second
        find(tree, other[:-1])[other[-1]] = first


def nudge(tree: Any, path: tuple[Any, ...], rng: random.Random, _: list[tuple[Any, ...]]) -> None:
    """A number a little off, or of another type; a text with one character changed."""
    parent, key = find(tree, path[:-1]), path[-1]
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, int | float):
        parent[key] = rng.choice(
            [value + 1, value - 1, value * 2, -value, value + 4, value + 256, str(value), value / 2]
        )
    elif isinstance(value, str) and value:
        at = rng.randrange(len(value))
        parent[key] = value[:at] + rng.choice(["", "x", " ", ".", "1", "{i}", "["]) + value[at + 1 :]
