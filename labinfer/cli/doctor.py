"""``labinfer doctor`` and ``labinfer env``: is this installation well, and what is it made of."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import click

from labinfer import __version__
from labinfer.cli.output import Output, current
from labinfer.errors import LabinferError
from labinfer.extras import EXTRAS, missing, pip_command
from labinfer.home import cache_dir, graphs_dir, models_dir, user_catalogue
from labinfer.units import human_bytes

_FREE_SPACE = 2_000_000_000
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
_TOLD = re.compile(r"(LABINFER|HF|XDG|CUDA|NVIDIA|NUMBA|OMP|MKL|OPENBLAS|RAY)_.*|(NO_COLOR|CI|TERM|LANG)")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: ``status`` is ok, warning or failed; ``fix`` is what to do about it."""

    check: str
    status: str
    detail: str
    fix: str | None = None


def _python() -> list[Finding]:
    detail = f"{platform.python_version()} at {sys.executable}"
    good = sys.version_info >= (3, 11)
    return [Finding("python", "ok" if good else "failed", detail, None if good else "use Python 3.11 or newer")]


def _packages() -> list[Finding]:
    """Every package that labinfer itself needs."""
    try:
        required = metadata.requires("labinfer") or []
    except metadata.PackageNotFoundError:
        return [Finding("packages", "warning", "labinfer runs from a folder, not installed by pip", "pip install -e .")]
    findings = []
    for name in [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required if "extra ==" not in line]:
        version = _version(name)
        good = version is not None
        findings.append(
            Finding(
                name, "ok" if good else "failed", version or "not installed", None if good else f"pip install {name}"
            )
        )
    return findings


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _extras() -> list[Finding]:
    return [
        Finding(module, "ok", f"installed, for {EXTRAS[module][1]}")
        if find_spec(module)
        else Finding(module, "warning", missing(module).message, pip_command(module))
        for module in EXTRAS
    ]


def _graphs() -> list[Finding]:
    maps = sorted(path.stem for path in graphs_dir().glob("*.yaml"))
    return [Finding("model maps", "ok", f"{len(maps)} in {graphs_dir()}")]


def _cache() -> list[Finding]:
    """The cache can be written and has room."""
    folder = cache_dir()
    fix = "set LABINFER_HOME to a folder you can write to"
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [Finding("cache", "failed", f"{folder} cannot be written", fix)]
    free = shutil.disk_usage(existing).free
    room = Finding("disk", "ok", f"{human_bytes(free)} free")
    if free < _FREE_SPACE:
        room = Finding("disk", "warning", room.detail, f"free some space: labinfer rm NAME, or {fix}")
    return [Finding("cache", "ok", str(folder)), room]


def _default_model() -> list[Finding]:
    """The catalogue reads well and the default model is at hand."""
    from labinfer.catalogue import DEFAULT_MODEL, find

    path = find(DEFAULT_MODEL).pulled()
    if path:
        return [Finding("default model", "ok", str(path))]
    return [Finding("default model", "warning", f"{DEFAULT_MODEL} is not pulled yet", f"labinfer pull {DEFAULT_MODEL}")]


CHECKS: list[Callable[[], list[Finding]]] = [_python, _packages, _extras, _graphs, _cache, _default_model]
"""What ``labinfer doctor`` runs, in this order; a check that raises ``LabinferError`` has failed."""


def _examine(check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except LabinferError as error:
        name = check.__name__.strip("_").replace("_", " ")
        return [Finding(name, "failed", error.message, error.remedy)]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--warm", metavar="MODEL", help="First compile the kernels that MODEL needs, and measure which are fast.")
@click.pass_context
def doctor(context: click.Context, as_json: bool, warm: str | None) -> None:
    """Check this installation and say how to fix it.

    Exit code 1 when a check failed; a missing optional part is only a warning.
    """
    out = current()
    if warm:
        from labinfer.llm import LLM

        with out.progress() as progress, LLM(warm, progress=progress) as model:
            model.logits([0])
            for device in model.manager.devices.values():
                device.tune(sorted({weight.format for weight in model.plan.weights if len(weight.shape) > 1}))
        out.note(f"the kernels for {warm} are ready")
    findings = [finding for check in CHECKS for finding in _examine(check)]
    failed = any(finding.status == "failed" for finding in findings)
    if as_json:
        out.json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    else:
        _show(out, findings)
    context.exit(1 if failed else 0)


def _show(out: Output, findings: list[Finding]) -> None:
    marks = {"ok": ("ok  ", "green"), "warning": ("note", "yellow"), "failed": ("FAIL", "red")}
    for finding in findings:
        text, color = marks[finding.status]
        out.data(f"{click.style(text, fg=color)}  {finding.check}: {finding.detail}")
        if finding.fix:
            out.data(f"      fix: {finding.fix}")
    failed = sum(finding.status == "failed" for finding in findings)
    out.data("\nall is well" if not failed else f"\n{failed} of {len(findings)} checks failed")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def env(as_json: bool) -> None:
    """Print a report to paste into an issue.

    Values of environment variables that look like secrets are left out, and your home folder is written as ~.
    """
    out = current()
    report = _report()
    if as_json:
        out.json(report)
        return
    for title, values in report.items():
        out.data(f"{title}:")
        for name, value in values.items():
            out.data(f"  {name}: {value}")


def _report() -> dict[str, dict[str, str]]:
    optional = {
        dist: _version(dist) or "not installed"
        for dist in ("numba", "cupy-cuda12x", "cupy-cuda13x", "huggingface_hub", "llguidance", "ray")
    }
    return {
        "labinfer": {"version": __version__, "installed at": _tilde(str(graphs_dir().parent))},
        "python": {"version": platform.python_version(), "executable": _tilde(sys.executable)},
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cpus": str(os.cpu_count()),
            "memory": human_bytes(_memory()) if _memory() else "unknown",
        },
        "packages": {finding.check: finding.detail for finding in _packages()} | optional,
        "folders": {
            "models": _tilde(str(models_dir())),
            "user catalogue": _tilde(str(user_catalogue())) + ("" if user_catalogue().exists() else " (none)"),
        },
        "environment": {
            name: "(redacted)" if _SECRET.search(name) else _redact(value)
            for name, value in sorted(os.environ.items())
            if _TOLD.fullmatch(name)
        },
    }


def _redact(value: str) -> str:
    """A value without the home folder, and without a user and password in a URL."""
    return _tilde(re.sub(r"(://)[^/@\s]*@", r"\1(redacted)@", value))


def _tilde(path: str) -> str:
    home = os.path.expanduser("~")
    return path.replace(home, "~") if len(home) > 1 else path


def _processor() -> str:
    """The model name of the CPU; Python knows it on some systems only, Linux tells it in /proc."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int:
    """Physical memory in bytes, 0 when the system does not say."""
    values: dict[str, Any] = os.sysconf_names
    if "SC_PHYS_PAGES" not in values:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
