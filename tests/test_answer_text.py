"""Stop strings: found in the text however it is cut into tokens, never given out, and in time linear in the text."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labinfer import SamplingParams
from labinfer.runtime.sampling import AnswerText
from labinfer.runtime.sampling.stop_strings import StopStrings

SOME = st.text("abc", min_size=1, max_size=5)


class Pieces:
    """A decoder whose tokens are indices of pieces of text; it holds the last character back, as real ones may."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces, self.held = pieces, ""

    def put(self, token_id: int) -> str:
        text = self.held + self.pieces[token_id]
        self.held = text[-1:]
        return text[:-1]

    def finish(self) -> str:
        return self.held


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: read on until a stop is complete, the longest of those that are."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def read(pieces: list[str], params: SamplingParams) -> tuple[list[str], AnswerText]:
    answer = AnswerText(Pieces(pieces), params)
    return [*(answer.put(token) for token in range(len(pieces))), answer.finish()], answer


@settings(max_examples=400)
@given(st.lists(st.text("abc", max_size=6), max_size=12), st.lists(SOME, min_size=1, max_size=4), st.booleans())
def test_the_text_is_that_of_a_naive_search(pieces: list[str], stops: list[str], include: bool) -> None:
    said, answer = read(pieces, SamplingParams(stop=stops, include_stop_str_in_output=include))
    assert (answer.text, answer.stop) == naive("".join(pieces), stops, include)
    assert "".join(said) == answer.text


@given(st.lists(st.text("abc", max_size=6), max_size=12), st.lists(SOME, min_size=1, max_size=4))
def test_only_what_may_become_a_stop_is_held_back(pieces: list[str], stops: list[str]) -> None:
    answer = AnswerText(Pieces(pieces), SamplingParams(stop=stops))
    decoder, known = Pieces(pieces), ""
    for token in range(len(pieces)):
        known += decoder.put(token)
        answer.put(token)
        if answer.stop is not None:
            return
        held = known[len(answer.text) :]
        assert known == answer.text + held
        assert held == "" or any(stop.startswith(held) for stop in stops)
        for longer in range(len(held) + 1, len(known) + 1):
            assert not any(stop.startswith(known[-longer:]) for stop in stops)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=12), st.lists(SOME, min_size=1, max_size=3))
def test_no_stop_within_min_tokens(pieces: list[str], stops: list[str]) -> None:
    class Whole(Pieces):
        def put(self, token_id: int) -> str:
            return self.pieces[token_id]

    answer = AnswerText(Whole(pieces), SamplingParams(stop=stops, min_tokens=3))
    for token in range(len(pieces)):
        answer.put(token)
    answer.finish()
    text, early = "".join(pieces), len("".join(pieces[:3]))
    ends = [end for end in range(early + 1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    expected = naive(text[: ends[0]][max(0, early - 4) :], stops, False) if ends else None
    if expected is None:
        assert (answer.text, answer.stop) == (text, None)
    else:
        longest = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        assert (answer.text, answer.stop) == (text[: ends[0] - len(longest)], longest)


def test_without_stops_every_piece_comes_at_once() -> None:
    said, answer = read(["ab", "c", "", "d"], SamplingParams())
    assert said == ["a", "b", "", "c", "d"]
    assert (answer.text, answer.stop) == ("abcd", None)


@pytest.mark.parametrize(
    ("pieces", "stop", "include", "text"),
    [
        (["Hello\n", "\nUser", ": hi"], ["\n\nUser:"], False, "Hello"),
        (["Hello\n", "\nUser", ": hi"], ["\n\nUser:"], True, "Hello\n\nUser:"),
        (["né", "e…", "!"], ["…"], False, "née"),
        (["aaa", "ab"], ["aab"], False, "aa"),
        (["abcd"], ["bcd", "cd", "d"], False, "a"),
        (["stop"], "stop", False, ""),
    ],
)
def test_examples(pieces: list[str], stop: Any, include: bool, text: str) -> None:
    said, answer = read(pieces, SamplingParams(stop=stop, include_stop_str_in_output=include))
    assert answer.text == "".join(said) == text
    assert answer.put(0) == ""
    assert answer.finish() == ""


def test_the_work_is_linear_whatever_the_stops() -> None:
    """Steps of the automaton are counted: each character goes down once, and up at most as often."""

    class Counted(StopStrings):
        looked = 0

        def step(self, node: int, character: str) -> int:
            at = node
            while character not in self._next[at] and at:
                at, self.looked = self._fail[at], self.looked + 1
            self.looked += 1
            return super().step(node, character)

    stops = Counted(["a" * 50 + "b", "a" * 49 + "c", *(f"word {n}" for n in range(1000))])
    stops.looked, node = 0, 0
    text = "".join(random.Random(0).choices("aaaaaaaaaaaaaaaaabw", k=20_000))
    for character in text:
        node = stops.step(node, character)
    assert stops.looked <= 2 * len(text)
