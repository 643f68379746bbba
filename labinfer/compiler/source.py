"""YAML text to plain data that remembers places, so that every later error can say file:line:column.

The language is a strict subset of YAML 1.2 (core schema, https://yaml.org/spec/1.2.2/#103-core-schema): one document,
string keys, no duplicate keys, no anchors, aliases, merge keys or tags. The tree is built in one pass over the parser's
events, without recursion, so that nesting, size and node caps hold before memory is spent.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from labinfer.errors import ErrorSink, InvalidFile, Place

MAX_MAP_BYTES = 1_000_000

NodeValue: TypeAlias = "bool | int | float | str | list[Node] | dict[str, Node] | None"


@dataclass(frozen=True, slots=True)
class Node:
    """One element of a YAML file and where it stands; ``key_places`` says where each key of a mapping stands."""

    value: NodeValue
    place: Place
    key_places: dict[str, Place] = field(default_factory=dict)

    def plain(self) -> Any:
        """The element as plain Python data, places dropped."""
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return self.value


def place_of(node: Node, steps: Iterable[str | int]) -> Place:
    """Where the element stands that ``steps`` (keys and indices) lead to, or the last one on the way to it."""
    place = node.place
    for step in steps:
        value = node.value
        if isinstance(value, dict) and step in value:
            place, node = node.key_places.get(str(step), place), value[str(step)]
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            node = value[step]
            place = node.place
    return place


def read_text(path: Path, max_bytes: int = MAX_MAP_BYTES) -> str:
    """The text of the file ``path``. Raises ``InvalidFile`` with codes ``file.*`` and ``yaml.*``."""
    return _decode(_read_bytes(path, max_bytes), str(path))


def load_yaml(
    path: Path | str,
    *,
    text: str | None = None,
    max_bytes: int = MAX_MAP_BYTES,
    max_depth: int = 32,
    max_nodes: int = 50_000,
) -> Node:
    """Read the YAML file ``path`` (or ``text``, with ``path`` as its name in errors) into a tree of ``Node``.

    Raises ``InvalidFile``, or ``Errors`` holding all errors of the file, with codes ``file.*`` and ``yaml.*``.
    """
    file = str(path)
    if text is None:
        text = read_text(Path(path), max_bytes)
    elif len(text) > max_bytes:
        raise _too_large(file, max_bytes)
    sink = ErrorSink()
    root: Node | None = None
    try:
        root = _TreeBuilder(file, text.removeprefix("\ufeff"), sink, max_depth, max_nodes).build()
    except InvalidFile as error:  # parsing cannot go on; what was collected before it is still told
        sink.add(error)
    sink.check()
    assert root is not None
    return root


def _too_large(file: str, max_bytes: int) -> InvalidFile:
    return InvalidFile("yaml.too-large", f"the file is larger than {max_bytes:,} bytes", place=Place(file))


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size > max_bytes:
            raise _too_large(str(path), max_bytes)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)  # bounded too for pipes, and for a file that grows
    except FileNotFoundError:
        raise InvalidFile("file.not-found", "no such file", place=Place(str(path))) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidFile("file.unreadable", f"cannot be read: {reason}", place=Place(str(path))) from None
    if len(data) > max_bytes:
        raise _too_large(str(path), max_bytes)
    return data


def _decode(data: bytes, file: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        place = _Lines(file, before).place_at(len(before))
        message = f"byte 0x{data[error.start]:02x} is not valid UTF-8"
        raise InvalidFile("yaml.encoding", message, place=place, remedy="save the file as UTF-8") from None


class _Lines:
    """The lines of a text, to turn parser positions into places."""

    line_break = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # what YAML 1.1 parsers count as line breaks

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text
        self.lines = self.line_break.split(text)

    def place(self, line: int, column: int) -> Place:
        """The place of a parser mark; ``line`` and ``column`` count from 0."""
        if line >= len(self.lines):  # the C parser counts a line break at the end of the text
            line, column = len(self.lines) - 1, len(self.lines[-1])
        return Place(self.file, line + 1, column + 1, self.lines[line])

    def place_at(self, offset: int) -> Place:
        """The place of the character at ``offset``."""
        before = self.line_break.split(self.text[:offset])
        return self.place(len(before) - 1, len(before[-1]))


class _Open:
    """A collection under construction; of a mapping, ``key`` waits for its value while ``has_key`` holds."""

    __slots__ = ("has_key", "key", "node")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.has_key = False
        self.key: tuple[str, Place] | None = None  # None: the key was refused, its value is dropped


class _TreeBuilder:
    """Builds the tree from parser events. What can be skipped over goes to ``sink``, what cannot is raised."""

    not_printable = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

    def __init__(self, file: str, text: str, sink: ErrorSink, max_depth: int, max_nodes: int) -> None:
        self.lines = _Lines(file, text)
        self.text, self.sink, self.max_depth, self.max_nodes = text, sink, max_depth, max_nodes
        self.root: Node | None = None
        self.open: list[_Open] = []

    def build(self) -> Node:
        self._check_text()
        import yaml  # here, so that commands that read no map start faster

        try:
            self._consume(yaml)
        except yaml.MarkedYAMLError as error:
            self._syntax_error(error)
        except yaml.YAMLError as error:  # the reader's errors carry no mark
            raise InvalidFile("yaml.syntax", str(error), place=Place(self.lines.file)) from None
        if self.root is None or self.root.value is None:
            raise InvalidFile("yaml.empty", "the file is empty", place=Place(self.lines.file))
        return self.root

    def _consume(self, yaml: Any) -> None:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        scalar, mapping, sequence = yaml.ScalarEvent, yaml.MappingStartEvent, yaml.SequenceStartEvent
        ends = (yaml.MappingEndEvent, yaml.SequenceEndEvent)
        nodes = documents = 0
        for event in yaml.parse(self.text, Loader=loader):
            kind = type(event)
            if kind in ends:
                self.open.pop()
            elif kind is scalar or kind is mapping or kind is sequence or kind is yaml.AliasEvent:
                nodes += 1
                if nodes > self.max_nodes:
                    self._stop(event, "yaml.too-many-nodes", f"the file holds more than {self.max_nodes:,} values")
                if event.anchor is not None:
                    self._refuse_anchor(event, kind is yaml.AliasEvent)
                if kind is scalar:
                    self._scalar(event)
                elif kind is yaml.AliasEvent:
                    self._add(Node(None, self._place(event)))
                else:
                    self._start(event, {} if kind is mapping else [])
            elif kind is yaml.DocumentStartEvent:
                documents += 1
                if documents > 1:
                    self._stop(event, "yaml.many-documents", "a second document starts here", "keep one per file")

    def _scalar(self, event: Any) -> None:
        if event.tag is not None:
            self._refuse_tag(event)
        if self.open and isinstance(self.open[-1].node.value, dict) and not self.open[-1].has_key:
            self._key(event)
            return
        value: NodeValue = event.value
        if event.implicit[0]:
            try:
                value = _core_scalar(event.value)
            except ValueError as error:
                self._report(event, "yaml.number", str(error), "quote it if it is meant as text")
        elif event.style == '"' and self.not_printable.search(event.value):
            self._report(event, "yaml.character", "the text has an escaped control character")
        self._add(Node(value, self._place(event)))

    def _start(self, event: Any, value: list[Node] | dict[str, Node]) -> None:
        if len(self.open) >= self.max_depth:
            self._stop(event, "yaml.too-deep", f"nested deeper than {self.max_depth} levels")
        if event.tag is not None:
            self._refuse_tag(event)
        node = Node(value, self._place(event))
        self._add(node)
        self.open.append(_Open(node))

    def _add(self, node: Node) -> None:
        """Put ``node`` where it belongs in the innermost open collection."""
        if not self.open:
            self.root = node
            return
        parent = self.open[-1]
        collection = parent.node.value
        if isinstance(collection, list):
            collection.append(node)
        elif not parent.has_key:  # a list, a mapping or an alias in the place of a key
            self.sink.add(InvalidFile("yaml.key-type", "a key must be a string", place=node.place))
            parent.has_key, parent.key = True, None
        else:
            assert isinstance(collection, dict)
            if parent.key is not None:
                collection[parent.key[0]] = node
            parent.has_key = False

    def _key(self, event: Any) -> None:
        parent, name = self.open[-1], event.value
        parent.has_key, parent.key = True, None
        places = parent.node.key_places
        if event.style == '"' and self.not_printable.search(name):
            self._report(event, "yaml.character", "the key has an escaped control character")
        elif event.implicit[0] and name == "<<":
            self._report(event, "yaml.merge-key", "merge keys are not allowed", "write the merged keys out")
        elif event.implicit[0] and not _is_text(name):
            shown = name or "an empty key"
            self._report(event, "yaml.key-type", f"a key must be a string, not {shown}", f'quote it: "{name}"')
        elif name in places:
            message = f"the key '{name}' already stands on line {places[name].line}"
            self._report(event, "yaml.duplicate-key", message, "keep one of the two")
        else:
            place = places[name] = self._place(event)
            parent.key = (name, place)

    def _check_text(self) -> None:
        for found in self.not_printable.finditer(self.text):
            message = f"the character U+{ord(found.group()):04X} is not allowed"
            self.sink.add(InvalidFile("yaml.character", message, place=self.lines.place_at(found.start())))
        if directive := re.search("^%TAG", self.text, re.MULTILINE):
            place = self.lines.place_at(directive.start())
            self.sink.add(InvalidFile("yaml.tag", "tag directives are not allowed", place=place, remedy="remove it"))
        self.sink.check()  # the parser stops at the first such character, and is slow on many directives

    def _refuse_anchor(self, event: Any, alias: bool) -> None:
        what, mark = ("alias", "*") if alias else ("anchor", "&")
        message = f"the {what} '{mark}{event.anchor}' is not allowed"
        self._report(event, "yaml.anchor", message, f"write the value out; quote text that begins with '{mark}'")

    def _refuse_tag(self, event: Any) -> None:
        message = f"the tag '{event.tag}' is not allowed"
        self._report(event, "yaml.tag", message, "write the value without '!'; quote text that begins with '!'")

    def _syntax_error(self, error: Any) -> NoReturn:
        mark = error.problem_mark or error.context_mark
        place = self.lines.place(mark.line, mark.column) if mark else Place(self.lines.file)
        if "maximum nesting depth" in (error.problem or ""):  # libyaml's own limit, met before we see the levels
            raise InvalidFile("yaml.too-deep", f"nested deeper than {self.max_depth} levels", place=place) from None
        message = ", ".join(part for part in (error.context, error.problem) if part)
        tab = place.text is not None and place.text[place.column - 1 : place.column] == "\t"
        remedy = "indent with spaces, not tabs" if tab else None
        raise InvalidFile("yaml.syntax", message, place=place, remedy=remedy) from None

    def _place(self, event: Any) -> Place:
        mark = event.start_mark
        return self.lines.place(mark.line, mark.column)

    def _report(self, event: Any, code: str, message: str, remedy: str | None = None) -> None:
        self.sink.add(InvalidFile(code, message, place=self._place(event), remedy=remedy))

    def _stop(self, event: Any, code: str, message: str, remedy: str | None = None) -> NoReturn:
        raise InvalidFile(code, message, place=self._place(event), remedy=remedy)


_WORDS: dict[str, NodeValue] = (
    dict.fromkeys(("", "~", "null", "Null", "NULL"))
    | dict.fromkeys(("true", "True", "TRUE"), True)
    | dict.fromkeys(("false", "False", "FALSE"), False)
    | dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan)
    | {sign + word: float(f"{sign}inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")}
)
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NUMBER_START = frozenset("+-.0123456789")


def _core_scalar(text: str) -> NodeValue:
    """What a plain scalar means in the YAML 1.2 core schema; ``ValueError`` for a number out of range."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in _NUMBER_START:
        return text
    if _INTEGER.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        number = int(text, base) if len(text) <= 70 else 1 << 64
        if abs(number) > 1 << 63:
            raise ValueError("the integer does not fit 64 bits")
        return number
    if _FLOAT.fullmatch(text):
        if math.isinf(value := float(text)):
            raise ValueError("the number is too large for a float")
        return value
    return text


def _is_text(text: str) -> bool:
    """Whether a plain scalar is a string in the core schema."""
    try:
        return isinstance(_core_scalar(text), str)
    except ValueError:
        return False
