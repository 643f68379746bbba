"""What is told of sequences, after the step that made it: their text, their ends, and whoever listens."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from labinfer.runtime.request import Request, Sequence
from labinfer.runtime.sampling import AnswerText
from labinfer.runtime.tokenizer import Tokenizer


class News(NamedTuple):
    """Something to tell of a sequence of ``request``: a token, if any, and whether that is all."""

    request: Request
    sequence: Sequence
    token: int | None
    last: bool


class Delivery:
    """Keeps news in order until ``deliver``.

    ``end(sequence, reason)`` is called where a sequence's text ends it, ``done(request)`` for each finished request.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, end: Callable[[Sequence, str], None], done: Callable[[Request], None]
    ) -> None:
        self.tokenizer, self.end, self.done = tokenizer, end, done
        self.news: deque[News] = deque()
        self.concluded = threading.Condition()

    def put(self, sequence: Sequence, token: int | None, last: bool) -> None:
        """Something to be told."""
        self.news.append(News(sequence.request, sequence, token, last))

    def deliver(self) -> None:
        """Tell what was put since the last time.

        A sequence that a running step still computes is not told to have ended, unless all its tokens were told.
        """
        early = []
        try:
            while self.news:
                _, sequence, token, last = news = self.news.popleft()
                if sequence.done:
                    continue
                if last and sequence.row >= 0 and not sequence.heard:
                    early.append(news)
                else:
                    self.tell(sequence, token, last)
        finally:
            self.news.extend(early)

    def tell(self, sequence: Sequence, token: int | None, last: bool) -> None:
        """Tell a sequence's news to whoever listens."""
        stopped = sequence.answer is not None and sequence.answer.stop is not None  # before the end of its step
        if sequence.heard and token is not None and not stopped:
            sequence.told.append(token)
        self.write(sequence, token, last)
        if last:
            self.conclude(sequence)
        if (listener := sequence.request.listener) is not None:
            listener(sequence)

    def write(self, sequence: Sequence, token: int | None, last: bool) -> None:
        """Add the text of ``token`` to that of its sequence: of all tokens at its end, where none was told before."""
        request = sequence.request
        if self.tokenizer is None or not request.params.detokenize:
            return
        if sequence.answer is None:
            skip = request.params.skip_special_tokens
            sequence.answer = AnswerText(
                self.tokenizer.stream(request.prompt, skip_special_tokens=skip), request.params
            )
        tokens = [] if token is None else [token]
        if last and not sequence.heard:
            tokens = sequence.token_ids[len(request.prompt) :].tolist()
        if last and not sequence.ends_in_text:
            tokens = tokens[:-1]
        answer = sequence.answer
        if piece := answer.put(*tokens):
            sequence.pieces.append(piece)
        if answer.stop is not None:
            self.end(sequence, "stop")
            sequence.finish_reason, sequence.stop_reason = "stop", answer.stop
        elif last and (piece := answer.finish()):
            sequence.pieces.append(piece)

    def conclude(self, sequence: Sequence) -> None:
        """Everything is told of ``sequence``."""
        request, metrics = sequence.request, sequence.request.metrics
        sequence.done = True
        metrics.num_generation_tokens += len(sequence.generated)
        if request.finished:
            metrics.finished_time = time.perf_counter()
            self.done(request)
            with self.concluded:
                self.concluded.notify_all()
