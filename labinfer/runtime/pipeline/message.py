"""What frames hold: steps that go down the chain of stages, tokens that go back to its beginning, results and errors.

A step comes to a stage as a frame with its batch, a list of int32: nine counts, then the arrays; ``pending`` tokens are
those that an earlier step makes, and ``copies`` cache blocks to be copied before. Stages pass that on before they
compute, so that the next one is prepared when its values come. These are another frame, which the engine does not
send: when each stage began and ended, float64 seconds of ``time.monotonic``, and what later stages need.

Between steps cache blocks come and go, one a frame: ``BlockFrame`` as int32, then the bytes of each stage. Those of a
``FETCH`` frame are added by each stage, until it comes back to the engine; those of a ``FILL`` frame are taken.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np

from labinfer.compiler.fold import unfold_inputs
from labinfer.compiler.plan import Limits, Plan
from labinfer.errors import DoesNotFit, InvalidFile, LabinferError, StalePlan, UsageError, WeightsError
from labinfer.ops.base import TensorType
from labinfer.runtime.kv_cache import block_bytes
from labinfer.runtime.step_memory import StepBatch

STEP, VALUES, TOKENS, LOGITS, FAILED, FETCH, FILL = range(7)
"""Kinds of frames."""

_ERRORS = {
    kind.__name__: kind for kind in (UsageError, InvalidFile, DoesNotFit, WeightsError, StalePlan, LabinferError)
}
_COUNTS = 9
_NONE = np.zeros((0, 3), np.int32)


@dataclass(slots=True)
class StepMessage:
    """A batch and how it runs: ``wants_logits`` asks for all its logits beside the likeliest token of each row.

    ``pending`` [P, 3] int32: place in ``token_ids``, the step (modulo 2^31) that makes the token, and its row there.
    ``copies`` [C, 3]: cache group, source and target block.
    """

    batch: StepBatch
    wants_logits: bool = False
    pending: np.ndarray = field(default_factory=lambda: _NONE)
    copies: np.ndarray = field(default_factory=lambda: _NONE)

    def encode(self) -> np.ndarray:
        """The batch's frame, int32."""
        batch, tables = self.batch, self.batch.block_tables
        counts = [
            len(batch.token_ids), len(batch.context_len), len(batch.logits_rows), len(tables),
            tables[0].shape[1] if tables else 0, self.wants_logits, len(self.pending), len(self.copies),
            batch.adapter is not None,
        ]  # fmt: skip
        parts = [np.array(counts, np.int32), batch.token_ids, batch.positions, batch.query_start, batch.context_len]
        parts += [batch.total_len, batch.logits_rows]
        for table, slots in zip(tables, batch.slot_mappings, strict=True):
            parts += [table.reshape(-1), slots]
        if batch.adapter is not None:
            parts.append(batch.adapter)
        return np.concatenate([*parts, self.pending.reshape(-1), self.copies.reshape(-1)], dtype=np.int32)


def decode(words: np.ndarray, limits: Limits) -> StepMessage:
    """The message in a batch's frame; its arrays are windows of ``words``. One beyond ``limits`` is an error."""
    tokens, sequences, rows, groups, width, wants_logits, pending, copies, adapters = words[:_COUNTS].tolist()
    shapes = [(tokens,), (tokens,), (sequences + 1,), (sequences,), (sequences,), (rows,)]
    shapes += [(sequences, width), (tokens,)] * groups + [(sequences * adapters,), (pending, 3), (copies, 3)]
    bounds = [0, *np.cumsum([prod(shape) for shape in shapes]).tolist()]
    fits = 0 < tokens <= limits.max_num_batched_tokens and sequences <= limits.max_num_seqs
    if not fits or groups != len(limits.groups) or rows > limits.max_logits_rows or bounds[-1] != len(words) - _COUNTS:
        raise LabinferError("pipeline.message", "a step arrived that is not within the plan's bounds")
    arrays = [
        words[_COUNTS + start : _COUNTS + stop].reshape(shape)
        for (start, stop), shape in zip(pairwise(bounds), shapes, strict=True)
    ]
    token_ids, positions, query_start, context_len, total_len, logits_rows = arrays[:6]
    tables, slots, adapter = arrays[6:-3:2], arrays[7:-3:2], arrays[-3] if adapters else None
    batch = StepBatch(token_ids, positions, query_start, context_len, total_len, logits_rows, tables, slots, adapter)
    return StepMessage(batch, bool(wants_logits), arrays[-2], arrays[-1])


def max_words(limits: Limits) -> int:
    """Numbers of a batch's frame at the plan's bounds; copies are as many as there are blocks, at most."""
    blocks = sum(group.num_blocks for group in limits.groups)
    return _COUNTS + limits.step_bytes // 4 + 3 * (limits.max_num_seqs + blocks)


def crossing(plan: Plan) -> list[list[str]]:
    """For each stage, the values that arrive with a step: what it or a later one needs of earlier ones."""
    leads = [ranks[0] for ranks in plan.groups]
    needed = [list(stage.inputs) for stage in leads]
    made: set[str] = set()
    arriving = []
    for number, stage in enumerate(leads):
        later = dict.fromkeys(name for names in needed[number:] for name in names)
        arriving.append([name for name in later if name in made])
        made.update(stage.outputs)
    return arriving


def crossing_types(plan: Plan) -> dict[str, TensorType]:
    """The types of all values that stages need of others."""
    return {name: slot.type for stage in plan.stages for name, slot in unfold_inputs(stage).items()}


def frame_bytes(plan: Plan) -> int:
    """Bytes of the largest frame: a batch, all values that cross between stages, a step's logits, or a block."""
    limits = plan.limits
    tokens, rows = limits.max_num_batched_tokens, limits.max_logits_rows
    sizes = {name: kind.nbytes(tokens, rows) for name, kind in crossing_types(plan).items()}
    values = max(sum(sizes[name] for name in names) for names in crossing(plan))
    logits = 4 * limits.max_logits_rows * (plan.vocab_size + 1)
    blocks = max(map(sum, zip(*block_bytes(plan), strict=True))) + 4 * max_words(limits)
    return max(blocks, values, logits, 1 << 16) + 16 * len(plan.groups)


class BlockFrame(NamedTuple):
    """Which block of a cache group a frame fetches or fills, and ``copies`` of blocks [C, 3] to be made before."""

    group: int
    block: int
    copies: np.ndarray = _NONE

    def encode(self) -> np.ndarray:
        """Its words, int32."""
        return np.concatenate([[self.group, self.block], self.copies.reshape(-1)], dtype=np.int32)


def decode_block(words: np.ndarray, limits: Limits) -> BlockFrame:
    """What the words of a frame say; an error beyond ``limits``."""
    if len(words) < 2 or len(words) % 3 != 2:
        raise LabinferError("pipeline.message", "a block arrived that has no number")
    group, block, copies = int(words[0]), int(words[1]), words[2:].reshape(-1, 3)
    counts = np.array([each.num_blocks for each in limits.groups])
    if not 0 <= group < len(counts) or not 0 <= block < counts[group]:
        raise LabinferError("pipeline.message", "a block arrived that the plan does not have")
    if (copies < 0).any() or (copies[:, 0] >= len(counts)).any() or (copies[:, 1:] >= counts[copies[:, :1]]).any():
        raise LabinferError("pipeline.message", "a copy of a block is asked for that the plan does not have")
    return BlockFrame(group, block, copies)


def encode_error(error: LabinferError) -> bytes:
    """The section of a ``FAILED`` frame."""
    kind = next(name for name, kind in _ERRORS.items() if isinstance(error, kind))
    told = {"kind": kind, "code": error.code, "message": error.message[:10_000], "remedy": error.remedy}
    return json.dumps(told).encode()


def decode_error(text: bytes | bytearray) -> LabinferError:
    """The error of a ``FAILED`` frame."""
    found = json.loads(text)
    return _ERRORS[found["kind"]](str(found["code"]), str(found["message"]), remedy=found["remedy"])


def view(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, which can be written there."""
    return array.data.cast("B") if array.size else memoryview(bytearray())


def views(arrays: Sequence[np.ndarray]) -> list[memoryview]:
    """The bytes of arrays."""
    return [view(np.ascontiguousarray(array)) for array in arrays]
