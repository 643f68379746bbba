"""A program, not a module: LABInfer serving requests, for ``engine.py``.

It reads JSON: ``model`` (path), ``threads``, ``slots`` (sequences at once), ``requests`` (prompt token ids,
tokens to make), ``temperature``, ``watched`` where somebody waits for each token, ``late``, a prompt that arrives when
all requests have made ``after`` tokens (they run without it first, as ``alone``), ``speculates`` where tokens are
guessed, and ``in_turn`` where each request arrives when the one before is done. Prints seconds, steps, and what became
of the requests.
"""

import json
import sys
import time
from statistics import fmean
from typing import Any

from labinfer import SamplingParams
from labinfer.llm import LLM
from labinfer.runtime.request import Request


class Timed:
    """A request that notes when each of its tokens was made."""

    def __init__(self, prompt: list[int], tokens: int, temperature: float, watched: bool) -> None:
        params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, seed=tokens)
        self.times: list[float] = []
        self.request = Request(prompt, params, interactive=watched, listener=self.note)

    def note(self, _: Any) -> None:
        """A token was made."""
        self.times.append(time.perf_counter())


def run(model: LLM, task: dict[str, Any]) -> dict[str, Any]:
    """Serve all requests of ``task`` as fast as possible."""
    engine, late = model.engine, task.get("late")
    timed = list[Timed]()
    guest = Timed(late, 1, 0.0, True) if late else None
    start = time.perf_counter()
    for prompt, tokens in task["requests"]:
        timed.append(Timed(prompt, tokens, task["temperature"], task.get("watched", False)))
        engine.add(timed[-1].request)
        if task.get("in_turn"):
            engine.finish([timed[-1].request])
    arrived, steps = 0.0, 0
    while engine.busy:
        engine.step()
        steps += 1
        if guest and not arrived and min(len(each.times) for each in timed) >= task["after"]:
            arrived = time.perf_counter()
            engine.add(guest.request)
    seconds = time.perf_counter() - start
    metrics = [each.request.metrics for each in timed]
    return {
        "seconds": seconds,
        "steps": steps,
        "tokens": sum(len(each.request.prompt) + len(each.request.generated) for each in timed),
        "first_token_seconds": fmean(each.first_token_seconds or 0.0 for each in metrics),
        "computed": sum(len(each.request.prompt) for each in timed) - sum(each.num_cached_tokens for each in metrics),
        "times": [each.times for each in timed],
        "arrived": arrived,
        "served": guest.times[0] if guest else 0.0,
    }


def main() -> None:
    """Serve the requests once, after a warm-up with a few."""
    task = json.load(sys.stdin)
    requests, late = task["requests"], task.get("late") or []
    longest = max(len(late) + 1, *(len(prompt) + tokens for prompt, tokens in requests))
    limits = {"max_num_seqs": task["slots"], "max_logits_rows": task["slots"], "max_model_len": longest}
    room = {"kv_dtype": "f16", "max_num_batched_tokens": 512, "threads": task["threads"], **limits}
    guesses = {"method": "ngram"} if task.get("speculates") else None
    with LLM(task["model"], devices="cpu", speculative_config=guesses, **room) as model:
        few = [[[token + 1 for token in prompt], 4] for prompt, _ in requests[: task["slots"]]]  # shares no beginning
        run(model, {"requests": few, "temperature": task["temperature"]})
        alone = run(model, task | {"late": None})["times"] if late else []
        print(json.dumps(run(model, task) | {"alone": alone}))


main()
