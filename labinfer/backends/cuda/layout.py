"""How this backend lays out weights and numbers things for its kernels: sizes only, so that compiling needs no GPU.

A matrix keeps its stored numbers, row by row. Plain 16-bit rows are padded with zeros to a multiple of 32 columns.
Block formats are cut into planes, each for all rows' blocks of 32 columns: codes (16 bytes of nibbles, byte ``j`` with
column ``j`` in its low and ``j + 16`` in its high half, or 16 of int8 for
the first 16 columns and 16 for the rest), further bits of the codes, and scales. In
a plane, eight rows lie together, and of them four blocks of each row: what the lanes of a warp read at once. Rows are
filled up to a multiple of eight, and their blocks of four, with zeros. Scales that eight blocks share lie row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from labinfer.errors import DoesNotFit, WeightsError
from labinfer.ops.activations import FUNCTIONS

FORMATS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
"""Formats that kernels read; their numbers there (``kernels/formats.cuh``) are their places here."""

ACTIVATION_CODES = {name: code for code, name in enumerate(FUNCTIONS)}
"""The number that stands for an activation in a kernel."""

CACHE_CODES = {"float32": 0, "float16": 1, "uint16": 2}
"""``CACHE`` of the kernels, by the numpy dtype of a cache's array; bf16 travels as uint16."""

EIGHT_BLOCKS = {
    "q8_0": 8 * 34, "q4_0": 8 * 18, "q4_1": 8 * 20, "q5_0": 8 * 22, "q5_1": 8 * 24,
    "q4_k": 8 * 18 + 4, "q5_k": 8 * 22 + 4, "q6_k": 8 * 26 + 2,
}  # fmt: skip
"""Bytes of 256 columns in the block formats; K-quants have scales unpacked to a byte each."""

ALIGNMENT = 256
"""Bytes: what weights and scratch memory are rounded up to."""

FEW_TOKENS = 8
"""So many tokens go through the kernel that reads weights straight into fragments, or by bulk copies."""

FEW_SHARED_BYTES = 100_000
"""Activations of such a product that a block can keep in shared memory, beside another block's."""

STREAM_CHUNK = 2048
"""Columns of a tile that come to shared memory at once, where weights come by bulk copies (``stream.cu``)."""

STREAM_SHARED_BYTES = 75_000
"""Shared memory for tiles and activations of a block there: a third of a multiprocessor's."""

BATCH_TOKENS, BATCH_PRODUCTS = 64, 1_700_000_000
"""Where weights are plain, so many tokens are ``batch.cu``'s, and of decode steps, whose attention ends unevenly and
leaves room for it, so many products; measured on an H100.
"""

BATCH_ROWS, BATCH_COLUMNS = 64, 64
"""``ROWS`` and ``COLUMNS`` of ``batch.cu``."""

BATCH_SHARED_BYTES = 1 << 16
"""Shared memory of a block there: blocks of the next kernel fit beside it; measured."""

CUBLAS_BYTES = 32 << 20
"""cuBLAS's scratch memory, as NVIDIA recommends for Hopper."""


def rounded(nbytes: int) -> int:
    """``nbytes`` rounded up to whole pieces of memory."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def number_of(format: str) -> int:
    """The kernels' number of ``format``; raises WeightsError for one that they cannot read."""
    if format not in FORMATS:
        message = f"the CUDA backend has no kernel for weights in format '{format}'"
        raise WeightsError("weights.unsupported-format", message, remedy="it has: " + ", ".join(FORMATS))
    return FORMATS.index(format)


def pitch(columns: int) -> int:
    """Numbers from row to row of a 16-bit matrix."""
    return -(-columns // 32) * 32


def matrix_bytes(format: str, rows: int, columns: int) -> int:
    """Bytes of one matrix [rows, columns]."""
    number_of(format)
    if format in EIGHT_BLOCKS:
        return rounded(-(-rows // 8) * -(-columns // 128) * 4 * EIGHT_BLOCKS[format])
    return rounded(rows * columns * 4 if format == "f32" else rows * pitch(columns) * 2)


def weight_bytes(format: str, shape: Sequence[int]) -> int:
    """Bytes that a stored tensor of ``shape`` takes here: its matrices, or a vector as float32."""
    if len(shape) < 2:
        return rounded(4 * prod(shape))
    return prod(shape[:-2]) * matrix_bytes(format, shape[-2], shape[-1])


def fits_few(format: str, tokens: int, columns: int) -> bool:
    """Whether a product with ``tokens`` rows goes through the kernel for few tokens."""
    if format == "f32" or tokens > FEW_TOKENS:
        return False
    return few_tokens(tokens) * few_row_bytes(columns) <= FEW_SHARED_BYTES


def few_tokens(tokens: int) -> int:
    """Tokens that the kernel for few is compiled for."""
    return 1 << (tokens - 1).bit_length()


def few_row_bytes(columns: int) -> int:
    """Bytes of shared memory for one token's activations there."""
    return (-(-columns // 128) * 32 + 1) * 8


def fits_stream(format: str, tokens: int, columns: int) -> bool:
    """Whether a product with ``tokens`` rows can have its weights come by bulk copies, of 16 bytes or a multiple."""
    return format != "f32" and tokens <= FEW_TOKENS and (format in EIGHT_BLOCKS or columns % 64 == 0)


def stream_blocks(format: str, tokens: int, cluster: int) -> int:
    """Blocks of such a product that have registers on one multiprocessor."""
    return 2 if tokens > 2 or format in EIGHT_BLOCKS or cluster > 1 else 3


def stream_slots(format: str, tokens: int, columns: int, pieces: int) -> int:
    """Tiles under way for a block that has so many ``pieces`` of weights to multiply; measured."""
    if format not in EIGHT_BLOCKS:
        return 1
    room = STREAM_SHARED_BYTES - stream_x_bytes(tokens)
    return min(pieces, max(2, room // stream_tile_bytes(format, columns)))


def stream_tile_bytes(format: str, columns: int) -> int:
    """Bytes of shared memory for 16 rows, of as many of so many columns as come at once."""
    columns = min(STREAM_CHUNK, columns)
    size = 8 * EIGHT_BLOCKS[format] * -(-columns // 128) if format in EIGHT_BLOCKS else 32 * columns
    return -(-size // 128) * 128


def stream_x_bytes(tokens: int) -> int:
    """Bytes of shared memory for the activations that a tile meets."""
    return 2 * tokens * (STREAM_CHUNK + 32)


def fits_batch(tokens: int, sequences: int, rows: int, columns: int) -> bool:
    """Whether such a product, in a step of so many sequences, is quicker by ``batch.cu`` than by cuBLAS."""
    return tokens <= BATCH_TOKENS or (tokens == sequences and tokens * rows * columns <= BATCH_PRODUCTS)


def batch_tokens(tokens: int) -> int:
    """Tokens that a block there takes."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64


def batch_split(blocks: int, columns: int, processors: int) -> int:
    """Into how many parts, each for another block, columns are cut where there are so few ``blocks``."""
    split = 1
    while split < 8 and blocks * split <= processors and columns // split >= 8 * BATCH_COLUMNS:
        split *= 2
    return split


def batch_stages(wide: int) -> int:
    """Pieces of columns that a block there has room for, which takes ``wide`` tokens."""
    return BATCH_SHARED_BYTES // batch_stage_bytes(wide)


def batch_stage_bytes(wide: int) -> int:
    """Bytes of such a piece of weights and activations."""
    return 2 * BATCH_COLUMNS * (BATCH_ROWS + wide)


MAX_RANKS = 8
"""GPUs that run a stage together (``Peers`` of ``exchange.cu``): as many as one host connects directly."""

EXCHANGE_FEW, EXCHANGE_BLOCKS, EXCHANGE_PIECE = 1 << 14, 256, 512
"""``FEW``, ``BLOCKS`` and ``PIECE`` of ``exchange.cu``; the first and last in fours of numbers."""


def exchange_bytes(ranks: int) -> int:
    """Bytes of ``Mailbox`` of ``exchange.cu``."""
    if ranks > MAX_RANKS:
        message = f"{ranks} GPUs cannot run a stage together, at most {MAX_RANKS}"
        raise DoesNotFit("device.ranks", message, remedy="make them stages of a pipeline, of fewer ranks each")
    parts = 32 * EXCHANGE_FEW + 16 * EXCHANGE_BLOCKS * EXCHANGE_PIECE
    return 128 * (1 + EXCHANGE_BLOCKS) + 2 * ranks * parts


SAMPLE_BINS = 2048
"""``BINS`` of ``sample.cu``."""

SAMPLE_PARTS = 64
"""Blocks that look at a row of logits, at most."""

LISTED_TOKENS = 1024
"""Tokens with a bias or a penalty, for each row on the average, that fit on the device."""


def sampling_words(rows: int, groups: int) -> dict[str, int]:
    """What is kept to choose the tokens of ``rows`` rows of logits, in words of four bytes, for ``groups`` in turn."""
    listed, parts, bins = LISTED_TOKENS * rows, SAMPLE_PARTS * rows, SAMPLE_BINS * rows
    words = {"rules": 16 * rows, "spans": 3 * rows, "tokens": listed, "numbers": listed, "best": 2 * parts}
    words |= {"least": parts, "sums": 2 * bins, "counts": bins, "made": groups * rows}
    return {name: -(-size // 64) * 64 for name, size in words.items()}


def sampling_bytes(rows: int, groups: int) -> int:
    """Bytes of all that."""
    return 4 * sum(sampling_words(rows, groups).values())
