"""The operations and functions of the expression language, every one with a bounded result.

The TypeError, ValueError or ArithmeticError they raise becomes a ``map.expression`` error where they are called.
"""

from __future__ import annotations

import ast
import math
import operator
import reprlib
import struct
from collections.abc import Callable
from typing import Any

from labinfer.errors import did_you_mean

MAX_INTEGER = 1 << 63
MAX_ITEMS = 10_000  # characters and elements, counted through nested lists, of a built string, list or mapping


def show(value: object) -> str:
    """A value as a message shows it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return reprlib.repr(value)


def shorten(text: str) -> str:
    """An expression as a message shows it: one line of at most 100 characters."""
    text = " ".join(text.split()).encode(errors="backslashreplace").decode()
    return text if len(text) <= 100 else text[:97] + "..."


def kind_of(value: object) -> str:
    """What kind of value it is, in words."""
    return _KINDS.get(type(value), type(value).__name__)


_KINDS: dict[type, str] = {
    type(None): "none", bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "a list",
    dict: "a mapping",
}  # fmt: skip


def _number(result: Any) -> Any:
    """``result`` when it is an integer of 64 bits or a finite float."""
    if isinstance(result, int) and abs(result) <= MAX_INTEGER:
        return result
    if isinstance(result, float) and math.isfinite(result):
        return result
    problem = "not a real number" if isinstance(result, complex) else "out of range"
    raise OverflowError(f"the result is {problem}")


def bounded(value: Any) -> Any:
    """``value`` when it holds at most ``MAX_ITEMS`` characters and elements, however nested or shared."""
    size, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        size += len(item) if isinstance(item, (str, list, dict)) else 0
        if size > MAX_ITEMS:
            raise OverflowError(f"the result holds more than {MAX_ITEMS:,} items")
        if isinstance(item, (list, dict)):
            waiting.extend(item if isinstance(item, list) else item.values())
    return value


def _are_numbers(left: Any, right: Any) -> bool:
    return isinstance(left, (int, float)) and isinstance(right, (int, float))


def _numeric(symbol: str, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A binary operation on two numbers."""

    def operation(left: Any, right: Any) -> Any:
        if _are_numbers(left, right):
            return _number(function(left, right))
        raise TypeError(f"'{symbol}' cannot join {kind_of(left)} and {kind_of(right)}")

    return operation


_add_numbers, _multiply_numbers = _numeric("+", operator.add), _numeric("*", operator.mul)


def _add(left: Any, right: Any) -> Any:
    if type(left) is type(right) and isinstance(left, (str, list)):
        return bounded(left + right)
    return _add_numbers(left, right)


def _multiply(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, (str, list)):
        left, right = right, left
    if isinstance(left, (str, list)) and isinstance(right, int):
        if len(left) * right > MAX_ITEMS:
            raise OverflowError(f"the result holds more than {MAX_ITEMS:,} items")
        return bounded(left * right)
    return _multiply_numbers(left, right)


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and exponent * (base.bit_length() - 1) > 64:
        raise OverflowError("the result is out of range")
    return base**exponent


def _ordered(symbol: str, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """An order comparison: numbers with numbers, strings with strings."""

    def operation(left: Any, right: Any) -> Any:
        if _are_numbers(left, right) or (isinstance(left, str) and isinstance(right, str)):
            return function(left, right)
        hint = " (only == and != can)" if left is None or right is None else ""
        raise TypeError(f"'{symbol}' cannot compare {kind_of(left)} with {kind_of(right)}{hint}")

    return operation


def _contains(item: Any, container: Any) -> bool:
    if isinstance(container, list):
        return item in container
    if isinstance(container, (str, dict)) and isinstance(item, str):
        return item in container
    raise TypeError(f"'in' cannot look for {kind_of(item)} in {kind_of(container)}")


def subscript(container: Any, key: Any) -> Any:
    """``container[key]`` of a list or a mapping."""
    if isinstance(container, list) and type(key) is int:
        if -len(container) <= key < len(container):
            return container[key]
        raise ValueError(f"index {key} is outside a list of {len(container)}")
    if isinstance(container, dict) and isinstance(key, str):
        if key in container:
            return container[key]
        hint = did_you_mean(key, container)
        raise ValueError(f"there is no key {show(key)}" + (f" ({hint})" if hint else ""))
    hint = "; get(mapping, key, default) works on none too" if container is None else ""
    raise TypeError(f"{kind_of(container)} has no element {show(key)}{hint}")


def _math(name: str, function: Callable[..., Any], convert: bool = False) -> Callable[..., Any]:
    """A function of numbers (and of text, if it may ``convert``) with a bounded result."""

    def call(*arguments: Any) -> Any:
        for x in arguments:
            if not isinstance(x, (int, float)) and not (convert and isinstance(x, str)):
                raise TypeError(f"'{name}' does not take {kind_of(x)}")
        return _number(function(*arguments))

    return call


BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: _add, ast.Sub: _numeric("-", operator.sub), ast.Mult: _multiply, ast.Div: _numeric("/", operator.truediv),
    ast.FloorDiv: _numeric("//", operator.floordiv), ast.Mod: _numeric("%", operator.mod),
    ast.Pow: _numeric("**", _power),
}  # fmt: skip
UNARY: dict[type[ast.AST], Callable[[Any], Any]] = {
    ast.Not: operator.not_, ast.USub: _math("-", operator.neg), ast.UAdd: _math("+", operator.pos),
}  # fmt: skip
COMPARE: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: _ordered("<", operator.lt),
    ast.LtE: _ordered("<=", operator.le), ast.Gt: _ordered(">", operator.gt), ast.GtE: _ordered(">=", operator.ge),
    ast.In: _contains, ast.NotIn: lambda item, container: not _contains(item, container),
}  # fmt: skip


def _bf16(x: Any) -> float:
    """``x`` rounded to float32 and then to bfloat16, both to nearest even, as torch and ml_dtypes convert a double."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    (value,) = struct.unpack("<f", struct.pack("<I", rounded & 0xFFFFFFFF))
    return float(value)


def _round(x: Any, digits: Any = None) -> Any:
    if digits is not None and not (type(digits) is int and abs(digits) <= 30):
        raise ValueError("round() takes a number of digits from -30 to 30")
    return round(x, digits)


def _get(mapping: Any, key: Any, default: Any = None) -> Any:
    if mapping is None:
        return default
    if isinstance(mapping, dict) and isinstance(key, str):
        return mapping.get(key, default)
    raise TypeError(f"get() takes a mapping or none and a string, not {kind_of(mapping)} and {kind_of(key)}")


def _string(x: Any) -> str:
    if isinstance(x, (list, dict)):
        raise TypeError(f"str() does not take {kind_of(x)}")
    return x if isinstance(x, str) else show(x)


def _extreme(name: str, function: Callable[[Any], Any]) -> Callable[..., Any]:
    """``min`` or ``max`` of several arguments or of one list: all numbers or all strings."""

    def extreme(*arguments: Any) -> Any:
        items = arguments[0] if len(arguments) == 1 else arguments
        if not isinstance(items, (list, tuple)):
            raise TypeError(f"{name}() takes several values or one list")
        if all(isinstance(x, (int, float)) for x in items) or all(isinstance(x, str) for x in items):
            return function(items)
        raise TypeError(f"{name}() takes numbers or strings, not " + ", ".join(sorted({kind_of(x) for x in items})))

    return extreme


_ANY = 100
FUNCTIONS: dict[str, tuple[Callable[..., Any], int, int]] = {  # with the least and most arguments
    "min": (_extreme("min", min), 1, _ANY), "max": (_extreme("max", max), 1, _ANY), "abs": (_math("abs", abs), 1, 1),
    "ceil": (_math("ceil", math.ceil), 1, 1), "floor": (_math("floor", math.floor), 1, 1),
    "round": (_math("round", _round), 1, 2), "sqrt": (_math("sqrt", math.sqrt), 1, 1),
    "log": (_math("log", math.log), 1, 2), "int": (_math("int", int, convert=True), 1, 1),
    "float": (_math("float", float, convert=True), 1, 1), "bool": (bool, 1, 1), "str": (_string, 1, 1),
    "len": (len, 1, 1), "bf16": (_math("bf16", _bf16), 1, 1), "get": (_get, 2, 3),
}  # fmt: skip
