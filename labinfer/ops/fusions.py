"""Fused ops, declared as what they are made of: a backend may have a kernel for the whole, every backend can run the parts.

Each part is written ``results = kind(operands)``; names bind values. A value made and used inside the fusion must not be
needed outside it. The results of the fused op are those values that are not used up inside.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """One primitive op of a fusion, its operands and results by the fusion's own names."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fusion:
    """A chain of primitive ops that stand one after another in the schedule."""

    kind: str
    parts: tuple[Part, ...]


_PART = re.compile(r"^(?:(?P<outs>[\w, ]+) = )?(?P<kind>\w+)\((?P<ins>[\w, ]+)\)$")


def declare(kind: str, *parts: str) -> Fusion:
    """A fusion from the text of its parts."""
    parsed = []
    for text in parts:
        match = _PART.match(text)
        if match is None:
            raise ValueError(f"fusion '{kind}': cannot read '{text}'")
        outs = tuple(name.strip() for name in (match["outs"] or "").split(",") if name.strip())
        parsed.append(Part(match["kind"], tuple(name.strip() for name in match["ins"].split(",")), outs))
    return Fusion(kind, tuple(parsed))


FUSIONS: tuple[Fusion, ...] = (
    declare("norm_qkv", "n = rms_norm(x)", "q = linear(n)", "k = linear(n)", "v = linear(n)"),
    declare("norm_glu", "n = rms_norm(x)", "g = linear(n)", "u = linear(n)", "y = glu(g, u)"),
    declare("rope_kv_write", "q = rope(a, p)", "k = rope(b, p)", "kv_write(k, v)"),
    declare("linear_add", "o = linear(x)", "y = add(r, o)"),
)
"""Every fusion, longest first: where two could match, the earlier one wins."""
