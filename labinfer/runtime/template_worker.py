"""The child process that renders chat templates, started by chat_template.py; it imports nothing of labinfer.

A template is a program of unknown origin, and neither engine can be trusted with a hostile one in our own process:
minijinja's fuel stops loops but not list sums of 2^34 elements, and comparing deeply nested lists overflows its stack;
jinja2 has no limits at all. Here the kernel bounds memory and processor time, and a crash ends only this process.

One request per line on stdin, ``{"source", "variables"}``; one answer per line on stdout, ``{"text"}`` or
``{"error", "message"}`` with error one of refused, limit, unsupported, failed.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import signal
import sys
from datetime import datetime
from typing import Any

MAX_MEMORY_BYTES = 512 << 20
MAX_CPU_SECONDS = 1.0
FUEL = 5_000_000  # minijinja: one unit per instruction and per 64 bytes produced
MAX_TEXT = 16 << 20  # characters, beyond those of the request

# Hugging Face marks assistant text with this block; for rendering it is transparent.
_GENERATION = re.compile(r"\{%(?P<left>[-+]?)\s*(?P<end>end)?generation\s*(?P<right>[-+]?)%\}")


class RefusedError(Exception):
    """The template called ``raise_exception``."""


class LimitError(Exception):
    """The template ran past a limit."""


def raise_exception(message: object) -> None:
    """Template function: the messages do not suit this template."""
    raise RefusedError(str(message))


def strftime_now(format: str) -> str:
    """Template function: the local time as text."""
    return datetime.now().strftime(str(format)[:256])


def tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Template filter as in transformers: Python's spacing, and no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_FUNCTIONS = {"raise_exception": raise_exception, "strftime_now": strftime_now}


def _render_minijinja(source: str, variables: dict[str, Any]) -> str:
    import minijinja

    environment = minijinja.Environment(
        trim_blocks=True, lstrip_blocks=True, fuel=FUEL, filters={"tojson": tojson}, globals=_FUNCTIONS
    )
    try:
        return str(environment.render_str(source, **variables))
    except minijinja.TemplateError as problem:
        if problem.kind == "OutOfFuel":
            raise LimitError("it never ends, or produces too much text") from None
        # The first line is the message; the rest repeats the template's source.
        raise RuntimeError(str(problem).split("\n", 1)[0]) from None


def _render_jinja2(source: str, variables: dict[str, Any]) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(_FUNCTIONS)
    return str(environment.from_string(source).render(**variables))


def _render(source: str, variables: dict[str, Any]) -> str:
    source = _GENERATION.sub(lambda m: f"{{%{m['left']} {'endif' if m['end'] else 'if true'} {m['right']}%}}", source)
    try:
        return _render_minijinja(source, variables)
    except (RefusedError, LimitError):
        raise
    except Exception as problem:
        try:
            return _render_jinja2(source, variables)
        except ImportError:
            raise NotImplementedError(f"{problem}") from None


def answer(request: dict[str, Any], request_size: int) -> dict[str, str]:
    """Render one request; never raises for anything a template can do in Python."""
    try:
        text = _render(request["source"], request["variables"])
        if len(text) > MAX_TEXT + request_size:
            raise LimitError(f"it produces {len(text)} characters")
        text.encode()
        return {"text": text}
    except RefusedError as problem:
        return {"error": "refused", "message": str(problem)}
    except LimitError as problem:
        return {"error": "limit", "message": str(problem)}
    except MemoryError:
        return {"error": "limit", "message": f"it needs more than {MAX_MEMORY_BYTES >> 20} MiB"}
    except RecursionError:
        return {"error": "limit", "message": "it recurses too deeply"}
    except NotImplementedError as problem:
        return {"error": "unsupported", "message": str(problem)}
    except Exception as problem:
        return {"error": "failed", "message": f"{problem}"[:500]}


def main() -> None:
    """Answer requests until stdin closes."""
    for limit, value in ((resource.RLIMIT_AS, MAX_MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(OSError, ValueError):  # macOS refuses a limit on address space
            resource.setrlimit(limit, (value, value))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)  # nobody handles SIGPROF: it ends this process
        reply = json.dumps(answer(json.loads(line), len(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
