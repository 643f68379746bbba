"""A device whose tokens tell whether the cache held the right ones: each is made from all that attention sees.

Steps store token ids, marked with the sequence's adapter, as keys, and read them back through the step's block tables.
A wrong, stale or shared block changes what follows, and what should follow is known from the tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from zlib import crc32

import numpy as np

from labinfer.llm import LLM
from labinfer.ops.base import NO_ADAPTER
from labinfer.runtime.lora import LoRARequest, fingerprint
from labinfer.runtime.request import Sequence as RunningSequence
from labinfer.runtime.sampling import SamplingParams, SamplingRules, SamplingState, sample
from labinfer.runtime.step_memory import StepBatch


def logits_of(texts: Sequence[Sequence[float]], starts: Sequence[int], vocab_size: int) -> np.ndarray:
    """Logits after what each group sees: the tokens from position ``starts`` on."""
    mixed = 0
    for text, start in zip(texts, starts, strict=True):
        mixed = mixed * 31 + sum((start + at + 1) * (int(token) + 7) for at, token in enumerate(text))
    return np.random.default_rng(mixed).random(vocab_size, np.float32) * 4


def mark(salt: str | None) -> int:
    """What is added to the tokens of a sequence whose adapter has this salt."""
    return 128 * (1 + crc32(salt.encode()) % 1000) if salt else 0


def marks_of(model: LLM, batch: StepBatch) -> np.ndarray:
    """The mark of each token of a step."""
    slots = [NO_ADAPTER] * len(batch.context_len) if batch.adapter is None else batch.adapter.tolist()
    marks = [0 if slot == NO_ADAPTER else mark(model.adapters.slots[slot].salt) for slot in slots]
    return np.repeat(marks, np.diff(batch.query_start))


def remember_tokens(model: LLM) -> None:
    """Replace what ``model`` computes."""
    groups, size = model.plan.limits.groups, model.plan.limits.block_size
    memory = [
        next(cache.blocks[group][0] for cache in model.cache.arrays if cache.blocks[group])
        for group in range(len(groups))
    ]
    width = [array.shape[1] // size for array in memory]

    def run(batch: StepBatch) -> np.ndarray:
        marked = batch.token_ids + marks_of(model, batch)
        for array, slots, each in zip(memory, batch.slot_mappings, width, strict=True):
            array.reshape(-1, each)[slots, 0] = marked
        rows = np.empty((len(batch.logits_rows), model.vocab_size), np.float32)
        for row, token in enumerate(batch.logits_rows):
            sequence = int(np.searchsorted(batch.query_start, token, "right")) - 1
            end = int(batch.positions[token]) + 1
            texts, starts = [], []
            for group, array, table, each in zip(groups, memory, batch.block_tables, width, strict=True):
                starts.append(max(0, end - group.window) if group.window else 0)
                places = np.arange(starts[-1], end)
                slots = table[sequence, places // size] * size + places % size
                texts.append(array.reshape(-1, each)[slots, 0].tolist())
            rows[row] = logits_of(texts, starts, model.vocab_size)
        return rows

    def decode(batch: StepBatch, counts: Iterable[int]) -> Iterator[np.ndarray]:
        for count in counts:
            made = np.empty((count, len(batch.token_ids)), np.int32)
            for step in range(count):
                made[step] = run(batch).argmax(1)
                batch = next_step(batch, made[step], size)
            yield made

    model.run, model.decode = run, decode  # type: ignore[method-assign]


def next_step(batch: StepBatch, tokens: np.ndarray, size: int) -> StepBatch:
    """The decode step after ``batch``, which made ``tokens``."""
    positions, rows = batch.positions + 1, np.arange(len(tokens))
    padded = [np.pad(table, ((0, 0), (0, 1))) for table in batch.block_tables]  # the last step is followed by none
    slots = [table[rows, positions // size] * size + positions % size for table in padded]
    context, total = batch.context_len + 1, batch.total_len + 1
    return replace(
        batch, token_ids=tokens, positions=positions, context_len=context, total_len=total, slot_mappings=slots
    )


def expected_tokens(
    model: LLM,
    prompt: Sequence[int],
    params: SamplingParams,
    seed: int,
    index: int = 0,
    lora: LoRARequest | None = None,
) -> list[int]:
    """What such a model answers."""
    marked = mark(fingerprint(lora.path)) if lora else 0
    tokens, limits = list(prompt), model.plan.limits
    state = SamplingState(SamplingRules(params, model.vocab_size), seed, index, prompt)
    most = min(len(prompt) + (params.max_tokens or model.max_len), model.max_len)
    while len(tokens) < most:
        starts = [max(0, len(tokens) - group.window) if group.window else 0 for group in limits.groups]
        texts = [[token + marked for token in tokens[start:]] for start in starts]
        logits = logits_of(texts, starts, model.vocab_size)
        tokens.append(int(sample(logits[np.newaxis], {0: state}).tokens[0]))
        if state.accept(tokens[-1]):
            break
    return tokens[len(prompt) :]


class Knowing:
    """A proposer that knows what will come, and gives every ``wrong``-th guess wrong."""

    def __init__(self, model: LLM, num_tokens: int, wrong: int) -> None:
        self.model, self.num_tokens, self.wrong = model, num_tokens, wrong
        self.known: dict[RunningSequence, list[int]] = {}
        self.given = 0

    def propose(self, sequences: Sequence[RunningSequence], most: Sequence[int]) -> list[np.ndarray]:
        """What follows, as far as the answer goes."""
        return [self.guesses(each, count) for each, count in zip(sequences, most, strict=True)]

    def guesses(self, sequence: RunningSequence, count: int) -> np.ndarray:
        """Up to ``count`` tokens of the answer of ``sequence``."""
        request = sequence.request
        if sequence not in self.known:
            text = expected_tokens(self.model, request.prompt, request.params, request.seed, sequence.index)
            self.known[sequence] = text
        made = len(sequence.token_ids) - len(request.prompt)
        tokens = np.array(self.known[sequence][made : made + count], np.int32)
        numbers = self.given + np.arange(len(tokens))
        self.given += len(tokens)
        return np.where(numbers % self.wrong == 0, (tokens + 1) % self.model.vocab_size, tokens).astype(np.int32)

    def release(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""
