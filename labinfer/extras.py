"""Optional dependencies: which extra of ``pip install labinfer`` brings a module, and the sentence that says so."""

from __future__ import annotations

from labinfer.errors import LabinferError

EXTRAS = {
    "numba": ("cpu", "the fast CPU backend"),
    "cupy": ("cuda12", "the CUDA backend"),
    "uvicorn": ("serve", "the HTTP service"),
    "starlette": ("serve", "the HTTP service"),
    "httptools": ("serve", "the HTTP service"),
    "orjson": ("serve", "the HTTP service"),
    "prometheus_client": ("serve", "the HTTP service"),
    "huggingface_hub": ("hub", "downloading from Hugging Face"),
    "llguidance": ("structured", "structured output"),
    "opentelemetry": ("otel", "sending traces"),
    "ray": ("cluster", "running on a cluster"),
}
"""Importable module -> (extra, what it is for)."""


def pip_command(module: str) -> str:
    """The command that installs ``module``, for example ``pip install 'labinfer[cpu]'``."""
    extra = EXTRAS[module][0]
    other = "  (CUDA 13: labinfer[cuda13])" if extra == "cuda12" else ""
    return f"pip install 'labinfer[{extra}]'{other}"


def missing(module: str) -> LabinferError:
    """The error to raise when the optional ``module`` (a key of ``EXTRAS``) cannot be imported."""
    purpose = EXTRAS[module][1]
    return LabinferError(
        "extra.missing",
        f"{purpose} needs the Python package '{module}', which is not installed",
        remedy=pip_command(module),
    )
