"""Cache groups: layers whose attention sees the same window share blocks, and how many blocks each group gets.

A token beyond the window is never looked at again, so a group with a window needs no more blocks than its sequences'
windows and one step's tokens cover.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from labinfer.compiler.graph import Op, State
from labinfer.compiler.plan import CacheGroup, Limits
from labinfer.errors import DoesNotFit, UsageError


def assign_groups(
    states: Mapping[str, State], ops: Iterable[Op], max_model_len: int
) -> tuple[list[CacheGroup], dict[str, State]]:
    """The groups, not sized yet, and every state with its group.

    A state that several ops read needs the widest of their windows; one that no sequence outgrows is none.
    """
    seen: dict[str, int] = dict.fromkeys(states, 0)
    for op in ops:
        for part in op.primitives():
            if part.state and part.outputs:
                window = getattr(part.attrs, "window", None) or max_model_len
                seen[part.state] = max(seen[part.state], min(window, max_model_len))
    widest = sorted(set(seen.values()) - {0}, reverse=True) or [max_model_len]
    groups = [CacheGroup(window=None if size == max_model_len else size, num_blocks=1) for size in widest]
    placed = {name: replace(state, group=widest.index(seen[name] or widest[0])) for name, state in states.items()}
    return groups, placed


def block_bytes(limits: Limits, states: Iterable[State]) -> list[int]:
    """Bytes of a block of each group, over all of ``states``."""
    each = [0] * len(limits.groups)
    for state in states:
        each[state.group] += limits.cache_bytes_per_number * limits.block_size * state.width
    return each


@dataclass(frozen=True, slots=True)
class Room:
    """What bounds the cache, where somebody said so: blocks of the first group, bytes of all devices together.

    ``swap_bytes`` of host memory are for blocks that are swapped out.
    """

    num_blocks: int | None
    kv_memory: int | None
    swap_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceRoom:
    """Bytes of a block of each group on one device, and the bytes left there for all blocks, None for no bound."""

    block_bytes: Sequence[int]
    left: int | None


def size_groups(limits: Limits, devices: Sequence[DeviceRoom], room: Room) -> list[CacheGroup]:
    """The groups with their numbers of blocks; raises ``DoesNotFit`` when ``kv_memory`` holds not one block of each.

    Without a bound every group has what ``max_num_seqs`` sequences of ``max_model_len`` need. Within bounds the first
    group gives way; the others keep what they need, but never more blocks than the first, which no sequence outgrows.
    """
    needed = [limits.blocks_needed(each, limits.max_model_len, times=limits.max_num_seqs) for each in limits.groups]
    each = [sum(sizes) for sizes in zip(*(device.block_bytes for device in devices), strict=True)]

    def counts(first: int) -> list[int]:
        return [first, *(min(first, need) for need in needed[1:])]

    def fits(first: int) -> bool:
        bounds = [(device.block_bytes, device.left) for device in devices] + [(each, room.kv_memory)]
        return all(left is None or cache_bytes(counts(first), sizes) <= left for sizes, left in bounds)

    if room.num_blocks is not None:
        blocks = counts(room.num_blocks)
    elif room.kv_memory is not None and not fits(1):
        message = f"one block takes {cache_bytes(counts(1), each)} bytes, the memory for the cache is {room.kv_memory}"
        raise DoesNotFit("device.memory", message, remedy="give more with --kv-memory, or lower --block-size")
    else:
        most = needed[0] if room.kv_memory is None or not each[0] else room.kv_memory // each[0]
        blocks = counts(_largest(fits, most))
    share = Fraction(room.swap_bytes, max(1, cache_bytes(blocks, each)))
    swapped = [int(count * share) for count in blocks]
    if room.swap_bytes and not all(swapped):
        message = f"{room.swap_bytes} bytes of host memory hold not one cache block of each group"
        raise UsageError("limits.swap-space", message, remedy="give more with --swap-space, or none")
    return [
        group.model_copy(update={"num_blocks": count, "swap_blocks": places})
        for group, count, places in zip(limits.groups, blocks, swapped, strict=True)
    ]


def cache_bytes(blocks: Iterable[int], block_bytes: Iterable[int]) -> int:
    """Bytes of so many blocks of each group."""
    return sum(count * size for count, size in zip(blocks, block_bytes, strict=True))


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to ``most`` that fits, 1 if none does; what fits for one fits for every smaller."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
