"""API keys: those that are given, or one that is made once and kept."""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from labinfer.errors import UsageError
from labinfer.home import cache_dir

MAX_KEY_FILE = 1 << 20


def check_key(key: str) -> str:
    """``key``, if it can be one: it goes into a header."""
    if not 8 <= len(key) <= 256 or not key.isascii() or not key.isprintable() or " " in key:
        message = "an API key has 8 to 256 printable ASCII characters and no space"
        raise UsageError("serve.api-key", message, remedy="python -c 'import secrets; print(secrets.token_urlsafe())'")
    return key


def read_keys(file: str | Path) -> tuple[str, ...]:
    """The keys in a file, one a line; lines that begin with # are left out."""
    try:
        with open(file, "rb") as stream:
            text = stream.read(MAX_KEY_FILE).decode("ascii")
    except OSError as error:
        raise UsageError("serve.api-key-file", f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError("serve.api-key-file", f"{file} is not ASCII text") from None
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(check_key(line) for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UsageError("serve.api-key-file", f"{file} has no key")
    return keys


def kept_key() -> tuple[str, Path]:
    """The key of this user, made on first use, and the file that it is kept in, which only they can read."""
    file = cache_dir() / "api-key"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        with tempfile.NamedTemporaryFile("w", dir=file.parent) as stream:
            stream.write(secrets.token_urlsafe(24) + "\n")
            stream.flush()
            with suppress(FileExistsError):  # another process was first
                os.link(stream.name, file)
    return read_keys(file)[0], file
