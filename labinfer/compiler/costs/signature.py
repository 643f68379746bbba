"""The signature of an op: everything its time depends on, but for the size of the step and the device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from labinfer.compiler.graph import Op, State, Weight, plain_attrs
from labinfer.compiler.plan import Limits
from labinfer.ops.base import KernelOptions, TensorType

Axis = Literal["rows", "context", "tokens"]


@dataclass(frozen=True, slots=True)
class Signer:
    """Writes signatures of the ops of one model on one device; ``types`` has the values that the ops name."""

    types: Mapping[str, TensorType]
    weights: Mapping[str, Weight]
    states: Mapping[str, State]
    limits: Limits
    options: KernelOptions

    def signature(self, op: Op) -> str:
        """Kind, operands, weights by format and shape, attributes, and how cache and products are kept and computed.

        ``norm_glu(f32[T, 576]) f32[576] q4_1[1536, 576] q4_1[1536, 576] {"eps": 1e-05}``
        """
        parts = op.primitives()
        operands = ", ".join(str(self.types[name]) for name in op.inputs if name in self.types)
        weights = [self.weights[name] for part in parts for name in part.weights.values()]
        words = [f"{op.kind}({operands})", *(f"{each.format}{list(each.shape)}" for each in weights)]
        words += [json.dumps(attrs, sort_keys=True) for part in parts if (attrs := plain_attrs(part.attrs))]
        for name in dict.fromkeys(part.state for part in parts if part.state):
            words.append(f"cache {self.limits.kv_dtype} {dict(self.states[name].widths)} x {self.limits.block_size}")
        products = {each.format for each in weights if len(each.shape) > 1}
        if products and self.options.activations != "exact":
            words.append(self.options.activations)
        if fewest := sorted({self.options.matrix_unit[name] for name in products if name in self.options.matrix_unit}):
            words.append(f"matrix unit from {', '.join(map(str, fewest))}")
        return " ".join(words)

    def axis(self, op: Op) -> Axis:
        """What its time grows with: the rows of logits, the tokens, or also the context where it reads the cache."""
        parts = op.primitives()
        if any(part.state and part.outputs for part in parts):
            return "context"
        made = [self.types[name] for part in parts for name in part.outputs if name in self.types]
        return "rows" if any(kind.shape[:1] == ("R",) for kind in made) else "tokens"
