"""The chat on a terminal: a prompt with line editing and history, answers streamed, Ctrl-C to stop one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from labinfer.cli.output import current
from labinfer.cli.run import Answering, show
from labinfer.errors import UsageError
from labinfer.home import cache_dir

if TYPE_CHECKING:
    from labinfer.runtime.model import Model

HELP = """  /clear   forget the conversation
  /bye     leave (so does Ctrl-D)
  Ctrl-C   stop the answer"""
MAX_HISTORY = 1000


def chat(model: Model, answering: Answering) -> None:
    """Talk until /bye or Ctrl-D; the conversation is kept, unless the model has no chat template."""
    out = current()
    remembers = answering.uses_template(model)
    kind = "" if remembers else " (no chat template: every line is completed by itself)"
    out.note(f"{model.plan.source.name}{kind}. /help shows the commands.")
    messages: list[dict[str, str]] = []
    model.engine.start()  # steps in a thread of its own, where Ctrl-C interrupts nothing
    with _history():
        while (line := _ask()) is not None:
            if line in ("/bye", "/exit", "/quit"):
                return
            if line == "/clear":
                messages.clear()
            elif line == "/help" or (line.startswith("/") and " " not in line):
                click.echo(HELP)
            elif line:
                if not remembers:
                    messages.clear()
                _answer(model, answering, messages, line)


def _ask() -> str | None:
    """A line from the terminal, None at its end; Ctrl-C begins a new one."""
    try:
        return input(">>> ").strip()
    except EOFError:
        click.echo()
        return None
    except KeyboardInterrupt:
        click.echo("\n(/bye or Ctrl-D leaves)")
        return ""


def _answer(model: Model, answering: Answering, messages: list[dict[str, str]], line: str) -> None:
    """Answer ``line``, streaming; a question that cannot be answered is forgotten."""
    messages.append({"role": "user", "content": line})
    said: list[str] = []

    def stream(index: int, text: str) -> None:
        said.append(text)
        show(index, text)

    try:
        model.generate(answering.encode(model, messages), answering.params, stream, answering.lora)
    except KeyboardInterrupt:
        pass
    except UsageError as error:
        messages.pop()
        if error.code == "run.too-long":
            error.remedy = "the conversation fills the context: /clear forgets it"
        current().error(error, as_json=False)
        return
    click.echo("\n")
    messages.append({"role": "assistant", "content": "".join(said)})


@contextmanager
def _history() -> Iterator[None]:
    """Line editing, with the history of earlier chats."""
    try:
        import readline
    except ImportError:  # a Python built without it
        yield
        return
    file = cache_dir() / "chat_history"
    with suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(MAX_HISTORY)
    try:
        yield
    finally:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
