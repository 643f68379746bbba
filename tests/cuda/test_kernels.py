"""Every kernel compiles for every kind of GPU, without spilling and within its registers; needs no GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from labinfer.backends.cuda import compile, nvrtc
from labinfer.backends.cuda.compile import Source
from labinfer.backends.cuda.emit_attention import prefill_tile
from labinfer.backends.cuda.emit_exchange import exchange_defines
from labinfer.backends.cuda.layout import EIGHT_BLOCKS, FORMATS, batch_stages, stream_blocks
from labinfer.errors import LabinferError

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")


def product(file: str, format: str, *defines: str) -> Source:
    half = ("HALF",) * (format != "bf16")
    return Source(file, (f"FORMAT={FORMATS.index(format)}", *half, *defines))


def stream(format: str, tokens: int, cluster: int, *defines: str) -> Source:
    form = product("stream", format, "STAGED").defines if format in EIGHT_BLOCKS else ()
    shape = (f"TOKENS={tokens}", f"CLUSTER={cluster}", f"BLOCKS={stream_blocks(format, tokens, cluster)}", "SLOTS=2")
    return Source("stream", (*form, *shape, *defines))


def prefill(dim: int, *defines: str) -> Source:
    rows, keys, blocks = prefill_tile(dim, "SOFTCAP" in defines)
    tile = (f"ROWS={rows}", f"KEYS={keys}", f"BLOCKS={blocks}")
    return Source("prefill", (f"HEAD_DIM={dim}", f"VALUE_DIM={dim}", *tile, *defines))


def attention(head_dim: int, value_dim: int, lanes: int, cache: int) -> Source:
    shape = (f"HEAD_DIM={head_dim}", f"VALUE_DIM={value_dim}", f"LANES={lanes}", "HEADS=4", f"CACHE={cache}")
    return Source("attention", shape)


def decode(dim: int, heads: int, *defines: str) -> Source:
    return Source("decode", (f"HEAD_DIM={dim}", f"VALUE_DIM={dim}", f"HEADS={heads}", "CACHE=2", *defines))


def batch(wide: int, *defines: str) -> Source:
    return Source("batch", (f"BATCH={wide}", f"STAGES={batch_stages(wide)}", *defines))


SOURCES = {
    "elementwise": (Source("elementwise"), 40),
    "narrow": (Source("elementwise", ("HALF",)), 40),
    "narrow-glu": (Source("elementwise", ("NARROW=2",)), 40),
    "norm": (Source("norm"), 72),
    "norm-narrow": (Source("norm", ("NARROW=2",)), 72),
    "plain": (Source("plain"), 64),
    "plain-experts": (Source("plain", ("EXPERTS",)), 64),
    "moe": (Source("moe"), 64),
    "greedy": (Source("greedy"), 64),
    "sample": (Source("sample"), 64),
    **{f"rope-{turn}": (Source("rope", (f"TURN={turn}", "CACHE=2")), 72) for turn in range(3)},
    "rope-norms": (Source("rope", ("TURN=0", "CACHE=2", "NORMS")), 72),
    **{f"attention-{cache}": (attention(64, 64, 8, cache), 168) for cache in range(3)},
    **{
        f"attention-cluster-{sparse}": (
            Source("attention", (*attention(64, 64, 8, 2).defines, "CLUSTER=8", f"SPARSE={sparse}", "TURN=0")),
            budget,
        )
        for sparse, budget in ((0, 168), (1, 216))
    },
    "attention-turn": (Source("attention", (*attention(64, 64, 8, 2).defines, "TURN=0")), 168),
    **{f"batch-{wide}": (batch(wide), 168) for wide in (16, 32, 64)},
    **{f"batch-{wide}-half": (batch(wide, "HALF", "GLU", "NARROW=1"), 168) for wide in (16, 32, 64)},
    **{f"batch-{wide}-glu": (batch(wide, "GLU", "NARROW=2", "CLUSTER=4"), 168) for wide in (16, 32, 64)},
    **{f"batch-{wide}-cluster": (batch(wide, "CLUSTER=8"), 168) for wide in (16, 32, 64)},
    "decode-plain": (decode(64, 1, "SOFTCAP"), 128),
    "decode-64": (decode(64, 4, "TURN=0", "NARROW=2"), 128),
    "decode-128": (decode(128, 8, "TURN=0"), 168),
    "decode-norms": (decode(128, 2, "TURN=0", "NORMS"), 168),
    "decode-norms-cluster": (decode(64, 4, "TURN=0", "NORMS", "CLUSTER=8"), 128),
    "decode-dynamic": (decode(128, 8, "TURN=2", "HALF"), 168),
    "decode-cluster": (decode(64, 4, "TURN=0", "CLUSTER=8"), 128),
    "decode-mixed": (decode(64, 4, "MIXED"), 128),
    "decode-mixed-cluster": (decode(64, 4, "MIXED", "NARROW=2", "CLUSTER=2"), 128),
    "attention-mixed": (Source("attention", (*attention(64, 64, 8, 2).defines, "MIXED", "CLUSTER=2", "SPARSE=0")), 168),
    **{f"prefill-{dim}": (prefill(dim), 255) for dim in (64, 128, 256)},
    "prefill-mixed": (prefill(64, "MIXED"), 255),
    "prefill-half": (prefill(64, "HALF", "SOFTCAP", "NARROW=1"), 255),
    **{f"stream-{n}": (stream("bf16", n, 1, "NORM", "GLU"), 128) for n in (1, 2, 4, 8)},
    **{f"stream-{format}": (stream(format, 1, 1, "NORM", "GLU"), 128) for format in FORMATS[3:]},
    "stream-rows": (stream("bf16", 8, 1, "NORM", "ROWS"), 128),
    "stream-narrow": (stream("bf16", 4, 1, "NARROW_INPUT", "ADD"), 128),
    "stream-narrow-q4_k": (stream("q4_k", 1, 2, "NARROW_INPUT", "ADD"), 128),
    "stream-leaves-narrow": (stream("bf16", 1, 1, "NORM", "GLU", "NARROW=2"), 128),
    **{f"stream-q4_0-{n}": (stream("q4_0", n, 1, "NORM", "GLU"), 128) for n in (2, 4, 8)},
    **{f"stream-{format}-8": (stream(format, 8, 1, "ADD"), 128) for format in ("q8_0", "q6_k")},
    **{f"stream-{format}-cluster": (stream(format, 1, 2, "ADD"), 128) for format in ("bf16", "q4_0", "q5_k")},
    "attention-wide": (attention(256, 256, 32, 2), 168),
    "attention-odd": (attention(20, 12, 4, 0), 168),
    **{f"mla-{format}": (product("mla", format, "CACHE=2"), 64) for format in ("f32", "bf16", "q4_k")},
    **{f"embedding-{format}": (product("embedding", format), 32) for format in FORMATS},
    **{
        f"few-{format}": (product("few", format, "TOKENS=1", "NORM", "GLU", "TILE_WARPS=2"), 128)
        for format in FORMATS[1:]
    },
    **{
        f"few-{tokens}": (product("few", "q4_0", f"TOKENS={tokens}", "ADD", "TILE_WARPS=8"), 128)
        for tokens in (2, 4, 8)
    },
    **{f"tiles-{format}": (product("tiles", format), 168) for format in FORMATS[1:]},
    **{f"exchange-{ranks}": (Source("exchange", exchange_defines(ranks)), 80) for ranks in (2, 8)},
    "tiles-experts": (product("tiles", "q4_k", "EXPERTS"), 168),
}
"""Each with the registers that a thread may take."""


@pytest.fixture(scope="session", autouse=True)
def _compiler() -> None:
    try:
        nvrtc.library()
    except LabinferError as error:
        pytest.skip(f"{error.message}; {error.remedy}")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SOURCES)
def test_compiles_without_spills(name: str, arch: str) -> None:
    source, budget = SOURCES[name]
    if arch == "sm_80" and any(define.startswith("CLUSTER") for define in source.defines):
        return  # only launched where there are clusters
    _, log = nvrtc.compile(source.text(), source.file, arch, source.defines)
    used = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    assert used
    assert max(used) <= budget
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}


def test_every_kernel_is_compiled_here() -> None:
    files = {path.stem for path in compile.FOLDER.glob("*.cu")}
    assert files == {source.file for source, _ in SOURCES.values()}


def test_machine_code_is_kept_by_content(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source("greedy")
    made = compile.cubin(source, "sm_90")
    [file] = (home / "cuda").iterdir()
    file.write_bytes(b"kept")
    assert compile.cubin(source, "sm_90") == b"kept"
    assert compile.cubin(source, "sm_80") != made
    monkeypatch.setattr(compile, "_read", lambda name: (compile.FOLDER / name).read_text("utf-8") + "\n")
    assert compile.cubin(source, "sm_90") == made


def test_a_kernel_that_does_not_compile_says_why() -> None:
    with pytest.raises(nvrtc.CompileError, match=r"nonsense\.cu"):
        nvrtc.compile("int f() { return g(); }", "nonsense", "sm_90", ())
