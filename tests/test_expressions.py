"""The expression language: what it computes, what it refuses, lazy scopes, and hostile text."""

from __future__ import annotations

import math
import struct
import time
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from labinfer.compiler.expressions import Expression, Scope, Value, parse_expression
from labinfer.errors import InvalidFile, LabinferError, Place

NAMES: dict[str, Value] = {
    "d": 2048, "heads": 32, "kv_heads": 8, "ff": 8192, "eps": 1e-5, "act": "silu", "window": None, "tied": True,
    "scaling": {"factor": 8.0, "rope_type": "llama3"}, "dense": [0, 3], "i": 5,
}  # fmt: skip


def value(text: str | int | float | bool | None, scope: dict[str, Value] | Scope = NAMES) -> Any:
    return parse_expression(text).evaluate(scope)


def failure(text: str, place: Place | None = None, scope: dict[str, Value] | Scope = NAMES) -> InvalidFile:
    with pytest.raises(InvalidFile) as caught:
        parse_expression(text, place).evaluate(scope)
    return caught.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("heads*64", 2048), ("(heads + 2*kv_heads)*(d // heads)", 3072), ("${d // heads}", 64), (" ${ d } ", 2048),
        ("d / heads", 64.0), ("d ** -0.5", 2048**-0.5), ("-7 // 2", -4), ("-7 % 3", 2), ("2**63", 2**63), ("+d", 2048),
        ("heads % kv_heads == 0", True), ("1 < heads <= 32 != d", True), ("3 < 2 < 1/0", False), ("not tied", False),
        ("window == none", True), ("window != None", False), ("window or 0", 0), ("window and window + 1", None),
        ("4096 if i % 2 == 0 else none", None), ("i not in dense and (i + 1) % 2 == 0", True), ("'lu' in act", True),
        ("'factor' in scaling", True), ("scaling['factor']", 8.0), ("dense[-1]", 3), ("[d, [1, none]][1]", [1, None]),
        ("{'a': d, 'b': {}}", {"a": 2048, "b": {}}), ("{'a': 1}['a']", 1), ("[]", []), ("dense + [1]", [0, 3, 1]),
        ("[0] * 3", [0, 0, 0]), ("2 * 'ab' + 'c'", "ababc"), ("true", True), ("False", False), ("none", None),
        ("min(heads, 8, 9.5)", 8), ("max(dense)", 3), ("max('a', 'b')", "b"), ("abs(-3)", 3), ("ceil(d / 1000)", 3),
        ("floor(-0.5)", -1), ("round(2.5)", 2), ("round(2.345, 1)", 2.3), ("round(1234, -2)", 1200), ("sqrt(16)", 4.0),
        ("log(8, 2)", 3.0), ("log(1)", 0.0), ("int(3.9)", 3), ("int('12')", 12), ("float('1e-6')", 1e-6),
        ("bool(dense)", True), ("str(12)", "12"), ("str(none)", "none"), ("str(1.5)", "1.5"), ("len(dense)", 2),
        ("get(scaling, 'factor', 1.0)", 8.0), ("get(scaling, 'x', 1.0)", 1.0), ("get(window, 'x', 2)", 2),
        ("get(window, 'x')", None), ("1e-6", 1e-6), ("d\n  // heads", 64), ("'é' + 'x'", "éx"), ("'none'", "none"),
        ("'a # b'", "a # b"), ("true + 1", 2),
    ],
)  # fmt: skip
def test_values(text: str, expected: object) -> None:
    got = value(text)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize("constant", [3, 2.5, True, False, None])
def test_yaml_numbers_and_booleans_pass_through(constant: int | float | bool | None) -> None:
    expression = parse_expression(constant)
    assert expression.evaluate({}) is constant
    assert expression.names == frozenset()


def test_an_expression_knows_the_names_it_reads() -> None:
    assert parse_expression("max(a, b['c']) if none == d else true").names == {"a", "b", "d"}
    assert parse_expression("${heads}").source == "${heads}"


def test_bf16_rounds_to_nearest_even() -> None:
    assert value("bf16(2304 ** 0.5)") == 48.0
    assert value("bf16(2048 ** 0.5)") == 45.25
    assert (value("bf16(1 + 2 ** -8)"), value("bf16(1 + 3 * 2 ** -8)")) == (1.0, 1 + 2**-6)  # ties go to even
    assert value("bf16(-1.0)") == -1.0
    assert value("bf16(0)") == 0.0


@given(st.floats(min_value=-1e38, max_value=1e38))
def test_bf16_is_the_nearest_value_with_8_bits_of_precision(x: float) -> None:
    assume(x == 0 or abs(x) > 1e-30)
    x = struct.unpack("<f", struct.pack("<f", x))[0]
    got = value("bf16(x)", {"x": x})
    mantissa, exponent = math.frexp(x)
    assert got == math.ldexp(round(mantissa * 256), exponent - 8)  # Python rounds halves to even


def test_a_place_points_at_the_offending_part() -> None:
    line = "    - {op: linear, n: heads * d.real}"
    error = failure("heads * d.real", Place("m.yaml", 7, 23, line))
    assert error.place == Place("m.yaml", 7, 31, line)
    assert error.message == "an attribute ('a.b') is not allowed in 'heads * d.real'"
    assert failure("1 +* 2", Place("m.yaml", 1, 4, 'n: "1 +* 2"')).place == Place("m.yaml", 1, 8, 'n: "1 +* 2"')
    assert failure("${  a.b}", Place("m.yaml", 1, 1, "${  a.b}")).place == Place("m.yaml", 1, 5, "${  a.b}")
    folded = Place("m.yaml", 1, 4, "n: >")
    assert failure("a b", folded).place == folded


def test_failed_arithmetic_tells_the_values_of_the_names_it_read() -> None:
    place = Place("m.yaml", 1, 4, "n: d // (heads - 32)")
    error = failure("d // (heads - 32) if tied else missing", place)
    assert (error.code, error.place, error.exit_code) == ("map.expression", place, 3)
    expected = "division by zero in 'd // (heads - 32) if tied else missing' where "
    assert error.message.startswith(expected)
    assert set(error.message.removeprefix(expected).split(", ")) == {"tied = true", "d = 2048", "heads = 32"}
    assert failure("window * 2").message == "'*' cannot join none and an integer in 'window * 2' where window = none"


@pytest.mark.parametrize(
    "text",
    [
        "", "   ", "${}", "a b", "1 +", "(", ")", "nope(", "d = 3", "*d", "0777", "1if d else 2", "d if", "yield 1",
        "d.real", "lambda: 1", "[x for x in dense]", "{x: 1 for x in dense}", "(x for x in dense)", "f'{d}'",
        "(x := 1)",
        "min(a=1)", "min(*dense)", "dense[0:1]", "1, 2", "{1, 2}", "{**scaling}", "{1: 2}", "{d: 2}", "1j",
        "b'a'", "...",
        "~1", "1 | 2", "1 << 2", "d @ d", "window is none", "window is not none", "await d", "eval('1')", "open('x')",
        "__import__('os')", "d()()", "'a'.upper()", "sqrt()", "sqrt(1, 2)", "get(scaling)", "heads # no",
        "\x00", "\ud800",
        "'\\q'", "1e999", "9" * 30, "x" * 2001, "print(1)", "d; d", "import os", "d\0", "`d`", "$d", "${d} + ${d}",
    ],
)  # fmt: skip
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(InvalidFile) as caught:
        parse_expression(text, Place("m.yaml", 1, 1))
    assert caught.value.code == "map.expression"
    assert caught.value.place is not None


@pytest.mark.parametrize(
    "text",
    [
        "1 / 0", "1 // 0", "1 % 0", "0 ** -1", "2 ** 64", "9 ** 9 ** 9", "2 ** 63 + 1", "2 ** 62 * 3", "-(2 ** 63) - 1",
        "1e308 * 10", "1e300 ** 2", "(-8) ** 0.5", "1e308 // 1e-308", "none + 1", "'a' + 1", "'a' * 'b'", "'a' - 'b'",
        "'%d' % 3", "[1] + 'a'", "{} + {}", "[1] / 2", "-none", "-'a'", "+[1]", "none < 1", "d >= none", "'a' < 1",
        "[1] < [2]", "1 in 2", "1 in none", "1 in 'abc'", "1 in scaling", "none['a']", "d[0]", "dense['a']", "dense[2]",
        "dense[-3]", "dense[true]", "dense[1.0]", "scaling['fctor']", "scaling[0]", "'abc'[0]", "sqrt(-1)", "sqrt('4')",
        "log(0)", "log(8, 1)", "ceil(none)", "ceil(1e300)", "round(1, 10 ** 9)", "round(1, -10 ** 9)",
        "round(1.5, 0.5)",
        "int('zz')", "int(none)", "int('9' * 30)", "int('9' * 5000)", "float('nan')", "float('inf')", "float('1e999')",
        "bf16(1e39)", "bf16(3.4e38)", "str([1])", "len(5)", "len(none)", "min(5)", "max([])", "min(1, 'a')",
        "min(1, none)",
        "get(5, 'a')", "get(scaling, 1)", "'a' * 10 ** 9", "10 ** 9 * [1]", "[[1] * 9999] * 9999",
        "abs('a')", "'a' ** 2",
    ],
)  # fmt: skip
def test_what_cannot_be_computed(text: str) -> None:
    start = time.process_time()
    error = failure(text, Place("m.yaml", 1, 1))
    assert (error.code, error.place) == ("map.expression", Place("m.yaml", 1, 1))
    assert text in error.message
    assert time.process_time() - start < 0.5


def test_errors_help() -> None:
    assert failure("sqr(2)").remedy == "did you mean 'sqrt'?"
    assert failure("window is none").remedy == "compare with == or !="
    assert failure("1 < window").message.startswith("'<' cannot compare an integer with none (only == and != can)")
    assert "did you mean 'factor'?" in failure("scaling['fctor']").message
    assert "get(mapping, key, default)" in failure("window['x']").message
    error = failure("hed_dim + heads", Place("m.yaml", 1, 1), {"head_dim": 1, "heads": 2})
    assert (error.code, error.remedy) == ("map.undefined-name", "did you mean 'head_dim'?")
    assert error.place == Place("m.yaml", 1, 1)


@pytest.mark.parametrize(
    "text",
    ["(" * 10_000, "(" * 1000, "[" * 1999, "-" * 1999 + "1", "not " * 499 + "1", "1 if 1 else " * 160 + "1",
     "+".join("1" * 900), "**".join("1" * 600), "d" + "[0]" * 600, "min(" * 400, "a" + "(" * 500, "'" + "\\" * 1998,
     "9**" * 600 + "9", "f'{" * 400, "\\N{" * 400, "{'a':" * 300],
)  # fmt: skip
def test_hostile_text_is_refused_at_once(text: str) -> None:
    start = time.process_time()
    assert failure(text).code == "map.expression"
    assert time.process_time() - start < 0.2


def test_values_cannot_grow_by_sharing() -> None:
    definitions: dict[str, Any] = {"a0": parse_expression("[1, 2]")}
    definitions |= {f"a{n}": parse_expression(f"[a{n - 1}, a{n - 1}]") for n in range(1, 60)}
    with pytest.raises(InvalidFile, match="holds more than"):
        Scope(definitions)["a59"]


# Scopes


def definitions(**texts: Any) -> dict[str, Expression | Value]:
    return {
        name: parse_expression(text, Place("m.yaml", line)) if isinstance(text, str) else text
        for line, (name, text) in enumerate(texts.items(), 1)
    }


def test_a_scope_evaluates_what_is_read_and_once() -> None:
    scope = Scope(definitions(head_dim="d // heads", broken="1 / 0", items="[d]"), {"d": 2048, "heads": 32})
    assert scope["head_dim"] == 64
    assert scope["items"] is scope["items"]
    assert set(scope) == {"head_dim", "broken", "items", "d", "heads"}
    assert len(scope) == 5
    assert "broken" in scope
    assert "nothing" not in scope
    assert scope.get("nothing", 7) == 7
    assert failure("broken + 1", Place("other"), scope).place == Place("m.yaml", 2)


def test_definitions_win_over_values() -> None:
    assert Scope(definitions(a="b + 1", b=5), {"a": 100, "b": 200})["a"] == 6


def test_a_cycle_names_the_whole_chain() -> None:
    scope = Scope(definitions(start="a", a="b + 1", b="c if true else 0", c="max(a, 1)"))
    error = failure("start", Place("other"), scope)
    assert (error.code, error.place) == ("map.cycle", Place("m.yaml", 2))
    assert error.message == "'a' is defined by itself: a -> b -> c -> a"
    assert failure("x", scope=Scope(definitions(x="x"))).message == "'x' is defined by itself: x -> x"
    assert scope.derive({"c": 1})["start"] == 2  # nothing is left half-evaluated


def test_an_undefined_name_is_told_where_it_is_used() -> None:
    scope = Scope(definitions(a="1", b="hidden_sise * 2"), {"hidden_size": 4})
    error = failure("a + b", Place("other"), scope)
    assert (error.code, error.place) == ("map.undefined-name", Place("m.yaml", 2))
    assert (error.message, error.remedy) == ("'hidden_sise' is not defined", "did you mean 'hidden_size'?")
    with pytest.raises(InvalidFile, match="'min' is not defined"):
        scope["min"]
    with pytest.raises(KeyError):  # a scope keeps a mapping's promise
        scope["min"]


def test_a_derived_scope_evaluates_again_only_what_depends_on_its_variables() -> None:
    scope = Scope(
        definitions(shared="[d]", window="4096 if even else none", even="i % 2 == 0", both="[e, i]"), {"d": 1}
    )
    assert scope.dependents(["i"]) == {"window", "even", "both"}
    assert scope.dependents(["e"]) == {"both"}
    assert scope.dependents(["d"]) == {"shared"}
    layers = [scope.derive({"i": i}) for i in range(4)]
    assert [layer["window"] for layer in layers] == [4096, None, 4096, None]
    assert all(layer["shared"] is scope["shared"] for layer in layers)
    experts = layers[1].derive({"e": 7})
    assert experts["both"] == [7, 1]
    assert experts["even"] is False
    assert experts.derive({"i": 2})["both"] == [7, 2]
    assert set(experts) == {"shared", "window", "even", "both", "d", "i", "e"}
    error = failure("window", scope=scope)
    assert (error.code, error.message) == ("map.undefined-name", "'i' is not defined")


def test_a_variable_hides_a_definition_and_what_reads_it_follows() -> None:
    scope = Scope(definitions(i="10", twice="2 * i"))
    assert (scope["twice"], scope.derive({"i": 3})["twice"], scope["twice"]) == (20, 6, 20)


def test_long_chains_of_definitions_are_refused() -> None:
    scope = Scope(definitions(a0="1", **{f"a{n}": f"a{n - 1} + 1" for n in range(1, 5000)}))
    assert scope["a80"] == 81
    assert failure("a4999", scope=scope).message == "more than 100 definitions wait for one another"
    deep = "(" * 40 + "{}" + ")" * 40
    nested = Scope(definitions(a0="1", **{f"a{n}": deep.format(f"-+-+-+-+-+-+-+-+a{n - 1}") for n in range(1, 200)}))
    assert failure("a199", scope=nested).code == "map.expression"


# Properties


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=40) | st.text(alphabet="abd()[]{}+-*/%<>=!,.:'\"\\ 019eijnoratfx#$~|&^@;\n", max_size=60))
def test_any_text_gives_a_value_or_a_coded_error(text: str) -> None:
    try:
        value(text)
    except LabinferError as error:
        str(error).encode()


ATOMS = st.sampled_from(["d", "heads", "eps", "act", "window", "tied", "scaling", "dense", "i", "none", "true", "nope"])
LITERALS = st.integers(-(2**63), 2**63).map(str) | st.floats(allow_nan=False, allow_infinity=False).map(repr)
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "==", "!=", "<", ">=", "in", "not in", "and", "or"]
FUNCTIONS = [
    "min",
    "max",
    "abs",
    "ceil",
    "floor",
    "round",
    "sqrt",
    "log",
    "int",
    "float",
    "bool",
    "str",
    "len",
    "bf16",
    "get",
]


def compound(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return (
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})")
        | st.tuples(inner, inner, inner).map(lambda p: f"({p[0]} if {p[1]} else {p[2]})")
        | st.tuples(inner, inner).map(lambda p: f"{p[0]}[{p[1]}]")
        | st.tuples(st.sampled_from(FUNCTIONS), st.lists(inner, max_size=3)).map(lambda p: f"{p[0]}({', '.join(p[1])})")
        | st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.tuples(st.sampled_from(["-", "+", "not "]), inner).map("".join).map("({})".format)
    )


@settings(max_examples=400, deadline=None)
@given(st.recursive(ATOMS | LITERALS | st.sampled_from(["'a'", "'factor'", "[]", "{}"]), compound, max_leaves=12))
def test_any_well_formed_text_gives_a_bounded_value_or_a_coded_error(text: str) -> None:
    try:
        result = value(text)
    except LabinferError as error:
        str(error).encode()
        return
    assert not isinstance(result, float) or math.isfinite(result)
    assert not isinstance(result, int) or abs(result) <= 2**63


DECIMALS = st.floats(-100, 100).map(lambda x: round(x, 3))  # so that no step overflows
NUMBERS = st.integers(-100, 100).map(str) | DECIMALS.map(repr) | st.sampled_from(["a", "b", "c"])


def arithmetic(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    operators = st.sampled_from(["+", "-", "*", "/", "//", "%", "<", "<=", "==", "and", "or"])
    return st.tuples(inner, operators, inner).map(lambda p: f"({p[0]}) {p[1]} ({p[2]})") | st.tuples(
        inner, inner, inner
    ).map(lambda p: f"max({p[0]}, -({p[1]})) if ({p[2]}) else not ({p[0]})")


@settings(max_examples=400, deadline=None)
@given(st.recursive(NUMBERS, arithmetic, max_leaves=8), st.integers(-50, 50), DECIMALS, st.integers(0, 9))
def test_arithmetic_is_pythons(text: str, a: int, b: float, c: int) -> None:
    scope: dict[str, Value] = {"a": a, "b": b, "c": c}
    try:
        expected = eval(text, {"__builtins__": {"max": max}}, dict(scope))  # the test's own text
    except ZeroDivisionError:
        assert "division by zero" in failure(text, scope=scope).message
        return
    got = value(text, scope)
    assert (got, type(got)) == (expected, type(expected))
