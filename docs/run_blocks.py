"""Run the code blocks of a page in order, as a reader would: ``python docs/run_blocks.py docs/plan.md``.

They run in a copy of the checkout, so nothing here changes. ``sh`` blocks are commands, ``python`` blocks share one
namespace, a ``diff`` changes a file, and a ``text`` block is what the block before it prints; ``...`` stands for
anything. An HTML comment before a block says more: ``<!-- file: NAME -->`` writes it to a file, ``<!-- exit: 3 -->``
is the exit code to expect, ``<!-- needs: NAME -->`` asks for a pulled model or a package, and ``<!-- not run: WHY -->``
skips it.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(
    r"^(?:<!-- (?P<key>file|exit|needs|not run): (?P<value>.*?) -->\n+)?"
    r"^```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, its line in the page, and what the comment before it says."""

    kind: str
    text: str
    line: int
    says: dict[str, str]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of ``page``."""
    text = page.read_text("utf-8")
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("kind")) + 1
        says = {found["key"]: found["value"]} if found["key"] else {}
        yield Block(found["kind"], found["text"], line, says)


def apply_diff(text: str) -> None:
    """Change one file: each removed line goes, added lines follow the line before them."""
    lines = text.splitlines()
    path = Path(lines[1].removeprefix("+++ b/"))
    source, at = path.read_text("utf-8").splitlines(), -1
    for line in lines[2:]:
        sign, rest = line[:1], line[1:]
        if sign == "@":
            continue
        if sign == "+":
            at += 1
            source.insert(at, rest)
            continue
        places = [number for number, each in enumerate(source) if each == rest and number > at]
        assert places, f"{path} has no line {rest!r}"
        at = places[0] - (sign == "-")
        if sign == "-":
            del source[places[0]]
    path.write_text("\n".join(source) + "\n", "utf-8")


def run_shell(block: Block) -> str:
    """Run a block of commands; what they print."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        stdin=subprocess.DEVNULL, timeout=240,
    )  # fmt: skip
    wanted = int(block.says.get("exit", 0))
    assert done.returncode == wanted, f"exit code {done.returncode}, not {wanted}:\n{done.stdout}"
    return done.stdout


def run_python(block: Block, namespace: dict[str, Any]) -> str:
    """Run a block of Python; what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.text, f"line {block.line}", "exec"), namespace)
    return printed.getvalue()


def check_output(wanted: str, got: str) -> None:
    """Compare what was printed with what the page says."""
    wanted = wanted.replace("\n...\n", "...")  # a line of its own stands for any number of lines
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not doctest.OutputChecker().check_output(wanted, got, options):
        raise AssertionError(f"expected:\n{wanted}\ngot:\n{got}")


def run_page(page: Path, needs: str | None) -> None:
    """Run the blocks of ``page`` in the current directory: those that need ``needs``, or those that need nothing.

    Files are written and changed in either case.
    """
    namespace: dict[str, Any] = {}
    printed: str | None = None
    for block in blocks(page):
        try:
            if block.kind == "text" and not block.says:
                if printed is not None:
                    check_output(block.text, printed)
                printed = None
                continue
            printed = None
            if "file" in block.says:
                file = Path(block.says["file"])
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.text, "utf-8")
            elif block.kind == "diff":
                apply_diff(block.text)
            elif "not run" in block.says or block.says.get("needs") != needs:
                continue
            elif block.kind == "sh":
                printed = run_shell(block)
            elif block.kind == "python":
                printed = run_python(block, namespace)
        except Exception as error:
            raise AssertionError(f"{page.name}, line {block.line}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def copied_checkout() -> Iterator[Path]:
    """A copy of what the pages use of the checkout, as the current directory; Python and ``labinfer`` use it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for part in ("labinfer", "graphs", "tests/golden"):
            shutil.copytree(ROOT / part, folder / part)
        os.environ["PYTHONPATH"] = str(folder)
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        os.environ["COLUMNS"] = "100"
        sys.path[:] = [str(folder), *(each for each in sys.path if Path(each or ".").resolve() != ROOT / "docs")]
        with contextlib.chdir(folder):
            yield folder


def main() -> int:
    """Run one page; a second argument names what the blocks to run need, without it those that need nothing run."""
    page, needs = Path(sys.argv[1]).resolve(), sys.argv[2] if len(sys.argv) > 2 else None
    os.environ["LABINFER_PATIENCE"] = "0"  # figures on the pages are no measurements
    os.environ["LABINFER_DEVICES"] = "reference"  # the same output whether or not numba is installed
    with copied_checkout():
        run_page(page, needs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
