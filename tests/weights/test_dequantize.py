from pathlib import Path

import numpy as np
import pytest

from labinfer.errors import WeightsError
from labinfer.ops.dequantization import CHUNK_ELEMENTS
from labinfer.runtime.weights import FORMATS, dequantize, stored_bytes

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "dequant.npz")
BLOCK_FORMATS = [name for name, stored in FORMATS.items() if stored.block_size > 1]


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, "bf16"])
def test_same_bits_as_gguf_package(name: str) -> None:
    blocks, floats = GOLDEN[name + ".blocks"], GOLDEN[name + ".floats"]
    result = dequantize(blocks.reshape(-1), name, floats.shape)
    assert result.dtype == np.float32
    assert result.shape == floats.shape
    np.testing.assert_array_equal(result.view(np.uint32), floats.view(np.uint32))


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_chunks_join_without_seams(name: str) -> None:
    blocks, floats = GOLDEN[name + ".blocks"], GOLDEN[name + ".floats"]
    repeats = 2 * CHUNK_ELEMENTS // floats.size + 1
    result = dequantize(np.tile(blocks.reshape(-1), repeats), name, (repeats, floats.size))
    np.testing.assert_array_equal(result, np.tile(floats.reshape(1, -1), (repeats, 1)))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
def test_plain_numbers(dtype: str) -> None:
    values = np.array([[0, 1, 100], [7, 3, 2]], "<" + dtype)
    raw = np.frombuffer(values.tobytes(), np.uint8)
    name = dtype[0] + str(8 * int(dtype[1:]))
    result = dequantize(raw, name, values.shape)
    np.testing.assert_array_equal(result, values.astype(np.float32))
    assert result.flags.writeable
    assert result.flags.owndata or result.base.flags.owndata


def test_unaligned_source() -> None:
    raw = np.frombuffer(b"?" + np.arange(5, dtype="<f4").tobytes(), np.uint8)[1:]
    np.testing.assert_array_equal(dequantize(raw, "f32", (5,)), np.arange(5))


def test_empty_and_scalar() -> None:
    assert dequantize(np.empty(0, np.uint8), "q4_k", (0, 256)).shape == (0, 256)
    assert dequantize(np.frombuffer(b"\0\0\x80?", np.uint8), "f32", ()) == 1


def test_stored_bytes() -> None:
    assert stored_bytes("q4_1", (49152, 576)) == 49152 * 18 * 20
    assert stored_bytes("q6_k", (3, 512)) == 3 * 2 * 210
    assert stored_bytes("bf16", (3, 5)) == 30
    assert stored_bytes("f32", ()) == 4
    with pytest.raises(WeightsError, match="not a multiple of the 256"):
        stored_bytes("q4_k", (256, 32))
    with pytest.raises(WeightsError, match="did you mean 'q4_k'"):
        stored_bytes("q4_kk", (256,))


def test_wrong_size_is_an_error() -> None:
    with pytest.raises(WeightsError, match="takes 34 bytes, 33 were given"):
        dequantize(np.zeros(33, np.uint8), "q8_0", (32,))
