"""Sampling: what a request may ask of its answer (``params``), and how each token of it is chosen.

- ``params``: ``SamplingParams``, every knob, checked.
- ``rules``: the params of a request for a vocabulary; ``state``: one of its sequences; both end an answer by a token.
- ``sampler``: a token for each row of logits. Rows of plain greedy requests need no state and are one call together.
- ``adjust``, ``token_counts``, ``draw``, ``random_numbers``: the parts of that.
- ``logprobs``: what the model thought of the tokens.
- ``stop_strings``, ``answer_text``: an answer's text, and the texts that end it.
- ``grammar``: structured output.
"""

from labinfer.runtime.sampling.answer_text import AnswerText
from labinfer.runtime.sampling.logprobs import Logprob, prompt_logprobs, token_logprobs
from labinfer.runtime.sampling.params import SamplingParams, StructuredOutputs
from labinfer.runtime.sampling.rules import SamplingRules, Stop
from labinfer.runtime.sampling.sampler import Sampled, sample
from labinfer.runtime.sampling.state import SamplingState

__all__ = [
    "AnswerText",
    "Logprob",
    "Sampled",
    "SamplingParams",
    "SamplingRules",
    "SamplingState",
    "Stop",
    "StructuredOutputs",
    "prompt_logprobs",
    "sample",
    "token_logprobs",
]
