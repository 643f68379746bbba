"""The kernels of ``kernels/``: which text they are made of, and their machine code, kept in the cache by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from labinfer.backends.cuda import nvrtc
from labinfer.files import atomic_write
from labinfer.home import cache_dir

FOLDER = Path(__file__).parent / "kernels"


class Source(NamedTuple):
    """A file of ``kernels/`` with its macros, ``NAME`` or ``NAME=value``."""

    file: str
    defines: tuple[str, ...] = ()

    def text(self) -> str:
        """The prelude, what the macros ask for, and the file: one text, so that its digest stands for all of it."""
        names = {define.partition("=")[0] for define in self.defines}
        asked = {
            "formats": "FORMAT", "cache": "CACHE", "rope": "TURN", "products": "TOKENS", "staged": "STAGED",
            "experts": "EXPERTS", "attention": "HEADS",
        }  # fmt: skip
        parts = ["prelude.cuh", *(f"{file}.cuh" for file, name in asked.items() if name in names)]
        return "".join(f'#line 1 "{name}"\n{_read(name)}' for name in (*parts, f"{self.file}.cu"))


@cache
def _read(name: str) -> str:
    return (FOLDER / name).read_text("utf-8")


def cubin(source: Source, arch: str) -> bytes:
    """The machine code of ``source`` for ``arch``, from the cache where it is there."""
    path = cubin_path(source, arch)
    if not path.exists():
        code, _ = nvrtc.compile(source.text(), source.file, arch, source.defines)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as stream:
            stream.write(code)
    return path.read_bytes()


def cubin_path(source: Source, arch: str) -> Path:
    """The file that keeps it: named after all that it depends on."""
    key = "\n".join([source.text(), arch, *source.defines, str(nvrtc.version())])
    return cache_dir() / "cuda" / f"{source.file}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"


def build(sources: Iterable[Source], arch: str, progress: Callable[[int, int], None]) -> None:
    """Compile what the cache lacks, several at a time; ``progress(done, total)``."""
    missing = [source for source in dict.fromkeys(sources) if not cubin_path(source, arch).exists()]
    with ThreadPoolExecutor(8) as pool:
        for done, _ in enumerate(pool.map(lambda source: cubin(source, arch), missing), 1):
            progress(done, len(missing))
