"""Finds calls in a text while it is written."""

from __future__ import annotations

import uuid
from typing import Any, Protocol

from labinfer.service.tools.formats import ToolCall, ToolFormat, parse_json

Delta = dict[str, Any]
"""What is told of a message: some of its ``content``, or of its ``tool_calls``."""


class Reader(Protocol):
    """Turns a text, as it is written, into what a message says."""

    @property
    def called(self) -> bool:
        """Whether there was a call."""

    def put(self, text: str) -> list[Delta]:
        """More of the text."""

    def finish(self) -> list[Delta]:
        """The text is at its end."""


class PlainReader:
    """All of the text is what is said."""

    called = False

    def put(self, text: str) -> list[Delta]:
        """More of the text."""
        return [{"content": text}] if text else []

    def finish(self) -> list[Delta]:
        """The text is at its end."""
        return []


class CallWriter:
    """Writes calls as deltas: of each first its id and name, then its arguments."""

    def __init__(self) -> None:
        self.count = 0

    def begin(self, name: str) -> Delta:
        """A call begins."""
        self.count += 1
        function = {"name": name, "arguments": ""}
        call = {"index": self.count - 1, "id": new_call_id(), "type": "function", "function": function}
        return {"tool_calls": [call]}

    def arguments(self, text: str) -> Delta:
        """Arguments of the call that has begun."""
        return {"tool_calls": [{"index": self.count - 1, "function": {"arguments": text}}]}

    def whole(self, calls: list[ToolCall]) -> list[Delta]:
        """Calls that are complete."""
        return [delta for call in calls for delta in (self.begin(call.name), self.arguments(call.arguments))]


def new_call_id() -> str:
    """An id for a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


class CallReader:
    """Reads what a model writes in ``form``: text, and calls between the form's marks.

    Text that may yet become a mark is held back, and so is white space before one.
    """

    def __init__(self, form: ToolFormat) -> None:
        self.form, self.writer = form, CallWriter()
        self.held, self.inside, self.begun = "", False, False

    @property
    def called(self) -> bool:
        """Whether there was a call."""
        return self.writer.count > 0

    def put(self, text: str) -> list[Delta]:
        """More of the text."""
        self.held += text
        found: list[Delta] = []
        while True:
            if not self.inside:
                if not self.look_for_begin(found):
                    return found
            elif self.form.end is None or self.form.end not in self.held:
                return found
            else:
                body, _, self.held = self.held.partition(self.form.end)
                self.close(body, self.form.end, found)

    def look_for_begin(self, found: list[Delta]) -> bool:
        """Give out the text before a mark; whether there is one."""
        if self.form.whole and not self.begun and self.held.lstrip().startswith("{"):
            self.inside, self.begun = True, True
            return True
        before, mark, rest = self.held.partition(self.form.begin)
        if not mark:
            keep = held_back(self.held, self.form.begin)
            before, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        else:
            before, self.held, self.inside = before.rstrip(), rest, True
        if before:
            self.begun = True
            found.append({"content": before})
        return bool(mark)

    def close(self, body: str, end: str, found: list[Delta]) -> None:
        """The calls in ``body``, or the text that it is with its marks."""
        self.inside = False
        calls = self.form.parse(body.strip())
        if calls is None:
            begin = "" if self.form.whole else self.form.begin
            found.append({"content": begin + body + end})
        else:
            found += self.writer.whole(calls)

    def finish(self) -> list[Delta]:
        """The text is at its end."""
        found: list[Delta] = []
        text, self.held = self.held, ""
        if self.inside:
            self.close(text, "", found)
        elif text and not (self.called and text.isspace()):
            found.append({"content": text})
        return found


def held_back(text: str, mark: str) -> int:
    """How many characters at the end of ``text`` may be white space and the beginning of ``mark``."""
    longest = next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
    stem = text[: len(text) - longest]
    return longest + len(stem) - len(stem.rstrip())


class NamedReader:
    """The text is the arguments of the function ``name``."""

    def __init__(self, name: str) -> None:
        self.name, self.writer = name, CallWriter()

    @property
    def called(self) -> bool:
        """Whether the call has begun."""
        return self.writer.count > 0

    def put(self, text: str) -> list[Delta]:
        """More of the text."""
        if not text:
            return []
        begin = [] if self.called else [self.writer.begin(self.name)]
        return [*begin, self.writer.arguments(text)]

    def finish(self) -> list[Delta]:
        """The text is at its end."""
        return []


class ListReader:
    """The text is a JSON list of calls."""

    def __init__(self) -> None:
        self.text, self.writer = "", CallWriter()

    @property
    def called(self) -> bool:
        """Whether there was a call."""
        return self.writer.count > 0

    def put(self, text: str) -> list[Delta]:
        """More of the text."""
        self.text += text
        return []

    def finish(self) -> list[Delta]:
        """The text is at its end; one that was cut off is told as it is."""
        calls = parse_json(self.text)
        if calls is None:
            return [{"content": self.text}] if self.text else []
        return self.writer.whole(calls)


class MessageBuilder:
    """Puts deltas together to a message."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.calls: list[dict[str, Any]] = []

    def add(self, delta: Delta) -> None:
        """Add one."""
        if (text := delta.get("content")) is not None:
            self.texts.append(text)
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(self.calls):
                self.calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
            else:
                self.calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]

    def message(self) -> dict[str, Any]:
        """The message; its content is null where there are calls alone."""
        text = "".join(self.texts)
        found: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.calls:
            found |= {"content": text or None, "tool_calls": self.calls}
        return found
