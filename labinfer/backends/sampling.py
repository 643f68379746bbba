"""The interface of devices that choose tokens themselves: the tokens that ``labinfer.runtime.sampling`` would choose.

Logits then stay where they are, and the next step can be queued before the tokens are known on the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from labinfer.backends.base import Device

RULE = np.dtype(
    [
        ("temperature", "f8"), ("top_p", "f8"), ("floor", "f8"), ("seed", "u8"), ("index", "i4"), ("number", "i4"),
        ("top_k", "i4"), ("source", "i4"), ("repetition", "f4"), ("frequency", "f4"), ("presence", "f4"), ("", "i4"),
    ]
)  # fmt: skip
"""How a row's token is chosen: the parameters under the names of ``SamplingParams``, and the random number's ``seed``,
sequence ``index`` and ``number`` of the token in the answer.

``temperature`` 0 or ``top_k`` 1 takes the likeliest; min_p lets a logit be ``floor``, below 0, from the greatest.
``source`` is the row that made the sequence's last token in the step before, if the host does not know it yet, or -1.
"""

NOT_A_NUMBER, ALL_BANNED = -1, -2
"""Instead of a token: the greatest logit is no finite number, or minus infinity."""

GreedyRun = Callable[[int, int], Any]
"""Runs a decode step and those after it, so many in all, of so many sequences, each on the likeliest tokens of the one
before; the tokens made, int32 [steps, sequences], or ``NOT_A_NUMBER``. Called again, it goes on from there."""


@dataclass(slots=True)
class Choices:
    """What a step's tokens are chosen by: ``rules`` RULE [rows].

    ``tokens`` and ``numbers`` list, row after row, tokens whose logits are changed: from ``spans[row, 0]`` on those
    with a bias, float32 as its bits; from ``spans[row, 1]`` to ``spans[row, 2]`` those that penalties look at, with how
    often the answer has them. No token is twice in a list; all int32. ``spans`` is None where no row lists any.
    """

    rules: np.ndarray
    spans: np.ndarray | None
    tokens: np.ndarray
    numbers: np.ndarray


class TokenSampler(ABC):
    """Chooses the tokens of steps that were queued on a device; what it does is queued too.

    ``capacity``: how many tokens ``Choices`` can list.
    """

    capacity: int

    @abstractmethod
    def feed(self, token_ids: Any, device: Device, group: int = 0) -> None:
        """Put tokens of the last step of ``group`` where ``token_ids``, all a step can have, are negative: -1 - its row
        there. They are in the memory of ``device``, which reaches that of the sampler's.
        """

    @abstractmethod
    def choose(self, logits: Any, choices: Choices, group: int = 0) -> Callable[[], np.ndarray]:
        """Choose a token for each of the first rows of ``logits``, as many as ``choices`` has rules, and change these.

        They are of a step of ``group``, of which at most two wait for their tokens.

        What it returns waits for the tokens, int32 [rows].
        """

    @abstractmethod
    def close(self) -> None:
        """Give its memory back."""
