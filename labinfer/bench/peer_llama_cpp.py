"""A program, not a module: measures llama.cpp on a GGUF file, run by a Python that has llama-cpp-python.

Its one argument is JSON: ``model`` (path), ``threads``, ``tests`` (kind, tokens, batch). Prints tokens/s by test.
"""

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np


class Run:
    """A context for ``batch`` sequences of up to ``length`` tokens."""

    def __init__(self, model: Any, threads: int, batch: int, length: int) -> None:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = batch * (length + 256)
        options.n_batch = options.n_ubatch = 512
        options.n_seq_max = batch
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, options)
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.vocab_size = llama_cpp.llama_n_vocab(llama_cpp.llama_model_get_vocab(model))
        self.random = np.random.default_rng(0)

    def step(self, tokens: list[int], positions: list[int], sequences: list[int], wanted: list[bool]) -> None:
        """One llama_decode of the tokens."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, want) in enumerate(zip(tokens, positions, sequences, wanted, strict=True)):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, want
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def best(self, row: int) -> int:
        """The likeliest token of a row of logits."""
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(pointer, (self.vocab_size,)).argmax())

    def prefill(self, length: int) -> float:
        """Seconds until the first token of a prompt."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        prompt = self.random.integers(self.vocab_size, size=length).tolist()
        start = time.perf_counter()
        for first in range(0, length, 512):
            part = prompt[first : first + 512]
            wanted = [first + i == length - 1 for i in range(len(part))]
            self.step(part, list(range(first, first + len(part))), [0] * len(part), wanted)
        self.best(-1)
        return time.perf_counter() - start

    def decode(self, batch: int, length: int) -> float:
        """Seconds for ``length`` tokens of each of ``batch`` sequences, from an empty cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        tokens = self.random.integers(self.vocab_size, size=batch).tolist()
        start = time.perf_counter()
        for position in range(length):
            self.step(tokens, [position] * batch, list(range(batch)), [True] * batch)
            tokens = [self.best(row) for row in range(batch)]
        return time.perf_counter() - start


def main() -> None:
    """Measure each test once, after a warm-up of the same kind."""
    task = json.loads(sys.argv[1])
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(task["model"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {task['model']}")
    found = {}
    for kind, tokens, batch in task["tests"]:
        run = Run(model, task["threads"], batch, tokens)
        if kind == "prefill":
            run.prefill(tokens)
            seconds = run.prefill(tokens)
        else:
            run.decode(batch, 2)
            seconds = run.decode(batch, tokens)
        found[f"{kind} {tokens} x {batch}"] = tokens * batch / seconds
        llama_cpp.llama_free(run.context)
    print(json.dumps(found))


main()
