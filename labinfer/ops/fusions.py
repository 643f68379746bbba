"""Fused ops, declared as what they are made of: a backend may have a kernel for the whole; all can run the parts.

Each part is written ``results = kind(operands)``; names bind values. A value made and used inside the fusion must not
be needed outside it. The results of the fused op are those values that are not used up inside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from labinfer.ops.base import OPS


@dataclass(frozen=True, slots=True)
class Part:
    """One primitive op of a fusion, its operands and results by the fusion's own names."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fusion:
    """A chain of primitive ops that stand one after another in the schedule.

    ``inplace`` maps a result of the fused op to the operands it may be written over, as in ``OpSpec``; operands are
    numbered as the parts first name them. Where it is ``joined``, the rows of its results lie side by side, as if it
    made one: products of the same activations then are one.
    """

    kind: str
    parts: tuple[Part, ...]
    inplace: Mapping[int, tuple[int, ...]]
    joined: bool = False


_PART = re.compile(r"^(?:(?P<outs>[\w, ]+) = )?(?P<kind>\w+)\((?P<ins>[\w, ]+)\)$")


def declare(
    kind: str, *parts: str, inplace: Mapping[int, tuple[int, ...]] | None = None, joined: bool = False
) -> Fusion:
    """A fusion from the text of its parts."""
    parsed = []
    for text in parts:
        match = _PART.match(text)
        if match is None:
            raise ValueError(f"fusion '{kind}': cannot read '{text}'")
        outs = tuple(name.strip() for name in (match["outs"] or "").split(",") if name.strip())
        parsed.append(Part(match["kind"], tuple(name.strip() for name in match["ins"].split(",")), outs))
    return Fusion(kind, tuple(parsed), inplace or {}, joined)


FUSIONS: tuple[Fusion, ...] = (
    declare(
        "norm_rope_attention",
        "c = rms_norm(a)",
        "d = rms_norm(b)",
        "q = rope(c, p)",
        "k = rope(d, p)",
        "kv_write(k, v)",
        "y = attention(q)",
    ),
    declare("norm_qkv", "n = rms_norm(x)", "q = linear(n)", "k = linear(n)", "v = linear(n)", joined=True),
    declare("norm_glu", "n = rms_norm(x)", "g = linear(n)", "u = linear(n)", "y = glu(g, u)"),
    declare("rope_attention", "q = rope(a, p)", "k = rope(b, p)", "kv_write(k, v)", "y = attention(q)"),
    declare("norm_head", "n = rms_norm(x)", "s = select_rows(n)", "y = linear(s)"),
    declare("rope_kv_write", "q = rope(a, p)", "k = rope(b, p)", "kv_write(k, v)", inplace={0: (0,)}),
    declare("linear_add", "o = linear(x)", "y = add(r, o)", inplace={0: (1,)}),
    declare("all_reduce_add", "s = all_reduce(x)", "y = add(r, s)", inplace={0: (1,)}),
)
"""Every fusion, longest first: where two could match, the earlier one wins."""

BY_KIND = {fusion.kind: fusion for fusion in FUSIONS}


def inplace_of(kind: str) -> Mapping[int, tuple[int, ...]]:
    """Which results of an op, primitive or fused, may be written over which operands."""
    return BY_KIND[kind].inplace if kind in BY_KIND else OPS[kind].inplace


def is_joined(kind: str) -> bool:
    """Whether the rows of an op's results lie side by side."""
    return kind in BY_KIND and BY_KIND[kind].joined


def is_view(kind: str) -> bool:
    """Whether the results of an op are windows of its first operand."""
    return kind in OPS and OPS[kind].view
