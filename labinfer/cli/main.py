"""The ``labinfer`` command: finds a command by name, imports only that one, and turns every failure into an exit code.

Exit codes: 0 ok, 1 runtime, 2 usage, 3 invalid map or plan, 4 does not fit or no device, 5 weights, 6 plan stale,
130 interrupted, 141 the reader of a pipe went away, 143 terminated.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from labinfer import __version__
from labinfer.cli.output import Output, current
from labinfer.errors import DoesNotFit, LabinferError, UsageError, did_you_mean
from labinfer.extras import EXTRAS, missing

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Run": {
        "run": ("labinfer.cli.run:run", "Answer a prompt, or chat."),
        "serve": ("labinfer.cli.serve:serve", "Serve models to every client of OpenAI's API."),
        "bench": ("labinfer.cli.bench:bench", "Measure a model, beside what the machine can do."),
    },
    "Maps and plans": {
        "compile": ("labinfer.cli.compile:compile_command", "Compile a model map into a plan."),
        "explain": ("labinfer.cli.explain:explain", "Explain a plan like a report."),
        "diff": ("labinfer.cli.diff:diff", "Tell what differs between two plans."),
        "graph": ("labinfer.cli.graph:graph", "Draw a map or a plan."),
        "validate": ("labinfer.cli.validate:validate", "Check a map against a config and a checkpoint."),
        "schema": ("labinfer.cli.schema:schema", "Print the JSON Schema of maps or of cluster files."),
        "profile": ("labinfer.cli.profile:profile", "Measure what the ops of a model cost on this machine."),
        "pack": ("labinfer.cli.pack:pack", "Pack buffers with known lifetimes into one arena."),
    },
    "Models": {
        "pull": ("labinfer.cli.models:pull", "Download a model by name."),
        "ls": ("labinfer.cli.models:ls", "List the models known by name."),
        "rm": ("labinfer.cli.models:rm", "Remove pulled models from the cache."),
    },
    "Machine": {
        "cluster": ("labinfer.cli.cluster:cluster", "Start, show or end the agents of a cluster's hosts."),
        "config": ("labinfer.cli.config:config", "Show the options that `labinfer serve` would have."),
        "devices": ("labinfer.cli.devices:devices", "List the devices of this machine."),
        "doctor": ("labinfer.cli.doctor:doctor", "Check this installation and say how to fix it."),
        "env": ("labinfer.cli.doctor:env", "Print a report to paste into an issue."),
    },
}
"""Section -> command -> (where it is, its one line in ``labinfer --help``, which imports none of them)."""

COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


def _set_quiet(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        current().quiet = True


def _set_verbosity(context: click.Context, _: click.Parameter, value: int) -> None:
    if not value:
        return
    out = current()
    out.verbosity += value
    import logging

    level = logging.INFO if out.verbosity == 1 else logging.DEBUG
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", force=True)


def _set_color(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value or os.environ.get("NO_COLOR"):
        current().color = False
        context.find_root().color = context.color = False


def _common_options() -> list[click.Option]:
    """The options that stand before or after the command's name, with the same meaning."""
    shared: dict[str, Any] = {"expose_value": False}
    return [
        click.Option(["-q", "--quiet"], is_flag=True, callback=_set_quiet, help="Only data and errors.", **shared),
        click.Option(
            ["-v", "--verbose"], count=True, callback=_set_verbosity, help="More detail (twice: debug).", **shared
        ),
        click.Option(["--no-color"], is_flag=True, callback=_set_color, help="No colour (as NO_COLOR=1).", **shared),
    ]


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are called, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All command names in the order of the help text."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command and give it the common options."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        taken = {text for parameter in command.params for text in parameter.opts}
        command.params += [option for option in _common_options() if taken.isdisjoint(option.opts)]
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one names the closest."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            hint = did_you_mean(name, COMMANDS)
            ctx.fail(f"no such command '{name}'" + (f"; {hint}" if hint else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands by section."""
        width = max(map(len, COMMANDS))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), help_line) for name, (_, help_line) in commands.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete command names from the table."""
        from click.shell_completion import CompletionItem

        names = [CompletionItem(n, help=line) for n, (_, line) in COMMANDS.items() if n.startswith(incomplete)]
        return names or click.Command.shell_complete(self, ctx, incomplete)


@click.command(
    "labinfer",
    cls=LazyGroup,
    params=_common_options(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog='Shell completion: eval "$(_LABINFER_COMPLETE=bash_source labinfer)" (or zsh_source, fish_source).',
)
@click.version_option(__version__, message="labinfer %(version)s")
def cli() -> None:
    """LABInfer: draw a model as a map, compile it to a readable plan, run it on the devices you have."""


def _terminate(signal_number: int, frame: object) -> NoReturn:
    """On SIGTERM, unwind as Ctrl-C does, so that locks, temporary files and devices are released."""
    raise SystemExit(128 + signal_number)


def _as_labinfer_error(error: Exception) -> LabinferError | None:
    """What the machine, rather than a bug, did to us, as a coded error; None for a bug."""
    if isinstance(error, LabinferError):
        return error
    if isinstance(error, click.ClickException):
        return UsageError("cli.usage", error.format_message())
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        return missing(module) if module in EXTRAS else None
    if isinstance(error, MemoryError):
        return DoesNotFit("host.out-of-memory", "the host has no memory left", remedy="use a smaller model or context")
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return LabinferError("host.io", f"{error.strerror}{where}")
    return None


def _report(error: Exception, out: Output, as_json: bool) -> int:
    """Tell the user about ``error``; returns the exit code."""
    if isinstance(error, click.ClickException) and not as_json:
        error.show()
        return UsageError.exit_code
    known = _as_labinfer_error(error)
    if out.verbosity and not isinstance(error, click.ClickException):
        import traceback

        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    if known is None:
        remedy = "this is a bug in labinfer: please report it" + (
            "" if out.verbosity else "; run again with -v for the traceback"
        )
        known = LabinferError("internal", f"{type(error).__name__}: {error}", remedy=remedy)
    out.error(known, as_json)
    return known.exit_code


def _invoke(argv: list[str], out: Output) -> int:
    """Run the command; ``--help`` and ``context.exit`` end it with their own exit code."""
    try:
        with cli.make_context("labinfer", argv, obj=out) as context:
            cli.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    return 0


def _silence_stdout() -> None:
    """Point stdout at nothing, so that the flush at exit cannot fail on a closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if instruction := os.environ.get("_LABINFER_COMPLETE"):
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, "labinfer", "_LABINFER_COMPLETE", instruction)
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without a character shows '?', never an error
    out = Output()
    try:
        exit_code = _invoke(argv, out)
        sys.stdout.flush()
        return exit_code
    except (KeyboardInterrupt, click.Abort):
        out.note("\ninterrupted")
        return 130
    except BrokenPipeError:
        _silence_stdout()
        return 141
    except Exception as error:
        options = argv[: argv.index("--")] if "--" in argv else argv
        return _report(error, out, as_json="--json" in options)
