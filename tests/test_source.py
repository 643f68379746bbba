"""The YAML loader: YAML 1.2 scalars, places, everything it refuses, and hostile files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from labinfer.compiler.source import Node, load_yaml
from labinfer.errors import Errors, InvalidFile, LabinferError, Place

MAP = """\
labmap: 1
family: tiny            # a comment
match: {model_type: [tiny, small]}
config:
  hidden_size: {hf: hidden_size, default: 4*heads}
  eps: {hf: rms_norm_eps, default: 1e-6}
  act: {default: "'silu'"}
blocks:
  layer:
    - {op: linear, id: [q, k], in: h, n: (heads + 2)*head_dim,
       when: not fused}
    - use: mlp
"""


def load(text: str, **limits: int) -> Node:
    return load_yaml("a.yaml", text=text, **limits)


def errors_of(text: str, **limits: int) -> list[tuple[str, int, int]]:
    with pytest.raises(LabinferError) as caught:
        load(text, **limits)
    errors = caught.value.errors if isinstance(caught.value, Errors) else [caught.value]
    assert all(isinstance(error, InvalidFile) and error.exit_code == 3 for error in errors)
    return [(error.code, error.place.line, error.place.column) for error in errors if error.place]


def test_a_map_becomes_plain_data() -> None:
    plain = load(MAP).plain()
    assert plain["match"] == {"model_type": ["tiny", "small"]}
    assert plain["config"]["eps"] == {"hf": "rms_norm_eps", "default": 1e-6}
    assert plain["config"]["act"] == {"default": "'silu'"}
    assert plain["blocks"]["layer"][0]["n"] == "(heads + 2)*head_dim"
    assert plain["blocks"]["layer"][1] == {"use": "mlp"}


def test_every_value_and_key_knows_its_place() -> None:
    def at(*path: str | int) -> Node:
        node: Any = load(MAP)
        for step in path:
            node = node.value[step]
        assert isinstance(node, Node)
        return node

    root = at()
    assert root.place == Place("a.yaml", 1, 1, "labmap: 1")
    assert root.key_places["config"] == Place("a.yaml", 4, 1, "config:")
    line = "  eps: {hf: rms_norm_eps, default: 1e-6}"
    assert at("config").key_places["eps"] == Place("a.yaml", 6, 3, line)
    assert at("config", "eps", "default").place == Place("a.yaml", 6, 36, line)
    assert at("blocks", "layer", 0, "when").place == Place("a.yaml", 11, 14, "       when: not fused}")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_places_count_characters_and_any_line_break(newline: str) -> None:
    root: Any = load(newline.join(["# é😀", "a: x", '"é😀": y']))
    assert root.value["é😀"].place == Place("a.yaml", 3, 7, '"é😀": y')


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("1.0e-5", 1e-5), ("1.", 1.0), (".5", 0.5), ("-3", -3), ("+7", 7), ("0o17", 15), ("0x1F", 31),
        ("017", 17), ("9223372036854775808", 2**63), (".inf", math.inf), ("-.Inf", -math.inf), ("null", None),
        ("~", None), ("Null", None), ("true", True), ("FALSE", False), ("no", "no"), ("on", "on"), ("Yes", "Yes"),
        ("off", "off"), ("none", "none"), ("None", "None"), ("1_000", "1_000"), ("12:30:45", "12:30:45"),
        ("2001-01-01", "2001-01-01"), ("0b1", "0b1"), ("1e", "1e"), ("-", None), (".", "."), ("+", "+"),
        ("tRue", "tRue"), ("4*d", "4*d"), ("'1'", "1"), ('"true"', "true"), ('"a\\n\\tb"', "a\n\tb"), ("''", ""),
        ("=", "="), ("nan", "nan"), ("١", "١"),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    if text == "-":
        assert load("- -").plain() == [[None]]
        return
    got = load(f"a: {text}").plain()["a"]
    assert got == value
    assert type(got) is type(value)


def test_not_a_number_and_empty_values() -> None:
    plain = load("a: .nan\nb:\nc: []\nd: {}").plain()
    assert math.isnan(plain.pop("a"))
    assert plain == {"b": None, "c": [], "d": {}}


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("a: 1\nb: 2\na: 3", [("yaml.duplicate-key", 3, 1)]),
        ("x: {a: 1, 'a': 2}", [("yaml.duplicate-key", 1, 11)]),
        ("a: &x 1\nb: *x", [("yaml.anchor", 1, 4), ("yaml.anchor", 2, 4)]),
        ("a: *d", [("yaml.anchor", 1, 4)]),
        ("*d : a", [("yaml.anchor", 1, 1), ("yaml.key-type", 1, 1)]),
        ("a: {<<: {b: 1}}", [("yaml.merge-key", 1, 5)]),
        ("a: !!python/object/apply:os.system [ls]", [("yaml.tag", 1, 4)]),
        ("a: !!str 1", [("yaml.tag", 1, 4)]),
        ("a: ! b", [("yaml.tag", 1, 4)]),
        ("%TAG ! tag:x,2000:\n---\na: 1", [("yaml.tag", 1, 1)]),
        ("1: a\ntrue: b\n~: c\n1.5: e", [("yaml.key-type", line, 1) for line in range(1, 5)]),
        ("[a, b]: c\n{d: e}: f", [("yaml.key-type", 1, 1), ("yaml.key-type", 2, 1)]),
        ("? [a]\n: {b: 1, b: 2}", [("yaml.key-type", 1, 3), ("yaml.duplicate-key", 2, 10)]),
        ("a: 1\n---\nb: 2", [("yaml.many-documents", 2, 1)]),
        ("a:\n\tb: 1", [("yaml.syntax", 2, 1)]),
        ("a: [1, 2", [("yaml.syntax", 1, 9)]),
        ("a: b: c", [("yaml.syntax", 1, 5)]),
        ("a: 'x", [("yaml.syntax", 1, 6)]),
        ("a: @b", [("yaml.syntax", 1, 4)]),
        ("a: \x07\nb: \x00", [("yaml.character", 1, 4), ("yaml.character", 2, 4)]),
        ("a: \ud800", [("yaml.character", 1, 4)]),
        ('a: "\\e[31m"\n"b\\0": 1', [("yaml.character", 1, 4), ("yaml.character", 2, 1)]),
        ("a: " + "9" * 5000 + "\nb: 1e400", [("yaml.number", 1, 4), ("yaml.number", 2, 4)]),
        ("", [("yaml.empty", 0, 0)]),
        ("# nothing\n", [("yaml.empty", 0, 0)]),
        ("---\n", [("yaml.empty", 0, 0)]),
        ("[[[[1]]]]", [("yaml.too-deep", 1, 4)]),
        ("[{a: 1, a: 2}, [[[", [("yaml.duplicate-key", 1, 9), ("yaml.too-deep", 1, 18)]),
    ],
)  # fmt: skip
def test_what_is_refused_and_where(text: str, errors: list[tuple[str, int, int]]) -> None:
    assert errors_of(text, max_depth=3) == errors


def test_all_errors_of_a_file_come_in_one_run_up_to_a_syntax_error() -> None:
    text = "a: &x 1\na: 2\nb: !t 3\n4: 5\nc: [1\nd: 6"
    codes = [code for code, _, _ in errors_of(text)]
    assert codes == ["yaml.anchor", "yaml.duplicate-key", "yaml.tag", "yaml.key-type", "yaml.syntax"]


def test_messages_say_what_to_do() -> None:
    with pytest.raises(InvalidFile) as caught:
        load("a:\n  b: 1\n\tc: 2")
    assert str(caught.value).startswith("a.yaml:3:1: error[yaml.syntax]")
    assert caught.value.remedy == "indent with spaces, not tabs"
    with pytest.raises(InvalidFile, match="the key 'a' already stands on line 1"):
        load("a: 1\nb: 2\na: 3")


def test_files_are_checked_before_they_are_read(tmp_path: Path) -> None:
    big = tmp_path / "big.yaml"
    with big.open("wb") as file:
        file.truncate(100_000_000)
    cases: list[tuple[Path | str, str]] = [
        (big, "yaml.too-large"), (tmp_path / "absent.yaml", "file.not-found"), (tmp_path, "file.unreadable"),
        ("a\0b", "file.unreadable"), ("/dev/zero", "yaml.too-large"),
    ]  # fmt: skip
    for path, code in cases:
        with pytest.raises(InvalidFile) as caught:
            load_yaml(path)
        assert caught.value.code == code
    with pytest.raises(InvalidFile, match="larger than 10 bytes"):
        load("a: 12345678", max_bytes=10)


def test_bytes_are_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: \xc3\xa9\n")
    assert load_yaml(path).plain() == {"a": "é"}
    path.write_bytes(b"a: 1\nb: \xc3\xa9\xff\n")
    with pytest.raises(InvalidFile) as caught:
        load_yaml(path)
    place = caught.value.place
    assert place is not None
    assert (caught.value.code, place.line, place.column) == ("yaml.encoding", 2, 5)
    path.write_bytes("a: 1".encode("utf-16"))
    with pytest.raises(InvalidFile, match="not valid UTF-8"):
        load_yaml(path)


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 30))
HOSTILE = {
    "deep list": ("[" * 100_000, "yaml.too-deep"),
    "deep mapping": ("{a: " * 100_000, "yaml.too-deep"),
    "deep block": ("- " * 100_000, "yaml.too-deep"),
    "alias bomb": (BOMB, "yaml.anchor"),
    "many values": ("- \n" * 330_000, "yaml.too-many-nodes"),
    "many tag directives": ("".join(f"%TAG !a{i}! b\n" for i in range(40_000)) + "---\n1", "yaml.tag"),
    "many errors": ("a: 1\n" * 190_000, "yaml.duplicate-key"),
    "control characters": ("\x01" * 1_000_000, "yaml.character"),
    "too large": ("x" * 100_000_000, "yaml.too-large"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_fails_fast(name: str) -> None:
    text, code = HOSTILE[name]
    start = time.process_time()
    assert errors_of(text)[0][0] == code
    assert time.process_time() - start < 1.5  # 0.7 s for the slowest on a free core


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_hostile_text_takes_little_memory() -> None:
    program = (
        "import re, sys\n"
        "from labinfer.compiler.source import load_yaml\n"
        "from labinfer.errors import LabinferError\n"
        "for text in ['- \\n' * 330_000, '[' * 100_000]:\n"
        "    try: load_yaml('a', text=text)\n"
        "    except LabinferError: pass\n"
        "    else: sys.exit('accepted')\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000


def test_the_parser_is_imported_only_when_used() -> None:
    program = "import sys, labinfer.compiler.source; sys.exit('yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_without_the_c_parser_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = load(MAP)
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert load(MAP) == fast
    assert errors_of("a: &x 1\na: [2") == [("yaml.anchor", 1, 4), ("yaml.duplicate-key", 2, 1), ("yaml.syntax", 2, 6)]


def loads_or_refuses(text: str) -> None:
    try:
        load(text).plain()
    except LabinferError as error:
        str(error).encode()  # it can be shown, caret and all


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:-[]{},&*!|>'\"%@`#?~ \n\t0.<\\é\x00\x85\u2028"), max_size=60))
@example("? a\n? b")
@example("\ufeffa")
def test_any_text_loads_or_is_refused(text: str) -> None:
    loads_or_refuses(text)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, len(MAP)), st.integers(0, 30),
    st.sampled_from(["", "\t", ":", "- ", "{", "}", "&a ", "*a", "!!str ", "'", '"', "\n", "<<: ", "%", "\0", "---\n"]),
)  # fmt: skip
def test_a_mutated_map_loads_or_is_refused(at: int, removed: int, inserted: str) -> None:
    loads_or_refuses(MAP[:at] + inserted + MAP[at + removed :])


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.text(alphabet=st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), max_size=12)

JSON = st.recursive(
    SCALARS | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_json_is_read_as_json(value: object) -> None:
    text = json.dumps({"value": value}, ensure_ascii=False)  # JSON is YAML 1.2
    assert load(text).plain() == {"value": value}
