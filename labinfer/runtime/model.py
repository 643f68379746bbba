"""A model: a plan, the weights it names, and the devices it runs on, ready to compute steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Listing
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from operator import index
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from labinfer.compiler.fold import unfold_ops, unfold_states, unfold_weights
from labinfer.compiler.graph import Op, Weight
from labinfer.compiler.plan import Plan, Stage
from labinfer.errors import LabinferError, UsageError, did_you_mean
from labinfer.runtime.cache import Cache, CacheOptions
from labinfer.runtime.interpreter import Interpreter, check_kernels
from labinfer.runtime.kv_cache import KVCache
from labinfer.runtime.lora import Adapters, LoRARequest
from labinfer.runtime.manager import Manager
from labinfer.runtime.parameters import Parameters, Progress
from labinfer.runtime.sequence import Scheduled, Sequence, build_step
from labinfer.runtime.step_memory import StepBatch
from labinfer.runtime.variables import Tensor, Variable
from labinfer.runtime.weights import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from labinfer.backends.base import Device
    from labinfer.runtime.generate import Completion
    from labinfer.runtime.sampling_params import SamplingParams
    from labinfer.runtime.tokenizer import Tokenizer

_numbers = count()


class Model:
    """Runs a plan. Use it as a context manager, or ``close`` it: weights, cache and arenas are given back at once."""

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer | None = None,
        manager: Manager | None = None,
        progress: Progress = lambda nbytes: None,
        compiling: Callable[[int, int], None] = lambda done, total: None,
        cache: CacheOptions | None = None,
    ) -> None:
        self.plan, self.tokenizer, self.manager = plan, tokenizer, manager or Manager()
        self.owns_manager = manager is None
        self.owner = f"{plan.source.name} #{next(_numbers)}"
        self.interpreters: list[Interpreter] = []
        self.memory: list[KVCache | Parameters | Cache] = []
        self.adapters = Adapters(0, ())
        weights, states = unfold_weights(plan), unfold_states(plan)
        try:
            for stage in plan.stages:
                device = self.manager.device(stage.device, plan.devices[stage.device].threads)
                check_kernels(stage, device)
                self.manager.grant(self.owner, stage.device, stage.bytes.total)
                ops = [part for op, _ in unfold_ops(stage) for part in op.primitives()]
                weighed = self.allocate_weights(stage, ops, weights, device)
                arrays = KVCache(device, states, dict.fromkeys(op.state for op in ops if op.state), plan.limits)
                self.memory.append(arrays)
                self.interpreters.append(Interpreter(stage, device, plan.limits, weighed, arrays))
            self.cache = Cache(
                plan, [each for each in self.memory if isinstance(each, KVCache)], cache or CacheOptions()
            )
            self.memory.append(self.cache)
            self.blocks = self.cache.blocks
            self.load(checkpoint, progress, compiling)
        except BaseException:
            self.close()
            raise
        self.adapters = Adapters(plan.limits.max_loras, self.parameters)

    @property
    def parameters(self) -> list[Parameters]:
        """The weights, and the pools of adapters, of each stage."""
        return [memory for memory in self.memory if isinstance(memory, Parameters)]

    def allocate_weights(
        self, stage: Stage, ops: list[Op], weights: Mapping[str, Weight], device: Device
    ) -> dict[str, Any]:
        """Memory for what the ops of ``stage`` multiply with: its weights, and the pools of adapters if it has any."""
        used = [weights[name] for name in dict.fromkeys(name for op in ops for name in op.weights.values())]
        pools = [weight for weight in used if weight.adapter]
        own = [weight for weight in used if not weight.adapter]
        made = [Parameters("weights", own, stage.bytes.weights, device)]
        self.memory += made
        if pools or stage.bytes.adapters:
            made.append(Parameters("adapters", pools, stage.bytes.adapters, device))
            self.memory.append(made[-1])
        return {name: array for each in made for name, array in each.arrays().items()}

    def load(self, checkpoint: Checkpoint, progress: Progress, compiling: Callable[[int, int], None]) -> None:
        """Read the weights, and meanwhile bind a first tape, which may have to compile kernels."""
        weights = self.parameters
        for each in weights:  # binding looks at values of vectors (rope's factors), but only at places of matrices
            each.load(checkpoint, progress, vectors=True)
        with ThreadPoolExecutor(1) as background:
            loading = [background.submit(each.load, checkpoint, progress, vectors=False) for each in weights]
            for interpreter in self.interpreters:
                interpreter.warm(compiling)
            for each_loading in loading:
                each_loading.result()

    @property
    def max_len(self) -> int:
        """The longest sequence the plan and its cache hold."""
        return self.plan.limits.max_sequence_len

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return self.plan.vocab_size

    def run(self, batch: StepBatch) -> np.ndarray:
        """One step through all stages: float32 logits [rows, vocab_size]."""
        if not self.interpreters:
            raise UsageError("run.closed", "the model is closed")
        values: dict[str, Any] = {}
        for interpreter in self.interpreters:
            received = {name: values[name] for name in interpreter.stage.inputs}
            made = interpreter.run(batch, received)
            values.update({name: interpreter.device.move_out(array) for name, array in made.items()})
        logits: np.ndarray = values[self.plan.stages[-1].outputs[-1]]
        return logits

    def session(self, lora_request: LoRARequest | None = None) -> Session:
        """A fresh sequence that keeps its cache: ``session.append(token_ids)`` gives their logits."""
        return Session(self, lora_request)

    def logits(self, token_ids: Iterable[int], lora_request: LoRARequest | None = None) -> np.ndarray:
        """Logits of every position of one sequence: float32 [len(token_ids), vocab_size]."""
        with self.session(lora_request) as session:
            return session.append(token_ids)

    def generate(
        self,
        prompts: str | Listing[str] | Listing[int] | Listing[Listing[int]],
        params: SamplingParams | None = None,
        on_token: Callable[[int, str], None] | None = None,
        lora_request: LoRARequest | Listing[LoRARequest | None] | None = None,
    ) -> list[Completion]:
        """Answers to one or several prompts (texts, or lists of token ids), in order; see ``generate.generate``."""
        from labinfer.runtime.generate import generate

        return generate(self, prompts, params, on_token, lora_request)

    def check_tokens(self, token_ids: Iterable[int]) -> list[int]:
        """``token_ids`` as a list of ints, all of them in the vocabulary."""
        try:
            tokens = [index(token) for token in token_ids]
        except TypeError as error:
            raise UsageError("run.token-id", f"token ids must be a list of whole numbers: {error}") from None
        wrong = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            message = f"token id {wrong} is outside the vocabulary of {self.vocab_size}"
            raise UsageError("run.token-id", message)
        return tokens

    def compute(self, parts: Listing[Scheduled]) -> np.ndarray:
        """Run a step of ``parts`` and count it as computed; the caller has seen that the cache has room for it."""
        rows = np.array([part.sequence.row for part in parts])
        lengths = np.array([part.sequence.num_computed + part.num_tokens for part in parts], np.int32)
        if self.blocks.grow(rows, lengths) is not None:
            raise LabinferError("run.cache-full", "the cache has too few blocks left for a step")
        logits = self.run(build_step(parts, self.blocks))
        for part in parts:
            part.sequence.num_computed += part.num_tokens
        self.blocks.commit(rows, lengths, {part.sequence.row: part.sequence.token_ids for part in parts})
        return logits

    def must_recompute(self, sequence: Sequence, before: int) -> bool:
        """Whether growing from ``before`` tokens passed the length beyond which cached keys no longer hold."""
        limit = self.plan.recompute_after
        return limit is not None and before <= limit < len(sequence.token_ids)

    @contextmanager
    def listen(self, value: str, callback: Callable[[np.ndarray], np.ndarray | None]) -> Iterator[None]:
        """Within the context, ``callback(array)`` sees ``value`` in every step; what it returns, unless None, replaces
        it.

        ``value`` is a name of the plan, ``layers.3.attn.out``; ``array`` is a copy, float32 [T, features].
        """
        for interpreter in self.interpreters:
            here = value in interpreter.slots or value in interpreter.inner
            if here and value not in interpreter.stage.inputs:
                listener = interpreter.listen(value, callback)
                break
        else:
            known = [name for each in self.interpreters for name in each.slots]
            remedy = did_you_mean(value, known) or "`labinfer explain PLAN --values` lists them"
            raise UsageError("run.unknown-value", f"the plan has no value '{value}'", remedy=remedy)
        try:
            yield
        finally:
            interpreter.unlisten(listener)

    def variable(self, name: str) -> Variable:
        """The weight or activation called ``name``: a ``Parameter`` with its array, or a ``Tensor`` with its slot."""
        for memory in self.parameters:
            if name in memory.by_name:
                return memory.by_name[name]
        for interpreter in self.interpreters:
            if name in interpreter.slots:
                return Tensor(name, interpreter.device.name, interpreter.slots[name])
        known = [known for memory in self.parameters for known in memory.by_name]
        known += [value for interpreter in self.interpreters for value in interpreter.slots]
        message = f"there is no weight and no activation '{name}' with a place of its own"
        raise UsageError("run.unknown-variable", message, remedy=did_you_mean(name, known))

    def close(self) -> None:
        """Give back everything that was allocated; the model cannot run any more."""
        for interpreter in self.interpreters:
            interpreter.close()
        self.adapters.close()
        for memory in self.memory:
            memory.close()
        self.interpreters, self.memory = [], []
        self.manager.release(self.owner)
        if self.owns_manager:
            self.manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Session:
    """One sequence that is computed piece by piece; a context manager, since it owns cache blocks."""

    def __init__(self, model: Model, lora_request: LoRARequest | None = None) -> None:
        self.model, self.sequence = model, Sequence([], -1)
        if lora_request:
            model.adapters.check(lora_request)
        if not model.adapters.give(self.sequence, lora_request):
            raise UsageError("lora.no-slot", f"no slot is free for adapter '{lora_request and lora_request.name}'")
        self.sequence.row = model.blocks.open_row()

    def append(self, token_ids: Iterable[int]) -> np.ndarray:
        """Add tokens and compute them in as many steps as it takes: float32 logits [len(token_ids), vocab_size]."""
        model, sequence = self.model, self.sequence
        tokens, before = model.check_tokens(token_ids), len(sequence.token_ids)
        limits = model.plan.limits
        if before + len(tokens) > model.max_len:
            message = f"{before + len(tokens)} tokens are more than the {model.max_len} the plan has room for"
            raise UsageError("run.too-long", message, remedy="compile with a larger --max-model-len")
        if not model.blocks.fits(sequence.row, before + len(tokens)):
            raise UsageError("run.cache-full", f"no cache blocks are left for {before + len(tokens)} tokens")
        sequence.token_ids = sequence.token_ids + tokens
        if model.must_recompute(sequence, before):
            model.blocks.release(sequence.row)
            sequence.num_computed = 0
        result = np.empty((len(tokens), model.vocab_size), np.float32)
        while sequence.num_computed < len(sequence.token_ids):
            start = sequence.num_computed
            wanted = start >= before
            size = min(limits.max_num_batched_tokens, limits.max_logits_rows if wanted else before - start)
            size = min(size, len(sequence.token_ids) - start)
            logits = model.compute([Scheduled(sequence, size, size if wanted else 0)])
            if wanted:
                result[start - before : start - before + size] = logits
        return result

    def close(self) -> None:
        """Give the cache blocks and the adapter back."""
        self.model.adapters.take(self.sequence)
        self.model.blocks.close_row(self.sequence.row)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
