"""LABInfer: a model drawn as a map, compiled to a plan, run on the devices you have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "BeamSearchParams": "labinfer.runtime.beam_search",
    "LLM": "labinfer.llm",
    "compile": "labinfer.api",
    "validate": "labinfer.api",
    "load": "labinfer.llm",
    "LoRARequest": "labinfer.runtime.lora",
    "Plan": "labinfer.compiler.plan",
    "SamplingParams": "labinfer.runtime.sampling",
}

__all__ = [
    "LLM",
    "BeamSearchParams",
    "LoRARequest",
    "Plan",
    "SamplingParams",
    "__version__",
    "compile",
    "load",
    "validate",
]

if TYPE_CHECKING:
    from labinfer.api import compile, validate
    from labinfer.compiler.plan import Plan
    from labinfer.llm import LLM, load
    from labinfer.runtime.beam_search import BeamSearchParams
    from labinfer.runtime.lora import LoRARequest
    from labinfer.runtime.sampling import SamplingParams


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that ``import labinfer`` costs nothing."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'labinfer' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
