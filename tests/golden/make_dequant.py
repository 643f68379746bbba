"""Make dequant.npz: random blocks of each ggml format and the floats that the ``gguf`` package (0.19) turns them into.

Run by hand, only to renew the file: pip install gguf && python tests/golden/make_dequant.py
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

# Where the float16 scales lie in a block: their values are kept finite, all other bytes are random.
SCALES = {"q8_0": [0], "q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2]}
SCALES |= {"q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208]}
SPECIAL = [0.0, -0.0, 6e-8, -1.5e-5, 65504.0]


def main() -> None:
    random = np.random.default_rng(2)
    arrays = {}
    for name, offsets in SCALES.items():
        kind = GGMLQuantizationType[name.upper()]
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (16 if block_size == 32 else 6, block_bytes), dtype=np.uint8)
        for offset in offsets:
            scales = random.normal(0, 0.05, len(blocks)).astype("<f2")
            scales[: len(SPECIAL)] = random.permutation(SPECIAL)
            blocks[:, offset : offset + 2] = scales[:, None].view(np.uint8)
        arrays[name + ".blocks"] = blocks
        arrays[name + ".floats"] = dequantize(blocks, kind)
    halves = random.integers(0, 1 << 16, 128, dtype=np.uint16)
    bf16 = halves[(halves & 0x7F80) != 0x7F80].view(np.uint8)
    arrays["bf16.blocks"] = bf16
    arrays["bf16.floats"] = dequantize(bf16, GGMLQuantizationType.BF16)
    np.savez_compressed(Path(__file__).with_name("dequant.npz"), **arrays)


if __name__ == "__main__":
    main()
