"""A device that chooses tokens itself, on the CPU: the reference device with a sampler made of the host's parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from labinfer.backends.reference.device import ReferenceDevice
from labinfer.backends.sampling import ALL_BANNED, NOT_A_NUMBER, Choices, TokenSampler
from labinfer.runtime.sampling.draw import draw
from labinfer.runtime.sampling.random_numbers import uniform


class ReferenceSampler(TokenSampler):
    """What ``TokenSampler`` says, row by row; counts tokens chosen, steps fed, and steps still waited for."""

    def __init__(self, rows: int, vocab_size: int, capacity: int, groups: int) -> None:
        self.rows, self.vocab_size, self.capacity = rows, vocab_size, capacity
        self.made = np.zeros((groups, rows), np.int32)
        self.chosen, self.fed, self.waiting = 0, 0, [0] * groups

    def feed(self, token_ids: np.ndarray, device: Any, group: int = 0) -> None:
        unknown = token_ids < 0
        token_ids[unknown] = np.maximum(self.made[group][-1 - token_ids[unknown]], 0)
        self.fed += int(unknown.any())

    def choose(self, logits: np.ndarray, choices: Choices, group: int = 0) -> Callable[[], np.ndarray]:
        assert len(choices.rules) <= min(len(logits), self.rows)
        assert len(choices.tokens) <= self.capacity
        last = self.made[group]
        made = np.array([self.token(logits[row], choices, row, last) for row in range(len(choices.rules))], np.int32)
        last[: len(made)] = made
        self.chosen += len(made)
        self.waiting[group] += 1
        assert self.waiting[group] <= 2

        def arrived() -> np.ndarray:
            self.waiting[group] -= 1
            return made.copy()

        return arrived

    def token(self, logits: np.ndarray, choices: Choices, row: int, last: np.ndarray) -> int:
        rule = choices.rules[row]
        if choices.spans is not None:
            adjust(logits, choices, row, last)
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            return ALL_BANNED if logits[best] == -np.inf else NOT_A_NUMBER
        if rule["temperature"] == 0 or rule["top_k"] == 1:
            return best
        logits[logits < np.float64(logits[best]) + rule["floor"]] = -np.inf
        number = uniform(int(rule["seed"]), int(rule["index"]), int(rule["number"]))
        [token] = draw(logits, rule["temperature"], int(rule["top_k"]), rule["top_p"], np.array([number]))
        return int(token)

    def close(self) -> None:
        assert not any(self.waiting)


def adjust(logits: np.ndarray, choices: Choices, row: int, made: np.ndarray) -> None:
    """Bias and penalties of one row."""
    assert choices.spans is not None
    rule, (start, middle, end) = choices.rules[row], choices.spans[row].tolist()
    logits[choices.tokens[start:middle]] += choices.numbers[start:middle].view(np.float32)
    counts = dict(zip(choices.tokens[middle:end].tolist(), choices.numbers[middle:end].tolist(), strict=True))
    penalizes = rule["repetition"] != 1 or rule["frequency"] or rule["presence"]
    if penalizes and rule["source"] >= 0 and (fresh := int(made[rule["source"]])) >= 0:
        counts[fresh] = counts.get(fresh, 0) + 1
    for token, count in counts.items():
        value = logits[token]
        if rule["repetition"] != 1:
            value = value / rule["repetition"] if value > 0 else value * rule["repetition"]
        logits[token] = value - rule["frequency"] * np.float32(count) - rule["presence"] * np.float32(count > 0)


@contextmanager
def choosing(capacity: int = 1 << 16) -> Iterator[list[ReferenceSampler]]:
    """Within the context reference devices choose tokens themselves; yields their samplers."""
    samplers = []

    def sampler(device: Any, rows: int, vocab_size: int, groups: int = 1) -> ReferenceSampler:
        samplers.append(ReferenceSampler(rows, vocab_size, capacity, groups))
        return samplers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceDevice, "sampler", sampler)
        patch.setattr(ReferenceDevice, "overlaps", True)
        patch.setattr(ReferenceDevice, "reaches", lambda device, other: True)
        patch.setattr(ReferenceDevice, "decodes_for", lambda device, count, limit: min(-(-count // 4) * 4, limit))
        yield samplers
