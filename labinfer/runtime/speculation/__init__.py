"""Speculation: tokens are guessed cheaply, and one step of the model checks several of them.

- ``config``: what may be asked for, under vLLM's names.
- ``prompt_lookup``, ``draft_model``: where guesses come from; both are a ``Proposer``.
- ``speculation``: adds guesses to a step and keeps those that the model would have made itself.
- ``payoff``: whether that is quicker than without.
"""

from labinfer.runtime.speculation.config import SpeculativeConfig
from labinfer.runtime.speculation.draft_model import DraftModel
from labinfer.runtime.speculation.prompt_lookup import PromptLookup
from labinfer.runtime.speculation.speculation import Proposer, Speculation, SpeculationCounters, speculation_of

__all__ = [
    "DraftModel",
    "PromptLookup",
    "Proposer",
    "Speculation",
    "SpeculationCounters",
    "SpeculativeConfig",
    "speculation_of",
]
