"""The command line as a whole: speed, help, options, errors and exit codes."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from labinfer import __version__
from labinfer.cli.main import COMMANDS, LazyGroup, cli
from labinfer.errors import DoesNotFit, Errors, InvalidFile, LabinferError, StalePlan, UsageError, WeightsError
from labinfer.units import human_bytes

PROBE = '''
import os, sys, time
import click
from labinfer import errors
from labinfer.cli.output import current
@click.command()
@click.argument("what")
@click.option("--temperature", type=float)
@click.option("--json", "as_json", is_flag=True)
def probe(what, temperature, as_json):
    """A command that fails as told."""
    out = current()
    if what == "output":
        out.note("a note"); out.detail("a detail"); out.data(click.style("data", fg="red"))
    elif what == "table":
        out.table(["NAME", "SIZE"], [["x" * 200, "1"], ["[red]y", "22"]], right=["SIZE"])
    elif what == "sleep":
        out.data("ready"); sys.stdout.flush(); time.sleep(60)
    elif what == "flood":
        while True: out.data("x" * 1000)
    elif what == "several":
        place = errors.Place("m.yaml", 3, 5, "abcdefgh")
        raise errors.Errors([errors.InvalidFile("map.a", "first", place=place), errors.InvalidFile("map.b", "second")])
    elif what == "numba":
        raise ModuleNotFoundError("No module named 'numba'", name="numba.core")
    elif what == "open":
        open("/nowhere/at/all")
    elif what == "bug":
        {}["missing"]
    else:
        raise getattr(errors, what)("some.code", "what happened", remedy="what to do")
'''
START = "import sys; from labinfer.cli import main as m; m.COMMANDS['probe'] = ('probe:probe', ''); sys.exit(m.main())"


@pytest.fixture
def start(tmp_path: Path) -> list[str]:
    """A command line that starts labinfer with one command more, ``probe``."""
    (tmp_path / "probe.py").write_text(PROBE)
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {START}"]


def run(start: list[str], *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    return subprocess.run([*start, *arguments], capture_output=True, text=True, env=variables, timeout=60)


def labinfer(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "labinfer"], *arguments, **environment)


@pytest.mark.alone
def test_help_is_quick_and_imports_no_command():
    quickest = float("inf")
    for _ in range(10):  # seconds of a processor, which others do not use up, though their work makes them longer
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = labinfer("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        quickest = min(quickest, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if quickest <= 0.25:
            break
    assert result.returncode == 0
    assert all(name in result.stdout and line in result.stdout for name, (_, line) in COMMANDS.items())
    assert quickest <= 0.25

    code = "import sys, labinfer.cli.main as m; m.main(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    modules = run([sys.executable, "-c", code]).stderr
    for heavy in ("numpy", "rich", "yaml", "pydantic", "networkx", "tokenizers", "labinfer.catalogue"):
        assert f"'{heavy}'" not in modules


@pytest.mark.parametrize("name", COMMANDS)
def test_table_line_is_the_commands_own(name: str):
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    assert command.get_short_help_str(200) == COMMANDS[name][1]
    assert {"--quiet", "--verbose", "--no-color", "--json"} <= {
        text for option in command.params for text in option.opts
    }


def test_common_options_are_added_once():
    first = cli.get_command(click.Context(cli), "ls")
    again = cli.get_command(click.Context(cli), "ls")
    assert first is again
    assert [option.opts for option in again.params].count(["--no-color"]) == 1


def test_version():
    assert labinfer("--version").stdout == f"labinfer {__version__}\n"


def test_did_you_mean_for_commands_and_options(start: list[str]):
    result = labinfer("comple")
    assert result.returncode == 2
    assert "did you mean 'compile'?" in result.stderr
    result = run(start, "probe", "output", "--temprature", "1")
    assert result.returncode == 2
    assert "--temperature" in result.stderr
    assert labinfer("zzzzzz").stderr.rstrip().endswith("no such command 'zzzzzz'")


@pytest.mark.parametrize("kind", [LabinferError, UsageError, InvalidFile, DoesNotFit, WeightsError, StalePlan])
def test_errors_give_their_exit_code(start: list[str], kind: type[LabinferError]):
    result = run(start, "probe", kind.__name__)
    assert result.returncode == kind.exit_code
    assert result.stdout == ""
    assert result.stderr == "error[some.code]: what happened\n  help: what to do\n"


def test_errors_as_json_are_the_one_document_on_stdout(start: list[str]):
    result = run(start, "probe", "several", "--json")
    assert result.returncode == 3
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["exit_code"] == 3
    assert [(e["code"], e["file"], e["line"]) for e in report["errors"]] == [
        ("map.a", "m.yaml", 3),
        ("map.b", None, None),
    ]
    usage = run(start, "probe", "--json")
    assert usage.returncode == 2
    assert json.loads(usage.stdout)["errors"][0]["code"] == "cli.usage"


def test_several_errors_are_all_shown(start: list[str]):
    text = run(start, "probe", "several").stderr
    assert "m.yaml:3:5: error[map.a]: first\n    abcdefgh\n        ^" in text
    assert "error[map.b]: second" in text


def test_a_bug_is_one_line_and_a_traceback_only_with_v(start: list[str]):
    result = run(start, "probe", "bug")
    assert result.returncode == 1
    assert "error[internal]: KeyError: 'missing'" in result.stderr
    assert "this is a bug" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in run(start, "probe", "bug", "-v").stderr
    assert "Traceback" in run(start, "-v", "probe", "bug").stderr


def test_missing_extra_and_os_errors_are_no_bugs(start: list[str]):
    result = run(start, "probe", "numba")
    assert result.returncode == 1
    assert result.stderr == (
        "error[extra.missing]: the fast CPU backend needs the Python package 'numba', which is not installed\n"
        "  help: pip install 'labinfer[cpu]'\n"
    )
    assert run(start, "probe", "open").stderr == "error[host.io]: No such file or directory: /nowhere/at/all\n"


def test_data_on_stdout_notes_on_stderr(start: list[str]):
    plain = run(start, "probe", "output")
    assert (plain.stdout, plain.stderr) == ("data\n", "a note\n")
    assert run(start, "probe", "-q", "output").stderr == ""
    assert run(start, "-q", "probe", "output").stderr == ""
    assert run(start, "probe", "output", "-v").stderr == "a note\na detail\n"


@pytest.mark.parametrize(("arguments", "environment", "colored"), [
    ([], {}, True), (["--no-color"], {}, False), ([], {"NO_COLOR": "1"}, False), ([], {"NO_COLOR": ""}, True),
])  # fmt: skip
def test_color_on_a_terminal_only_when_wanted(
    start: list[str], arguments: list[str], environment: dict[str, str], colored: bool
):
    variables = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    ours, theirs = os.openpty()
    result = subprocess.run(
        [*start, "probe", "output", *arguments], stdout=theirs, stderr=subprocess.PIPE, env=variables | environment
    )
    os.close(theirs)
    assert result.returncode == 0
    assert (b"\x1b[31m" in os.read(ours, 1000)) == colored
    os.close(ours)


def test_tables_in_a_pipe_are_whole_and_take_no_markup(start: list[str]):
    lines = run(start, "probe", "table").stdout.splitlines()
    assert lines == ["NAME".ljust(200) + "  SIZE", "x" * 200 + "     1", "[red]y".ljust(200) + "    22"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(start: list[str], number: signal.Signals, code: int):
    with subprocess.Popen([*start, "probe", "sleep"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in stderr


def test_closed_pipe_is_quiet(start: list[str]):
    with subprocess.Popen([*start, "probe", "flood"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        stderr = process.stderr.read() if process.stderr else b""
    assert process.returncode == 141
    assert stderr == b""


def test_shell_completion():
    words = {"_LABINFER_COMPLETE": "bash_complete", "COMP_WORDS": "labinfer pu", "COMP_CWORD": "1"}
    assert labinfer(**words).stdout.split() == ["plain,pull"]
    assert "complete" in labinfer(_LABINFER_COMPLETE="zsh_source").stdout


def test_doctor_and_env(home: Path):
    result = labinfer("doctor", "--json")
    assert result.returncode == 0
    findings = {finding["check"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert findings["python"]["status"] == "ok"
    assert findings["default model"] == {
        "check": "default model",
        "status": "warning",
        "detail": "smollm2-135m is not pulled yet",
        "fix": "labinfer pull smollm2-135m",
    }
    (home / "catalogue.yaml").write_text("version: 2\nmodels: {}\n")
    broken = labinfer("doctor")
    assert broken.returncode == 1
    assert "FAIL  default model" in broken.stdout

    report = labinfer("env", HF_TOKEN="tell-nobody", HF_ENDPOINT="http://me:tell-nobody@host/x")
    assert report.returncode == 0
    assert "tell-nobody" not in report.stdout
    assert "http://(redacted)@host/x" in report.stdout
    assert json.loads(labinfer("env", "--json").stdout)["labinfer"]["version"] == __version__


def test_doctor_fails_when_the_cache_cannot_be_written(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = labinfer("doctor", LABINFER_HOME=str(blocked))
    assert result.returncode == 1
    assert "LABINFER_HOME" in result.stdout


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (99_950, "100 kB"), (999_499, "999 kB"),
     (999_500, "1.0 MB"), (98_362_432, "98.4 MB"), (2_470_000_000, "2.5 GB"), (811_000_000_000_000, "811 TB")],
)  # fmt: skip
def test_human_bytes(count: int, text: str):
    assert human_bytes(count) == text


def test_lazy_group_lists_in_the_order_of_the_help():
    assert isinstance(cli, LazyGroup)
    assert cli.list_commands(click.Context(cli)) == list(COMMANDS)
    assert Errors([UsageError("a", "b")]).exit_code == 2
