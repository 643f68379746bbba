"""The text of an answer, token by token, up to the text that ends it."""

from __future__ import annotations

from labinfer.runtime.detokenizer import StreamDecoder
from labinfer.runtime.sampling.params import SamplingParams
from labinfer.runtime.sampling.stop_strings import StopStrings


class AnswerText:
    """Decodes the tokens of one answer with ``decoder`` and ends it at the first of its stop strings.

    ``put`` and ``finish`` give the text that is certain: what may still become a stop string is held back, and the
    stop string itself is never given out, unless ``include_stop_str_in_output``. ``text`` is all that they gave,
    ``stop`` the stop string that was found. As in vLLM, none ends a text of ``min_tokens`` tokens or fewer.
    """

    def __init__(self, decoder: StreamDecoder, params: SamplingParams) -> None:
        self._decoder, self._params = decoder, params
        self._stops = StopStrings(params.stop) if params.stop else None
        self._node, self._held, self._num_tokens = 0, "", 0
        self._pieces: list[str] = []
        self.stop: str | None = None

    @property
    def text(self) -> str:
        """All that was given out."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def put(self, *token_ids: int) -> str:
        """The next tokens, one where there are stop strings; the text that is now certain: none after a stop string."""
        if self.stop is not None:
            return ""
        self._num_tokens += len(token_ids)
        return self._give(self._read(self._decoder.put(*token_ids)))

    def finish(self) -> str:
        """The answer is over: the text that was held back."""
        if self.stop is not None:
            return ""
        last = self._read(self._decoder.finish())
        held, self._held = self._held, ""
        return self._give(last + held)

    def _give(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text

    def _read(self, piece: str) -> str:
        """``piece`` and what was held back before it, as far as it is no part of a stop string."""
        if self._stops is None or not piece:
            return piece
        text, node, start = self._held + piece, self._node, len(self._held)
        may_stop = self._num_tokens > self._params.min_tokens
        for at, character in enumerate(piece, start + 1):
            node = self._stops.step(node, character)
            found = self._stops.found(node)
            if found is not None and may_stop:
                self.stop, self._held = found, ""
                return text[:at] if self._params.include_stop_str_in_output else text[: at - len(found)]
        self._node = node
        certain = len(text) - self._stops.depth(node)
        self._held = text[certain:]
        return text[:certain]
