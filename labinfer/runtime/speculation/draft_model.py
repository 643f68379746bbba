"""Guesses of a smaller model with the same vocabulary, which has a plan, weights and cache blocks of its own."""

from __future__ import annotations

from collections.abc import Sequence as Listing

import numpy as np

from labinfer.errors import LabinferError, UsageError
from labinfer.runtime.batch import Part
from labinfer.runtime.model import Model
from labinfer.runtime.request import Sequence
from labinfer.runtime.sampling import SamplingState, sample

NEAR = 16
"""A draft that is so many tokens behind its sequence reads them in the same step as it makes the first guess."""

PIECE = 64
"""Tokens of a prompt that a draft reads beside a step of the model while somebody waits for each token."""


class DraftModel:
    """Makes up to ``num_tokens`` guesses of a sequence with ``model``, in a row of its batch for each sequence.

    A guess is sampled as the model will sample the token: by the same rules and with the same random number. So the two
    agree as often as their distributions let them (a coupling), and a draft that is the model itself is always right.
    """

    def __init__(self, model: Model, num_tokens: int) -> None:
        self.model, self.batch, self.num_tokens = model, model.batch, num_tokens
        self.rows: dict[Sequence, int] = {}
        blocks = model.blocks
        bounds = [bound for bound in (blocks.recompute_after, blocks.reuse_until) if bound is not None]
        self.max_len = min([model.max_len, *bounds])

    def check(self, model: Model) -> None:
        """``UsageError`` if the tokens of ``model``, for which the guesses are, are not the same."""
        mine, other = self.model, model
        same = mine.vocab_size == other.vocab_size
        if same and mine.tokenizer is not None and other.tokenizer is not None:
            same = mine.tokenizer.token_bytes(mine.vocab_size) == other.tokenizer.token_bytes(other.vocab_size)
        if not same:
            message = f"the draft {mine.plan.source.name} has another vocabulary than {other.plan.source.name}"
            raise UsageError("speculation.vocabulary", message, remedy="take a smaller model of the same family")

    def propose(self, sequences: Listing[Sequence], most: Listing[int]) -> list[np.ndarray]:
        """Up to ``most`` tokens for each of ``sequences``, int32.

        None yet for those whose prompt is still read, and none past as many sequences as the draft's plan has.
        """
        self.release()
        follows = self.model.plan.limits.max_num_seqs
        made = self.guess(sequences[:follows], most[:follows])
        return made + [np.zeros(0, np.int32)] * (len(sequences) - len(made))

    def guess(self, sequences: Listing[Sequence], most: Listing[int]) -> list[np.ndarray]:
        """What ``propose`` gives, for as many sequences as fit in a step."""
        batch, made = self.batch, np.zeros(len(sequences), np.int32)
        rows = np.array([self.follow(each) for each in sequences])
        known = batch.num_tokens[rows]
        batch.blocks.commit(rows, batch.num_computed[rows], batch.token_ids)
        self.read(rows, any(each.request.interactive for each in sequences))
        left = np.where(self.ready(rows) & (known + most <= self.max_len), most, 0)
        states = [each.state and each.state.fork(each.state.index) for each in sequences]
        while len(active := left.nonzero()[0]):
            logits = self.step(rows[active])
            if logits is None:
                break
            here = {at: state for at, index in enumerate(active.tolist()) if (state := states[index]) is not None}
            tokens = sample(logits, here).tokens
            left[active] -= 1
            for index, token in zip(active.tolist(), tokens.tolist(), strict=True):
                if token >= 0:
                    batch.extend(int(rows[index]), [token])
                    made[index] += 1
                if token < 0 or ends(sequences[index], states[index], token):
                    left[index] = 0
        return [batch.token_ids[row, at : at + count] for row, at, count in zip(rows, known, made, strict=True)]

    def follow(self, sequence: Sequence) -> int:
        """The row of ``sequence``, with its tokens; of what was guessed and computed, only what came true is left."""
        batch, tokens = self.batch, sequence.token_ids
        row = self.rows.get(sequence)
        if row is None:
            salt = sequence.batch.salts[sequence.row]  # texts that share no blocks there share none here
            row = self.rows[sequence] = batch.add(tokens[: self.max_len], salt)
            batch.attach(row)
            return row
        count = min(len(tokens), self.max_len)
        computed = min(int(batch.num_computed[row]), count - 1)
        wrong = (batch.token_ids[row, :computed] != tokens[:computed]).nonzero()[0]
        batch.num_computed[row], batch.num_tokens[row] = min([computed, *wrong[:1].tolist()]), count
        batch.token_ids[row, :count] = tokens[:count]
        return row

    def read(self, rows: np.ndarray, interactive: bool) -> None:
        """Compute a piece of the texts that are far behind."""
        batch, most = self.batch, self.model.plan.limits.max_num_batched_tokens
        behind = batch.num_tokens[rows] - batch.num_computed[rows] - 1
        behind[behind < NEAR] = 0
        budget = min(PIECE, most) if interactive else most
        counts = np.clip(budget - (np.cumsum(behind) - behind), 0, behind).astype(np.int32)
        chosen = counts.nonzero()[0]
        if len(chosen):
            none = np.zeros(len(chosen), np.int32)
            part = Part(rows[chosen], counts[chosen], none, none)
            if self.compute(part) is not None:
                batch.commit(part)

    def ready(self, rows: np.ndarray) -> np.ndarray:
        """Which of ``rows`` can make a guess in the next step."""
        limits, behind = self.model.plan.limits, self.batch.num_tokens[rows] - self.batch.num_computed[rows]
        near = behind <= NEAR
        fits = np.cumsum(np.where(near, behind, 0)) <= limits.max_num_batched_tokens
        found: np.ndarray = near & fits & (np.cumsum(near) <= limits.max_logits_rows)
        return found

    def step(self, rows: np.ndarray) -> np.ndarray | None:
        """Logits after the last token of each of ``rows``; None without room."""
        ones = np.ones(len(rows), np.int32)
        return self.compute(Part(rows, self.batch.num_tokens[rows] - self.batch.num_computed[rows], ones, ones))

    def compute(self, part: Part) -> np.ndarray | None:
        """Run a step, whose tokens others may not reuse before it is known that they came true; None without room."""
        if self.batch.grow(part) is not None:
            self.batch.blocks.shrink(part.rows, self.batch.num_computed[part.rows])
            return None
        logits = self.model.run(self.batch.step(part))
        self.batch.num_computed[part.rows] += part.counts
        return logits

    def release(self) -> None:
        """Give back the rows of sequences that do not run any more."""
        for sequence in [each for each in self.rows if each.row < 0]:
            self.batch.remove(self.rows.pop(sequence))

    def close(self) -> None:
        """Give everything back."""
        self.model.close()


def ends(sequence: Sequence, state: SamplingState | None, token: int) -> bool:
    """Whether an answer whose next token is the guess ``token`` would end with it; ``state`` goes on by it."""
    try:
        return (state.accept(token) if state is not None else sequence.request.rules.stop(token)) is not None
    except LabinferError:
        return True
