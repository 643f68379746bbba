"""Random numbers that depend on what they are for and on nothing that came before.

The number for a token is a function of the request's seed, the sequence and the token's place in the answer, so that a
request gets the same tokens alone, in any batch, after a preemption and under speculation.
"""

from __future__ import annotations

from typing import Any, TypeVar

Number = TypeVar("Number", int, Any)
"""A Python integer, or a numpy array uint64 of which every element is one."""

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85  # the golden ratio and sqrt(3) - 1
_LOW = 0xFFFFFFFF
_ROUNDS = 10


def philox(counter: tuple[Number, Number, Number, Number], key: tuple[Number, Number]) -> tuple[Number, ...]:
    """Four random words of 32 bits for a counter of four and a key of two: Philox-4x32-10.

    Salmon, Moraes, Dror and Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    a, b, c, d = counter
    left, right = key
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (second >> 32) ^ b ^ left, second & _LOW, (first >> 32) ^ d ^ right, first & _LOW
        left, right = (left + _KEY_STEPS[0]) & _LOW, (right + _KEY_STEPS[1]) & _LOW
    return a, b, c, d


def uniform(seed: Number, index: Number, number: Number) -> Any:
    """The random number in [0, 1), of 53 bits, for token ``number`` of sequence ``index`` of a request with ``seed``.

    ``seed`` has 64 bits; arrays uint64 give an array float64.
    """
    counter = number & _LOW, number >> 32, index & _LOW, index >> 32
    high, low, _, _ = philox(counter, (seed & _LOW, seed >> 32))
    return ((high << 21) | (low >> 11)) * 2.0**-53
