"""Chat templates: the Jinja program in a tokenizer's files that turns messages into the model's prompt text.

Templates are rendered by minijinja, or by jinja2's sandbox when a template needs what minijinja lacks, always in a
child process with limits on memory and time (see template_worker.py for why), kept for the next render.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from labinfer.errors import LabinferError, UsageError, WeightsError

_WORKER_FILE = Path(__file__).with_name("template_worker.py")
_LIMITS: dict[int, str] = {
    signal.SIGPROF: "it never ends",
    signal.SIGSEGV: "it recurses too deeply",
    signal.SIGABRT: "it recurses too deeply or needs too much memory",
    signal.SIGKILL: "it needs too much memory",
}


class _Worker:
    """One child process, started on first use and again whenever a template has killed it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, line: bytes) -> dict[str, str]:
        """Send one request line and return the answer."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = b""
            except BaseException:  # interrupted: the answer on its way would meet the next request
                self._stop()
                raise
            if reply.endswith(b"\n"):
                answer: dict[str, str] = json.loads(reply)
                return answer
            self._stop()
            cause = _LIMITS.get(-int(process.returncode), "it ended its renderer")
            return {"error": "limit", "message": cause}

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        # -P keeps the worker's own directory off sys.path; a new session keeps Ctrl-C away from it.
        command = [sys.executable, "-P", str(_WORKER_FILE)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def close(self) -> None:
        with self._lock:
            self._stop()


_worker = _Worker()


def _forget_worker() -> None:
    """After a fork the pipes belong to the parent."""
    global _worker
    _worker = _Worker()


os.register_at_fork(after_in_child=_forget_worker)
atexit.register(lambda: _worker.close())


def render_chat_template(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The prompt text for ``messages`` ([{"role", "content"}, ...]), as transformers' apply_chat_template renders it.

    ``variables`` are further names for the template (bos_token, enable_thinking, ...). Raises UsageError when the
    messages are malformed or the template refuses them, WeightsError when the template is broken, hostile or too big.
    """
    listed = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
    if not listed or not all(isinstance(message, Mapping) for message in messages):
        raise UsageError("chat.messages", "messages must be a list of objects with a role and a content")
    context = {
        "documents": None,
        **variables,
        "messages": list(messages),
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        line = json.dumps({"source": source, "variables": context}, ensure_ascii=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as problem:  # ValueError: also text that is not valid Unicode
        raise UsageError("chat.messages", f"messages must be plain JSON data: {problem}") from None
    answer = _worker.ask(line)
    if (text := answer.get("text")) is not None:
        return text
    raise _error(answer["error"], answer["message"])


def _error(kind: str, message: str) -> LabinferError:
    if kind == "refused":
        return UsageError("chat.refused", f"the model's chat template refuses these messages: {message}")
    if kind == "limit":
        remedy = "use the template of the model's publisher, or a plain prompt"
        return WeightsError("chat-template.limit", f"the chat template was stopped: {message}", remedy=remedy)
    remedy = "check the chat template, or use a plain prompt"
    if kind == "unsupported":
        remedy = "install jinja2 (pip install 'jinja2>=3.1.6'), which reads what minijinja does not"
    return WeightsError("chat-template.failed", f"the chat template cannot be rendered: {message}", remedy=remedy)
