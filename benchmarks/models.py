"""Model files for benchmarks: a GGUF in other formats, and a model of Llama-3.2-1B's shape with random weights.

    python benchmarks/models.py FOLDER --from SmolLM2-135M-Instruct.Q4_1.gguf     # smollm2-{q4_0,q8_0,bf16}.gguf
    python benchmarks/models.py FOLDER --random q4_0 q4_k bf16                    # llama-1b-{q4_0,q4_k,bf16}.gguf

Needs the gguf package. Files that are there already are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
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
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY = 2048, 16, 32, 8, 64, 8192, 128_256
"""Llama-3.2-1B."""

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


def random_model(path: Path, format: str) -> None:
    """A model of Llama-3.2-1B's shape, with as many tokens, none of which means anything."""
    writer, (kind, file_type) = GGUFWriter(path, "llama"), FORMATS[format]
    random = np.random.default_rng(0)
    writer.add_name("random 1B")
    writer.add_file_type(file_type)
    writer.add_context_length(131_072)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(500_000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    add_tokens(writer)

    def add(name: str, rows: int, columns: int, kind: GGMLQuantizationType = kind) -> None:
        writer.add_tensor(f"{name}.weight", random_matrix(kind, rows, columns, random), raw_dtype=kind)

    ones = np.ones(HIDDEN, np.float32)
    add("token_embd", VOCABULARY, HIDDEN, embedding_kind(format, HIDDEN))
    writer.add_tensor("output_norm.weight", ones)
    for layer in (f"blk.{i}" for i in range(LAYERS)):
        writer.add_tensor(f"{layer}.attn_norm.weight", ones)
        add(f"{layer}.attn_q", HEADS * HEAD_DIM, HIDDEN)
        add(f"{layer}.attn_k", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"{layer}.attn_v", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"{layer}.attn_output", HIDDEN, HEADS * HEAD_DIM)
        writer.add_tensor(f"{layer}.ffn_norm.weight", ones)
        add(f"{layer}.ffn_gate", INTERMEDIATE, HIDDEN)
        add(f"{layer}.ffn_up", INTERMEDIATE, HIDDEN)
        add(f"{layer}.ffn_down", HIDDEN, INTERMEDIATE)
    finish(writer, path)


def add_tokens(writer: GGUFWriter) -> None:
    """The 256 bytes and names for all other tokens."""
    special = ["<unk>", "<s>", "</s>"]
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    names = [f"token{number}" for number in range(VOCABULARY - len(special) - len(data))]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    types += [gguf.TokenType.BYTE] * len(data) + [gguf.TokenType.NORMAL] * len(names)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *data, *names])
    writer.add_token_scores([0.0] * VOCABULARY)
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
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    wanted = {options.folder / f"llama-1b-{format}.gguf": (random_model, format) for format in options.random}
    if options.source:
        copy: Callable[[Path, str], None] = lambda path, format: requantize(options.source, path, format)  # noqa: E731
        wanted |= {options.folder / f"smollm2-{format}.gguf": (copy, format) for format in options.formats}
    for path, (make, format) in wanted.items():
        if not path.exists():
            make(path, format)
            print(path, f"{path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
