"""Model files for benchmarks: a GGUF in other formats, and models of well-known shapes with random weights.

    python benchmarks/models.py FOLDER --from SmolLM2-135M-Instruct.Q4_1.gguf     # smollm2-{q4_0,q8_0,bf16}.gguf
    python benchmarks/models.py FOLDER --random q4_0 q4_k bf16                    # llama-1b-{q4_0,q4_k,bf16}.gguf
    python benchmarks/models.py FOLDER --random bf16 --shape qwen3-0.6b           # qwen3-0.6b-bf16.gguf

Needs the gguf package. Files that are there already are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

FORMATS = {
    "q4_0": (GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (GGMLQuantizationType.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q8_0": (GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_k": (GGMLQuantizationType.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_M),
    "q5_k": (GGMLQuantizationType.Q5_K, gguf.LlamaFileType.MOSTLY_Q5_K_M),
    "q6_k": (GGMLQuantizationType.Q6_K, gguf.LlamaFileType.MOSTLY_Q6_K),
    "bf16": (GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's family and sizes; ``eps`` is that of its norms, and ``head_norms`` says whether heads have some.

    ``tied``: the embedding is the output matrix too.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    theta: float
    eps: float
    head_norms: bool = False
    tied: bool = True


SHAPES = {
    "llama-1b": Shape("llama", 2048, 16, 32, 8, 64, 8192, 128_256, 5e5, 1e-5),
    "qwen3-0.6b": Shape("qwen3", 1024, 28, 16, 8, 128, 3072, 151_936, 1e6, 1e-6, head_norms=True),
    "llama-8b": Shape("llama", 4096, 32, 32, 8, 128, 14336, 128_256, 5e5, 1e-5, tied=False),
}
"""Llama-3.2-1B, Qwen3-0.6B, Llama-3.1-8B."""

RANDOM_BLOCKS = {
    GGMLQuantizationType.Q4_0: {0: 4.6},
    GGMLQuantizationType.Q8_0: {0: 74.0},
    GGMLQuantizationType.Q4_K: {0: 4.6 * 36.5, 2: 4.6 * 36.5 / 7.5},
    GGMLQuantizationType.Q5_K: {0: 9.2 * 36.5, 2: 9.2 * 36.5 / 15.5},
    GGMLQuantizationType.Q6_K: {208: 74.0 * 18.5},
}
"""Where scales stand in a block, and what 0.02 is divided by for them, so that elements vary by it about 0."""

K_QUANTS = ("q4_k", "q5_k", "q6_k")
"""Only for random models: the gguf package reads these formats, but does not write them."""


def finish(writer: GGUFWriter, path: Path) -> None:
    """Write the file whole or not at all."""
    writer.write_header_to_file(path.with_suffix(".part"))
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".part").rename(path)


def embedding_kind(format: str, columns: int) -> GGMLQuantizationType:
    """What llama-quantize stores an embedding in that is the output matrix too: more bits than four."""
    if format not in ("q4_0", "q4_k", "q5_k"):
        return FORMATS[format][0]
    return GGMLQuantizationType.Q6_K if columns % 256 == 0 else GGMLQuantizationType.Q8_0


def requantize(source: Path, path: Path, format: str) -> None:
    """``source`` with every matrix in ``format``, its embedding as llama-quantize has it, and all else as it is."""
    reader, (kind, file_type) = GGUFReader(source), FORMATS[format]
    writer = GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if data.ndim < 2:
            writer.add_tensor(tensor.name, data)
        else:
            here = embedding_kind(format, data.shape[1]) if tensor.name == "token_embd.weight" else kind
            writer.add_tensor(tensor.name, gguf.quants.quantize(data, here), raw_dtype=here)
    finish(writer, path)


def random_matrix(kind: GGMLQuantizationType, rows: int, columns: int, random: np.random.Generator) -> np.ndarray:
    """Stored bytes of a matrix with elements of about 0.02, uint8 [rows, bytes of a row]."""
    if kind == GGMLQuantizationType.BF16:
        values = random.standard_normal((rows, columns), np.float32) * np.float32(0.02)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows, columns // size, block_bytes), np.uint8)
    for at, spread in RANDOM_BLOCKS[kind].items():
        blocks[:, :, at : at + 2] = np.frombuffer(np.float16(0.02 / spread).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def random_model(path: Path, format: str, shape: Shape) -> None:
    """A model of such a shape, with as many tokens, none of which means anything."""
    writer, (kind, file_type) = GGUFWriter(path, shape.family), FORMATS[format]
    random = np.random.default_rng(0)
    writer.add_name("random")
    writer.add_file_type(file_type)
    writer.add_context_length(131_072)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.theta)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocabulary)
    add_tokens(writer, shape.vocabulary)

    def add(name: str, rows: int, columns: int, kind: GGMLQuantizationType = kind) -> None:
        writer.add_tensor(f"{name}.weight", random_matrix(kind, rows, columns, random), raw_dtype=kind)

    def add_norm(name: str, size: int = shape.hidden) -> None:
        writer.add_tensor(f"{name}_norm.weight", np.ones(size, np.float32))

    add("token_embd", shape.vocabulary, shape.hidden, embedding_kind(format, shape.hidden))
    add_norm("output")
    if not shape.tied:
        add("output", shape.vocabulary, shape.hidden, embedding_kind(format, shape.hidden))
    for layer in (f"blk.{i}" for i in range(shape.layers)):
        add_norm(f"{layer}.attn")
        add(f"{layer}.attn_q", shape.heads * shape.head_dim, shape.hidden)
        add(f"{layer}.attn_k", shape.kv_heads * shape.head_dim, shape.hidden)
        if shape.head_norms:
            add_norm(f"{layer}.attn_q", shape.head_dim)
            add_norm(f"{layer}.attn_k", shape.head_dim)
        add(f"{layer}.attn_v", shape.kv_heads * shape.head_dim, shape.hidden)
        add(f"{layer}.attn_output", shape.hidden, shape.heads * shape.head_dim)
        add_norm(f"{layer}.ffn")
        add(f"{layer}.ffn_gate", shape.intermediate, shape.hidden)
        add(f"{layer}.ffn_up", shape.intermediate, shape.hidden)
        add(f"{layer}.ffn_down", shape.hidden, shape.intermediate)
    finish(writer, path)


def add_tokens(writer: GGUFWriter, vocabulary: int) -> None:
    """The 256 bytes and names for all other tokens."""
    special = ["<unk>", "<s>", "</s>"]
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    names = [f"token{number}" for number in range(vocabulary - len(special) - len(data))]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    types += [gguf.TokenType.BYTE] * len(data) + [gguf.TokenType.NORMAL] * len(names)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *data, *names])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from", dest="source", type=Path, metavar="GGUF", help="the model to write in other formats")
    parser.add_argument(
        "--formats", nargs="+", default=["q4_0", "q8_0", "bf16"], choices=sorted(set(FORMATS) - set(K_QUANTS))
    )
    parser.add_argument("--random", nargs="+", default=[], choices=["q4_0", "q8_0", *K_QUANTS, "bf16"])
    parser.add_argument("--shape", default="llama-1b", choices=SHAPES, help="of the random models")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    make_random = partial(random_model, shape=SHAPES[options.shape])
    wanted = {options.folder / f"{options.shape}-{format}.gguf": (make_random, format) for format in options.random}
    if options.source:
        copy: Callable[[Path, str], None] = lambda path, format: requantize(options.source, path, format)  # noqa: E731
        wanted |= {options.folder / f"smollm2-{format}.gguf": (copy, format) for format in options.formats}
    for path, (make, format) in wanted.items():
        if not path.exists():
            make(path, format)
            print(path, f"{path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
