"""A program, not a module: llama.cpp serving requests with parallel sequences, run by a Python with llama-cpp-python.

It reads JSON: ``model`` (path), ``threads``, ``slots`` (sequences at once), ``requests`` (prompt token ids,
tokens to make). Prints seconds and steps. Continuous batching as llama-server does it: a free slot takes the next
request, and each step has a token of every running sequence and, up to ``n_batch`` tokens, pieces of the prompts.
"""

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

BATCH = 512
"""llama-server's default for a step's tokens is 2,048, computed 512 at a time; this lets decoding go on in between."""


class Slot:
    """A sequence of the context, and the request it computes."""

    def __init__(self, number: int) -> None:
        self.number, self.prompt, self.done, self.left, self.token = number, np.zeros(0, np.int32), 0, 0, 0

    def take(self, prompt: list[int], tokens: int) -> None:
        """Begin a request."""
        self.prompt, self.done, self.left = np.array(prompt, np.int32), 0, tokens


class Server:
    """A context with ``slots`` sequences of up to ``length`` tokens."""

    def __init__(self, model: Any, threads: int, slots: int, length: int) -> None:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = slots * length
        options.n_batch = options.n_ubatch = BATCH
        options.n_seq_max = slots
        options.kv_unified = False  # attention looks at a sequence's own keys only
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, options)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.tokens, self.positions, self.counts = (
            np.ctypeslib.as_array(field, (BATCH,)) for field in (self.batch.token, self.batch.pos, self.batch.n_seq_id)
        )
        self.wanted = np.ctypeslib.as_array(ctypes.cast(self.batch.logits, ctypes.POINTER(ctypes.c_int8)), (BATCH,))
        self.counts[:] = 1
        self.vocab_size = llama_cpp.llama_n_vocab(llama_cpp.llama_model_get_vocab(model))
        self.slots = [Slot(number) for number in range(slots)]

    def add(self, count: int, slot: Slot, tokens: Any, start: int) -> int:
        """Put ``tokens`` of a slot behind ``count`` others; how many there are then."""
        stop = count + len(tokens)
        self.tokens[count:stop] = tokens
        self.positions[count:stop] = np.arange(start, start + len(tokens))
        self.wanted[count:stop] = 0
        for i in range(count, stop):
            self.batch.seq_id[i][0] = slot.number
        return stop

    def step(self) -> None:
        """One llama_decode."""
        count, asked = 0, []
        for slot in self.slots:
            if slot.left and slot.done >= len(slot.prompt):
                count = self.add(count, slot, [slot.token], slot.done)
                asked.append(slot)
                self.wanted[count - 1] = 1
                slot.done += 1
        for slot in self.slots:
            if slot.left and slot.done < len(slot.prompt) and count < BATCH:
                piece = slot.prompt[slot.done : slot.done + BATCH - count]
                count = self.add(count, slot, piece, slot.done)
                slot.done += len(piece)
                if slot.done == len(slot.prompt):
                    asked.append(slot)
                    self.wanted[count - 1] = 1
        self.batch.n_tokens = count
        if llama_cpp.llama_decode(self.context, self.batch) != 0:
            raise RuntimeError("llama_decode failed")
        if asked:
            logits = ctypes.cast(llama_cpp.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
            best = np.ctypeslib.as_array(logits, (len(asked), self.vocab_size)).argmax(1)
            for slot, token in zip(asked, best.tolist(), strict=True):
                slot.token, slot.left = token, slot.left - 1

    def run(self, requests: list[tuple[list[int], int]]) -> tuple[float, int]:
        """Seconds and steps for all of them."""
        waiting, steps = list(reversed(requests)), 0
        start = time.perf_counter()
        while waiting or any(slot.left for slot in self.slots):
            for slot in self.slots:
                if not slot.left and waiting:
                    llama_cpp.llama_memory_seq_rm(self.memory, slot.number, -1, -1)
                    slot.take(*waiting.pop())
            self.step()
            steps += 1
        return time.perf_counter() - start, steps


def main() -> None:
    """Run all requests once, after a warm-up with a few."""
    task = json.load(sys.stdin)
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(task["model"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {task['model']}")
    requests = task["requests"]
    length = max(len(prompt) + tokens for prompt, tokens in requests)
    server = Server(model, task["threads"], task["slots"], -(-length // 256) * 256)
    server.run([(prompt, 4) for prompt, _ in requests[: task["slots"]]])
    seconds, steps = server.run(requests)
    print(json.dumps({"seconds": seconds, "steps": steps}))


main()
