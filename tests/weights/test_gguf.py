import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labinfer.errors import Errors, LabinferError, WeightsError
from labinfer.runtime.weights import Checkpoint, dequantize, open_checkpoint, read_config

from .files import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    GgufTensor,
    gguf,
    pair,
    text,
)

ARCHITECTURE = pair("general.architecture", STRING, "llama")
FLOATS = np.arange(6, dtype=np.float32)
Q8_ROW = np.array([0.5], np.float16).tobytes() + bytes(range(32))
TENSORS = [GgufTensor("a.weight", "f32", [3, 2], 0), GgufTensor("b.weight", "q8_0", [32, 2], 32)]
DATA = FLOATS.tobytes() + bytes(8) + Q8_ROW + Q8_ROW
VALID = gguf([ARCHITECTURE, pair("llama.block_count", U32, 2)], TENSORS, DATA)


def write(directory: Path, content: bytes, name: str = "model.gguf") -> Path:
    path = directory / name
    path.write_bytes(content)
    return path


def open_codes(path: Path) -> list[str]:
    """Codes of what opening ``path`` raises, after checking that each error has a place and a remedy."""
    with pytest.raises(LabinferError) as error:
        open_checkpoint(path)
    errors = error.value.errors if isinstance(error.value, Errors) else (error.value,)
    assert all(single.place and single.remedy for single in errors)
    assert error.value.exit_code == 5
    return [single.code for single in errors]


def check_valid(checkpoint: Checkpoint) -> None:
    assert checkpoint.kind == "gguf"
    assert checkpoint.tensors["a.weight"].shape == (2, 3)
    assert checkpoint.tensors["b.weight"].format == "q8_0"
    a = dequantize(checkpoint.raw("a.weight"), "f32", (2, 3))
    b = dequantize(checkpoint.raw("b.weight"), "q8_0", (2, 32))
    np.testing.assert_array_equal(a, FLOATS.reshape(2, 3))
    np.testing.assert_array_equal(b, np.tile(np.arange(32) / 2, (2, 1)))


@pytest.mark.parametrize("version", [2, 3])
def test_reads_tensors_from_file_or_directory(tmp_path: Path, version: int) -> None:
    path = write(tmp_path, gguf([ARCHITECTURE], TENSORS, DATA, version=version))
    for place in (path, tmp_path, str(path)):
        with open_checkpoint(place) as checkpoint:
            check_valid(checkpoint)
        assert read_config(place) == {"general.architecture": "llama"}


METADATA: list[tuple[str, int, Any]] = [
    ("u8", U8, 255),
    ("i8", I8, -128),
    ("u16", U16, 65535),
    ("i16", I16, -3),
    ("u32", U32, 2**32 - 1),
    ("i32", I32, -(2**31)),
    ("u64", U64, 2**64 - 1),
    ("i64", I64, -(2**63)),
    ("f32", F32, 0.5),
    ("f64", F64, 0.1),
    ("yes", BOOL, True),
    ("text", STRING, "Grüße 🌍"),
    ("empty", STRING, ""),
]


def test_all_metadata_types(tmp_path: Path) -> None:
    pairs = [pair(*item) for item in METADATA]
    pairs += [pair(f"{key}[]", ARRAY, [value] * 3, element=kind) for key, kind, value in METADATA]
    pairs.append(pair("none[]", ARRAY, [], element=STRING))
    config = read_config(write(tmp_path, gguf(pairs, [], b"")))
    for key, _, value in METADATA:
        assert config[key] == value
        assert type(config[key]) is type(value)
        assert config[key + "[]"] == [value] * 3
    assert config["none[]"] == []


def test_text_that_is_not_utf8_is_kept_readable(tmp_path: Path) -> None:
    path = write(tmp_path, gguf([pair("tokens", ARRAY, [b"\xf0\x9f", b"ok"], element=STRING)], [], b""))
    assert read_config(path)["tokens"] == ["�", "ok"]


def test_alignment_key(tmp_path: Path) -> None:
    pairs = [ARCHITECTURE, pair("general.alignment", U32, 64)]
    tensors = [GgufTensor("a.weight", "f32", [3, 2], 0), GgufTensor("b.weight", "q8_0", [32, 2], 64)]
    content = gguf(pairs, tensors, DATA[:32] + bytes(32) + DATA[32:], alignment=64)
    with open_checkpoint(write(tmp_path, content)) as checkpoint:
        check_valid(checkpoint)
        assert checkpoint.tensors["b.weight"].offset % 64 == 0


@pytest.mark.alone
def test_vocabulary_of_50_000_opens_at_once(tmp_path: Path) -> None:
    words = [f"token{number}" for number in range(50_000)]
    pairs = [pair("tokens", ARRAY, words, element=STRING), pair("merges", ARRAY, words, element=STRING)]
    path = write(tmp_path, gguf(pairs, [], b""))
    start = time.perf_counter()
    config = read_config(path)
    assert time.perf_counter() - start < 0.5  # 0.03 s on an idle core
    assert config["merges"] == words


def test_every_truncation_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path, b"")
    assert open_codes(path) == ["weights.truncated"]
    head = VALID.index(b"b.weight") + 8 + 4 + 16 + 4 + 8
    for length in range(1, len(VALID)):
        path.write_bytes(VALID[:length])
        found = set(open_codes(path))
        assert found == {"weights.corrupt"} if length < 4 else found == {"weights.truncated"}, length
        if length < head:  # the header itself is cut: one structural error, not one per tensor
            assert len(found) == 1


def test_metadata_cut_at_the_end_of_the_file(tmp_path: Path) -> None:
    content = gguf([ARCHITECTURE], [], b"", alignment=1)
    assert read_config(write(tmp_path, content)) == {"general.architecture": "llama"}
    for length in range(24, len(content)):
        assert open_codes(write(tmp_path, content[:length])) == ["weights.truncated"]


def one(name: str = "w", format: str | int = "f32", dims: list[int] | None = None, offset: int = 0) -> bytes:
    return gguf([ARCHITECTURE], [GgufTensor(name, format, [8] if dims is None else dims, offset)], bytes(32))


def patched(position: int, value: bytes) -> bytes:
    return VALID[:position] + value + VALID[position + len(value) :]


HUGE = (1 << 62).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (patched(0, b"GGML"), "weights.corrupt", "does not start with 'GGUF'"),
        (patched(4, b"\0\0\0\3"), "weights.unsupported-format", "big-endian"),
        (patched(4, b"\1"), "weights.unsupported-format", "version 1"),
        (patched(4, b"\0"), "weights.unsupported-format", "version 0"),
        (patched(4, b"\4"), "weights.unsupported-format", "version 4"),
        (patched(8, HUGE), "weights.corrupt", "tensors, at most"),
        (patched(16, HUGE), "weights.corrupt", "metadata keys, at most"),
        (patched(24, HUGE), "weights.corrupt", "metadata key of"),
        (gguf([ARCHITECTURE] * 2, [], b""), "weights.corrupt", "appears twice"),
        (gguf([text(b"\xff") + bytes(5)], [], b""), "weights.corrupt", "is not UTF-8"),
        (gguf([text("k") + b"\x0d\0\0\0"], [], b""), "weights.corrupt", "unknown metadata type 13"),
        (gguf([text("k") + b"\x07\0\0\0\2"], [], b""), "weights.corrupt", "neither 0 nor 1"),
        (gguf([text("k") + b"\x08\0\0\0" + HUGE], [], b""), "weights.truncated", "needs 4611686018427387912 bytes"),
        (gguf([text("k") + b"\x09\0\0\0\x04\0\0\0" + HUGE], [], b""), "weights.too-large", "elements"),
        (gguf([text("k") + b"\x09\0\0\0\x08\0\0\0\0\0\1" + bytes(5)], [], b""), "weights.truncated", "needs"),
        (gguf([pair("k", ARRAY, [[1]], element=ARRAY)], [], b""), "weights.corrupt", "array inside an array"),
        (gguf([pair("general.alignment", U32, 48)], [], b""), "weights.corrupt", "power of two"),
        (gguf([pair("general.alignment", U32, 0)], [], b""), "weights.corrupt", "power of two"),
        (gguf([pair("general.alignment", STRING, "32")], [], b""), "weights.corrupt", "power of two"),
        (gguf([], [TENSORS[0]] * 2, DATA), "weights.duplicate-tensor", "appears twice"),
        (one(format="q2_k", dims=[256]), "weights.unsupported-format", "stored as Q2_K"),
        (one(format=20, dims=[32]), "weights.unsupported-format", "stored as IQ4_NL"),
        (one(format=4), "weights.unsupported-format", "unknown type 4"),
        (one(format="q8_0", dims=[8]), "weights.corrupt", "not a multiple of the 32"),
        (one(dims=[1] * 5), "weights.corrupt", "5 dimensions"),
        (one(dims=[1 << 62, 4]), "weights.corrupt", "impossible shape"),
        (one(dims=[0, 1 << 62]), "weights.corrupt", "impossible shape"),
        (one(dims=[2], offset=8), "weights.corrupt", "not a multiple of 32"),
        (one(offset=32), "weights.truncated", "outside the data"),
        (one(offset=(1 << 64) - 32), "weights.truncated", "outside the data"),
        (one(name="a\nb"), "weights.corrupt", "unprintable"),
        (one(name="\x9b2J"), "weights.corrupt", "unprintable"),
        (gguf([], [TENSORS[0], GgufTensor("c", "f32", [8], 0)], DATA), "weights.overlap", "overlap"),
    ],
)
def test_broken_file(tmp_path: Path, content: bytes, code: str, message: str) -> None:
    path = write(tmp_path, content)
    assert open_codes(path) == [code]
    with pytest.raises(WeightsError) as error:
        open_checkpoint(path)
    assert message in error.value.message
    assert str(error.value).replace("\n  help", "").isprintable()


def test_all_errors_of_a_file_in_one_run(tmp_path: Path) -> None:
    tensors = [GgufTensor("a", "q2_k", [256], 0), GgufTensor("b", "f32", [99], 0), GgufTensor("c", "q8_0", [3], 0)]
    expected = {"weights.unsupported-format", "weights.truncated", "weights.corrupt"}
    assert set(open_codes(write(tmp_path, gguf([], tensors, bytes(64))))) == expected


@pytest.mark.alone
def test_metadata_bombs_are_refused_quickly(tmp_path: Path) -> None:
    start = time.perf_counter()
    strings = text("k") + b"\x09\0\0\0\x08\0\0\0" + (4_000_000).to_bytes(8, "little") + bytes(32_000_000)
    assert open_codes(write(tmp_path, gguf([strings], [], b""))) == ["weights.too-large"]
    long_text = text("k") + b"\x08\0\0\0" + text(bytes(40 << 20))
    assert open_codes(write(tmp_path, gguf([long_text], [], b""))) == ["weights.too-large"]
    assert time.perf_counter() - start < 2  # 0.1 s on an idle machine


def split_model(directory: Path, change: Callable[[int], list[bytes]] | None = None) -> list[Path]:
    """A model in three parts, the first without tensors, as llama-gguf-split --no-tensor-first-split writes it."""
    paths = []
    for number in range(3):
        pairs = [pair("split.no", U16, number), pair("split.count", U16, 3), pair("split.tensors.count", I32, 2)]
        pairs = change(number) if change else pairs
        tensors = [GgufTensor(f"{'-ab'[number]}.weight", "f32", [3, 2], 0)] if number else []
        content = gguf([ARCHITECTURE, *pairs] if number == 0 else pairs, tensors, FLOATS.tobytes())
        paths.append(write(directory, content, f"tiny-0000{number + 1}-of-00003.gguf"))
    return paths


def test_split_model_from_directory_or_any_part(tmp_path: Path) -> None:
    for place in [tmp_path, *split_model(tmp_path)]:
        with open_checkpoint(place) as checkpoint:
            assert checkpoint.config["general.architecture"] == "llama"
            assert {name: info.file.name for name, info in checkpoint.tensors.items()} == {
                "a.weight": "tiny-00002-of-00003.gguf",
                "b.weight": "tiny-00003-of-00003.gguf",
            }
            assert checkpoint.raw("b.weight").tobytes() == FLOATS.tobytes()


def test_split_model_with_faults(tmp_path: Path) -> None:
    first, second, third = split_model(tmp_path)
    content = second.read_bytes()
    second.write_bytes(third.read_bytes())
    assert open_codes(first) == ["weights.split", "weights.duplicate-tensor"]
    second.unlink()
    assert open_codes(first) == ["weights.missing-file"]
    assert open_codes(write(tmp_path, content, "other.gguf")) == ["weights.split"]


def test_split_model_with_a_tensor_missing(tmp_path: Path) -> None:
    def promise_three(number: int) -> list[bytes]:
        return [pair("split.no", U16, number), pair("split.count", U16, 3), pair("split.tensors.count", I32, 3)]

    assert open_codes(split_model(tmp_path, promise_three)[0]) == ["weights.split"]


def test_two_models_in_a_directory(tmp_path: Path) -> None:
    write(tmp_path, VALID, "a.gguf")
    write(tmp_path, VALID, "b.gguf")
    assert open_codes(tmp_path) == ["weights.ambiguous"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated") / "x.gguf"


RICH = gguf(
    [pair(*item) for item in METADATA]
    + [pair("words", ARRAY, ["a", "b"], element=STRING), pair("split.count", U16, 1)],
    TENSORS,
    DATA,
)
NUMBERS = st.sampled_from([0, 1, 2, 7, 8, 9, 12, 13, 0xFF, 0xFFFF, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])


@settings(max_examples=500, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(4, len(RICH)), NUMBERS | st.integers(0, 255), st.sampled_from([1, 2, 4, 8])), max_size=4
    ),
    removed=st.none() | st.tuples(st.integers(4, len(RICH)), st.integers(1, 9)),
    cut=st.none() | st.integers(0, len(RICH)),
)
def test_mutated_files_never_crash(
    scratch: Path, edits: list[tuple[int, int, int]], removed: tuple[int, int] | None, cut: int | None
) -> None:
    content = RICH
    for position, number, width in edits:
        value = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        content = content[:position] + value + content[position + width :]
    if removed:
        content = content[: removed[0]] + content[sum(removed) :]
    scratch.write_bytes(content[:cut])
    start, exit_code = time.perf_counter(), 0
    try:
        with open_checkpoint(scratch) as checkpoint:
            for name, info in checkpoint.tensors.items():
                with np.errstate(all="ignore"):
                    assert dequantize(checkpoint.raw(name), info.format, info.shape).shape == info.shape
    except LabinferError as error:
        exit_code = error.exit_code
        str(error).encode()  # printable
    assert exit_code in (0, 5)
    assert time.perf_counter() - start < 1
