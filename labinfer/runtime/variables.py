"""Variables: what a model is made of at run time. A ``Tensor`` is an activation, a ``Parameter`` a weight.

Both know their device by name only; devices are shared objects that the manager looks up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from labinfer.compiler.fold import Slot
from labinfer.compiler.graph import Weight


@dataclass(frozen=True, slots=True)
class Variable:
    """A named array on a device."""

    name: str
    device: str


@dataclass(frozen=True, slots=True)
class Tensor(Variable):
    """An activation: a slot of the device's arena, which is its own from the op that makes it to its last reader."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Parameter(Variable):
    """A weight: where it is read from, and its array on the device (``resident`` until other residencies come)."""

    weight: Weight
    array: Any
