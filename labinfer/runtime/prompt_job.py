"""A prompt that one engine computes for another: its cache blocks are moved, and nothing else.

What the other engine does not get, for whatever reason, it computes itself. After Zhong et al. 2024, "DistServe:
Disaggregating Prefill and Decoding for Goodput-optimized Large Language Model Serving" (arXiv:2401.09670).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count

import numpy as np

from labinfer.errors import LabinferError
from labinfer.runtime.engine import Engine
from labinfer.runtime.moved_blocks import Key, MovedBlocks, kind_of
from labinfer.runtime.request import Request
from labinfer.runtime.request import Sequence as Answer
from labinfer.runtime.sampling import SamplingParams
from labinfer.runtime.streaming import mailbox

FIRST_TOKEN = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
"""What is asked of the engine that computes a prompt; nobody looks at the token."""


def prompt_job(request: Request) -> Request:
    """A request for the prompt of ``request`` alone."""
    return Request(request.prompt, FIRST_TOKEN, request.priority, request.cache_salt, lora=request.lora)


async def run_job(job: Request, source: Engine, moved: MovedBlocks, keys: Sequence[Key]) -> None:
    """Have ``source`` compute the prompt of ``job``, and bring the blocks ``keys`` to ``moved``.

    Returns when that is done, or cannot be done. A job that is cancelled is aborted.
    """
    box, event = mailbox(), asyncio.Event()
    ended = partial(box.post, event)

    def listener(answer: Answer) -> None:
        runs = job.moved_to or source
        if answer.done and runs.closed:
            ended()
        elif answer.done:
            runs.submit(partial(send_blocks, runs, moved, keys, ended))  # once its row is given back
            runs.start()

    def begin() -> None:
        try:
            source.queue(job)
        except LabinferError:
            ended()

    with suppress(LabinferError):
        source.check(job)
        job.listener = listener
        source.submit(begin)
        source.start()
        source.check_open()  # else nobody may ever begin
        try:
            await event.wait()
        finally:
            if not job.finished:
                runs = job.moved_to or source
                runs.submit(partial(runs.abort, job))
                runs.start()


def send_blocks(source: Engine, moved: MovedBlocks, keys: Sequence[Key], ended: Callable[[], None]) -> None:
    """Bring those of the blocks ``keys`` that ``source`` has to ``moved``, and call ``ended``."""
    groups, kind = source.model.blocks.groups, kind_of(source.model.plan)
    known = source.model is not moved.model and kind == kind_of(moved.model.plan)
    found = [(key, block) for key in keys if known and (block := groups[key[0]].cached.get(key[1])) is not None]
    told, started = count(1), time.perf_counter()

    def tell(place: int, content: np.ndarray | None) -> None:
        if content is not None:
            moved.put(found[place][0], content, kind)
        if next(told) == len(found):
            moved.seconds += time.perf_counter() - started
            ended()

    if found:
        source.model.block_memory.fetch([(group, block) for (group, _), block in found], tell)
    else:
        ended()
