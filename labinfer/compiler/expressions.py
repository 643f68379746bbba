"""The map language's expressions: a small, safe subset of Python, evaluated lazily by name.

Literals, names, arithmetic, comparisons, ``and``/``or``/``not``, ``a if c else b``, subscripts and calls to a fixed
table of functions. Nothing here runs Python code: the syntax tree is checked and turned into closures once, and every
operation bounds its result, so hostile text costs microseconds. Integers stay exact; ``/`` gives a float; arithmetic
that leaves 64 bits or the finite floats is an error.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

from labinfer.compiler.arithmetic import (
    BINARY,
    COMPARE,
    FUNCTIONS,
    MAX_INTEGER,
    UNARY,
    bounded,
    kind_of,
    shorten,
    show,
    subscript,
)
from labinfer.errors import InvalidFile, Place, did_you_mean

Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"
_Run: TypeAlias = Callable[[Mapping[str, Value]], Any]

MAX_LENGTH = 2000  # characters of an expression
MAX_NESTING = 50  # levels of its syntax tree
MAX_CHAIN = 100  # definitions that wait for one another
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


class UndefinedName(InvalidFile, KeyError):
    """An expression uses a name that nothing defines; a ``KeyError`` too, as mappings promise."""


def undefined_name(name: str, known: Iterable[str], place: Place | None = None) -> UndefinedName:
    """The error for ``name``, with the closest of the ``known`` names as its remedy."""
    return UndefinedName(
        "map.undefined-name", f"'{name}' is not defined", place=place, remedy=did_you_mean(name, known)
    )


@dataclass(frozen=True, slots=True)
class Expression:
    """A checked expression: its text, the names it reads, and where it stands."""

    source: str
    names: frozenset[str]
    place: Place | None
    run: _Run = field(repr=False, compare=False)

    def evaluate(self, scope: Mapping[str, Value]) -> Value:
        """The value under ``scope``.

        Raises ``InvalidFile`` with code ``map.expression``, ``map.undefined-name`` or ``map.cycle``.
        """
        try:
            result: Value = self.run(scope)
        except InvalidFile as error:
            error.place = error.place or self.place
            raise
        except KeyError as error:
            raise undefined_name(str(error.args[0]), scope, self.place) from None
        except (ArithmeticError, TypeError, ValueError) as error:
            raise self._failure(error, scope) from None
        except RecursionError:
            raise InvalidFile("map.expression", "definitions nest too deeply", place=self.place) from None
        return result

    def _failure(self, error: Exception, scope: Mapping[str, Value]) -> InvalidFile:
        seen = _Recorder(scope)
        with suppress(ArithmeticError, TypeError, ValueError, RecursionError):
            self.run(seen)  # once more, to tell the names that were read
        values = ", ".join(f"{name} = {show(value)}" for name, value in seen.items())
        problem = "division by zero" if isinstance(error, ZeroDivisionError) else error.args[-1]
        where = f" where {values}" if values else ""
        return InvalidFile("map.expression", f"{problem} in '{shorten(self.source)}'{where}", place=self.place)


class _Recorder(dict[str, Value]):
    """A view of a scope that keeps what was read from it."""

    def __init__(self, scope: Mapping[str, Value]) -> None:
        super().__init__()
        self.scope = scope

    def __missing__(self, name: str) -> Value:
        value = self[name] = self.scope[name]
        return value


def parse_expression(text: str | int | float | bool | None, place: Place | None = None) -> Expression:
    """Check ``text`` and make it ready to evaluate; ``${...}`` means its inside, numbers, booleans and None themselves.

    Raises ``InvalidFile`` (``map.expression``) with the place of the offending part.
    """
    if text is None or isinstance(text, (bool, int, float)):
        return Expression(show(text), frozenset(), place, lambda scope: text)
    if not isinstance(text, str):
        raise InvalidFile("map.expression", f"expected an expression, not {kind_of(text)}", place=place)
    try:
        run, names = _parse(text)
    except _Refused as error:
        message, at = f"{error.message} in '{shorten(text)}'", _inside(place, text, error.offset)
        raise InvalidFile("map.expression", message, place=at, remedy=error.remedy) from None
    return Expression(text, names, place, run)


class Scope(Mapping[str, Value]):
    """Named definitions, each evaluated when first read and once only.

    ``definitions`` are expressions, which may read one another, or values; ``values`` are further names, read when no
    definition has them. ``scope[name]`` raises ``InvalidFile`` as ``Expression.evaluate`` does.
    """

    def __init__(
        self, definitions: Mapping[str, Expression | Value], values: Mapping[str, Value] | None = None
    ) -> None:
        self._expressions: dict[str, Expression] = {}
        self._values: dict[str, Value] = dict(values or {})
        for name, definition in definitions.items():
            if isinstance(definition, Expression):
                self._expressions[name] = definition
                self._values.pop(name, None)
            else:
                self._values[name] = definition
        self._parent: Scope | None = None
        self._dependents: frozenset[str] = frozenset(self._expressions)  # what this scope evaluates itself
        self._in_progress: dict[str, None] = {}
        self._dependents_of: dict[frozenset[str], frozenset[str]] = {}

    def derive(self, variables: Mapping[str, Value]) -> Scope:
        """A scope with more ``variables`` (a layer's ``i``); only what depends on them is evaluated again."""
        child = Scope.__new__(Scope)
        child._expressions = self._expressions
        child._values = dict(variables)
        child._parent = self
        child._dependents = self.dependents(variables)
        child._in_progress = self._in_progress
        child._dependents_of = self._dependents_of
        return child

    def dependents(self, variables: Iterable[str]) -> frozenset[str]:
        """The definitions that read one of ``variables``, directly or through others; known without evaluating."""
        key = frozenset(variables)
        if key not in self._dependents_of:
            readers: dict[str, list[str]] = {}
            for name, expression in self._expressions.items():
                for read in expression.names:
                    readers.setdefault(read, []).append(name)
            found: set[str] = set()
            waiting = list(key)
            while waiting:
                new = [name for name in readers.get(waiting.pop(), ()) if name not in found and name not in key]
                found.update(new)
                waiting.extend(new)
            self._dependents_of[key] = frozenset(found)
        return self._dependents_of[key]

    def __getitem__(self, name: str) -> Value:
        if name in self._values:
            return self._values[name]
        if name in self._dependents:
            value = self._values[name] = self._evaluate(name)
            return value
        if self._parent is None:
            raise undefined_name(name, self)
        return self._parent[name]

    def _evaluate(self, name: str) -> Value:
        progress = self._in_progress
        if name in progress:
            names = list(progress)
            chain = " -> ".join(shorten(part) for part in [*names[names.index(name) :], name])
            place = self._expressions[name].place
            raise InvalidFile("map.cycle", f"'{name}' is defined by itself: {chain}", place=place)
        if len(progress) >= MAX_CHAIN:
            message = f"more than {MAX_CHAIN} definitions wait for one another"
            raise InvalidFile("map.expression", message, place=self._expressions[name].place)
        progress[name] = None
        try:
            return self._expressions[name].evaluate(self)
        finally:
            del progress[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._expressions or (self._parent is not None and name in self._parent)

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self._expressions if self._parent is None else self._parent), **self._values})

    def __len__(self) -> int:
        return sum(1 for _ in self)


# Text to closures


class _Refused(Exception):
    """Why a text is no expression; ``offset`` counts characters from the start of the text."""

    def __init__(self, message: str, offset: int = 0, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message, self.offset, self.remedy = message, offset, remedy


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[_Run, frozenset[str]]:
    if len(text) > MAX_LENGTH:
        raise _Refused(f"more than {MAX_LENGTH} characters")
    bare = text.strip()
    if bare.startswith("${") and bare.endswith("}"):
        bare = bare[2:-1].strip()
    if not bare:
        raise _Refused("an expression is missing")
    start = text.index(bare)
    _check_text(bare, start)
    compiler = _Compiler()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # '1if x' and the like are syntax errors here
            tree = ast.parse(bare.replace("\n", " "), mode="eval")
        run = compiler.compile(tree.body, 1)
    except SyntaxError as error:
        raise _Refused(error.msg, start + max(0, (error.offset or 1) - 1)) from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise _Refused("nested too deeply" if not isinstance(error, ValueError) else str(error), start) from None
    except _Refused as error:
        before = bare.encode()[: error.offset]  # ast counts bytes
        error.offset = start + len(before.decode(errors="ignore"))
        raise
    return run, frozenset(compiler.names)


def _check_text(text: str, start: int) -> None:
    """Bound nesting before Python's parser sees the text, and refuse comments, which would hide what follows."""
    depth = 0
    unquoted = _QUOTED.sub(lambda found: "_" * len(found.group()), text)
    for found in re.finditer(r"[#()\[\]{}]", unquoted):
        if found.group() == "#":
            raise _Refused("a comment is not allowed", start + found.start())
        depth += 1 if found.group() in "([{" else -1
        if depth > MAX_NESTING:
            raise _Refused(f"nested deeper than {MAX_NESTING} levels", start + found.start())


def _inside(place: Place | None, text: str, offset: int) -> Place | None:
    """The place ``offset`` characters into ``text``, when the text stands as it is on the line of ``place``."""
    if place is None or place.text is None:
        return place
    for quote in (0, 1):
        start = place.column - 1 + quote
        if place.text.startswith(text, start):
            return Place(place.file, place.line, start + offset + 1, place.text)
    return place


class _Compiler:
    """Turns syntax trees into closures over a scope and gathers the names they read."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def compile(self, node: ast.AST, depth: int) -> _Run:
        rule = _RULES.get(type(node))
        offset = getattr(node, "col_offset", 0)
        if rule is None:
            raise _Refused(f"{_SYNTAX_NAMES.get(type(node), type(node).__name__.lower())} is not allowed", offset)
        if depth > MAX_NESTING:
            raise _Refused(f"nested deeper than {MAX_NESTING} levels", offset)
        return rule(self, node, depth + 1)

    def constant(self, node: ast.Constant, depth: int) -> _Run:
        value = node.value
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise _Refused(f"{type(value).__name__} is not allowed", node.col_offset)
        if (type(value) is int and value > MAX_INTEGER) or (type(value) is float and math.isinf(value)):
            raise _Refused("a number is out of range", node.col_offset)
        return lambda scope: value

    def name(self, node: ast.Name, depth: int) -> _Run:
        name = node.id
        if name in _LITERALS:
            literal = _LITERALS[name]
            return lambda scope: literal
        self.names.add(name)
        return operator.itemgetter(name)

    def binary(self, node: ast.BinOp, depth: int) -> _Run:
        operation = _lookup(BINARY, node.op, node)
        left, right = self.compile(node.left, depth), self.compile(node.right, depth)
        return lambda scope: operation(left(scope), right(scope))

    def unary(self, node: ast.UnaryOp, depth: int) -> _Run:
        operation = _lookup(UNARY, node.op, node)
        operand = self.compile(node.operand, depth)
        return lambda scope: operation(operand(scope))

    def boolean(self, node: ast.BoolOp, depth: int) -> _Run:
        operands = [self.compile(operand, depth) for operand in node.values]
        stops_at = isinstance(node.op, ast.Or)

        def run(scope: Mapping[str, Value]) -> Value:
            value: Value = None
            for operand in operands:
                value = operand(scope)
                if bool(value) is stops_at:
                    break
            return value

        return run

    def compare(self, node: ast.Compare, depth: int) -> _Run:
        first = self.compile(node.left, depth)
        operations = [_lookup(COMPARE, op, node) for op in node.ops]
        steps = list(zip(operations, [self.compile(right, depth) for right in node.comparators], strict=True))

        def run(scope: Mapping[str, Value]) -> bool:
            left = first(scope)
            for operation, operand in steps:
                right = operand(scope)
                if not operation(left, right):
                    return False
                left = right
            return True

        return run

    def ternary(self, node: ast.IfExp, depth: int) -> _Run:
        condition, value, otherwise = (self.compile(part, depth) for part in (node.test, node.body, node.orelse))
        return lambda scope: value(scope) if condition(scope) else otherwise(scope)

    def subscript(self, node: ast.Subscript, depth: int) -> _Run:
        container, key = self.compile(node.value, depth), self.compile(node.slice, depth)
        return lambda scope: subscript(container(scope), key(scope))

    def list_display(self, node: ast.List, depth: int) -> _Run:
        items = [self.compile(item, depth) for item in node.elts]
        return lambda scope: bounded([item(scope) for item in items])

    def dict_display(self, node: ast.Dict, depth: int) -> _Run:
        keys: list[str] = []
        for key in node.keys:
            if not (isinstance(key, ast.Constant) and isinstance(key.value, str)):
                raise _Refused("a key that is not a quoted string is not allowed", node.col_offset)
            keys.append(key.value)
        values = [self.compile(value, depth) for value in node.values]
        return lambda scope: bounded({key: value(scope) for key, value in zip(keys, values, strict=True)})

    def call(self, node: ast.Call, depth: int) -> _Run:
        if not isinstance(node.func, ast.Name):
            raise _Refused("a call of anything but a named function is not allowed", node.col_offset)
        name = node.func.id
        if name not in FUNCTIONS:
            raise _Refused(f"there is no function '{name}'", node.col_offset, did_you_mean(name, FUNCTIONS))
        if node.keywords:
            raise _Refused("a keyword argument is not allowed", node.col_offset)
        function, least, most = FUNCTIONS[name]
        if not least <= len(node.args) <= most:
            count = str(least) if least == most else f"{least} to {most}"
            raise _Refused(f"{name}() takes {count} arguments, not {len(node.args)}", node.col_offset)
        arguments = [self.compile(argument, depth) for argument in node.args]
        if len(arguments) == 1:
            (only,) = arguments
            return lambda scope: function(only(scope))
        return lambda scope: function(*[argument(scope) for argument in arguments])


def _lookup(table: Mapping[type[ast.AST], Callable[..., Any]], op: ast.AST, node: ast.expr) -> Callable[..., Any]:
    if type(op) not in table:
        name = type(op).__name__
        remedy = "compare with == or !=" if name in ("Is", "IsNot") else None
        raise _Refused(f"the operator '{_OPERATORS.get(name, name)}' is not allowed", node.col_offset, remedy)
    return table[type(op)]


_LITERALS = {"none": None, "true": True, "false": False}
_OPERATORS = {
    "BitOr": "|", "BitAnd": "&", "BitXor": "^", "LShift": "<<", "RShift": ">>", "MatMult": "@", "Invert": "~",
    "Is": "is", "IsNot": "is not",
}  # fmt: skip
_SYNTAX_NAMES: dict[type[ast.AST], str] = {
    ast.Attribute: "an attribute ('a.b')", ast.Lambda: "lambda", ast.JoinedStr: "an f-string", ast.Tuple: "a tuple",
    ast.Set: "a set", ast.Starred: "'*'", ast.NamedExpr: "':='", ast.Slice: "a slice", ast.ListComp: "a comprehension",
    ast.SetComp: "a comprehension", ast.DictComp: "a comprehension", ast.GeneratorExp: "a comprehension",
}  # fmt: skip
_RULES: dict[type[ast.AST], Callable[[_Compiler, Any, int], _Run]] = {
    ast.Constant: _Compiler.constant, ast.Name: _Compiler.name, ast.BinOp: _Compiler.binary,
    ast.UnaryOp: _Compiler.unary, ast.BoolOp: _Compiler.boolean, ast.Compare: _Compiler.compare,
    ast.IfExp: _Compiler.ternary, ast.Subscript: _Compiler.subscript, ast.List: _Compiler.list_display,
    ast.Dict: _Compiler.dict_display, ast.Call: _Compiler.call,
}  # fmt: skip
