"""A model: a plan, the weights it names, and the devices it runs on, ready to compute steps."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Listing
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from operator import index
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from labinfer.backends.base import Device, backend_class
from labinfer.backends.exchange import RankPeers
from labinfer.compiler.plan import Plan
from labinfer.errors import DoesNotFit, LabinferError, UsageError, did_you_mean
from labinfer.runtime.batch import Batch, Part
from labinfer.runtime.cache import BlockMemory, Cache, CacheOptions
from labinfer.runtime.interpreter import Interpreter
from labinfer.runtime.interrupts import interrupts_held
from labinfer.runtime.lora import Adapters, LoRARequest
from labinfer.runtime.manager import Manager
from labinfer.runtime.parameters import Parameters, Progress
from labinfer.runtime.peers import peers_of, private_peer_memory
from labinfer.runtime.pipeline.message import StepMessage
from labinfer.runtime.pipeline.pipeline import Pipeline
from labinfer.runtime.pipeline.process import StageDied
from labinfer.runtime.pipeline.transport import check_transport
from labinfer.runtime.pipeline.workers import Fleet, ProcessFleet, StageThreads
from labinfer.runtime.ranks import Ranks
from labinfer.runtime.stage import LoadedStage
from labinfer.runtime.step_memory import StepBatch
from labinfer.runtime.variables import Tensor, Variable
from labinfer.runtime.weights import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from labinfer.runtime.beam_search import BeamSearchOutput, BeamSearchParams
    from labinfer.runtime.engine import Engine
    from labinfer.runtime.outputs import RequestOutput
    from labinfer.runtime.sampling import SamplingParams
    from labinfer.runtime.scheduler import Policy
    from labinfer.runtime.session import Session
    from labinfer.runtime.speculation import Proposer
    from labinfer.runtime.tokenizer import Tokenizer

_numbers = count()

Message = Mapping[str, Any]
"""One message of a conversation: ``role``, ``content`` and what else the chat template knows."""


class Model:
    """Runs a plan. Use it as a context manager, or ``close`` it: weights, cache and arenas are given back at once.

    Without a ``transport`` its stages run one after another; with one they are a pipeline, in threads (``local``, and
    where several ranks run a stage on devices that compute in these), processes (``shm``, ``tcp``) or wherever a
    ``Fleet`` runs them.
    """

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer | None = None,
        manager: Manager | None = None,
        progress: Progress = lambda nbytes: None,
        compiling: Callable[[int, int], None] = lambda done, total: None,
        cache: CacheOptions | None = None,
        seed: int | None = None,
        transport: str | Fleet | None = None,
        policy: Policy | None = None,
        processes: Callable[..., Fleet] = ProcessFleet,
    ) -> None:
        self.seed, self.policy = seed, policy
        self.proposer: Proposer | None = None  # for speculation
        self._engine: Engine | None = None
        self.plan, self.tokenizer, self.manager = plan, tokenizer, manager or Manager()
        self.owns_manager = manager is None
        self.owner = f"{plan.source.name} #{next(_numbers)}"
        self.lock = threading.RLock()  # held by whoever runs steps
        self.device_seconds: dict[str, float] = defaultdict(float)  # that steps kept each device busy
        if isinstance(transport, str):
            check_transport(transport)
        if transport is None and plan.ranks > 1 and not all(backend_class(name).overlaps for name in plan.devices):
            transport = "local"
        self.stages: list[LoadedStage] = []  # those of this process
        self.groups: list[Ranks] = []  # the same stages by group
        self.pipeline: Pipeline | None = None
        self.fleet: Fleet | None = None  # what stages run on that are not in this process
        self.closed = False
        self.memory = ExitStack()
        self.adapters = Adapters(0, ())
        try:
            check_devices(plan)
            if transport is None or isinstance(transport, str):
                self.claim(plan, transport)
            if transport in (None, "local"):
                self.load_stages(checkpoint, progress, compiling)
            caches = [stage.cache for stage in self.stages]
            self.cache = Cache(plan, caches, cache or CacheOptions(), swaps=transport is None and plan.ranks == 1)
            self.memory.callback(self.cache.close)
            self.blocks = self.cache.blocks
            if isinstance(transport, str) and transport != "local":
                transport = processes(transport, checkpoint.path, self.manager.cores, progress, compiling)
            if transport is not None:
                self.start_pipeline(transport)
            self.batch = Batch(plan.limits, self.blocks, self.copy_blocks)
        except BaseException:
            self.close()
            raise
        self.adapters = Adapters(plan.limits.max_loras, self.parameters)

    def load_stages(self, checkpoint: Checkpoint, progress: Progress, compiling: Callable[[int, int], None]) -> None:
        """Open the devices, and get all stages ready in this process."""
        plan = self.plan
        for group, stages in enumerate(plan.groups):
            devices = [self.manager.device(stage.device, plan.devices[stage.device].threads) for stage in stages]
            first = len(self.stages)
            for number, (device, peers) in enumerate(zip(devices, self.peers(group, devices), strict=True), first):
                self.stages.append(self.memory.enter_context(closing(LoadedStage(plan, number, device, peers))))
            ranks = Ranks([loaded.interpreter for loaded in self.stages[first:]])
            self.groups.append(self.memory.enter_context(closing(ranks)))
        for loaded in self.stages:
            loaded.load(checkpoint, progress, compiling)

    def peers(self, group: int, devices: Listing[Device]) -> Listing[RankPeers | None]:
        """What each rank of stage ``group``, on ``devices``, sees of the others; None where it is alone."""
        plan = self.plan
        if any(stage.bytes.exchange for stage in plan.groups[group]) and plan.ranks > 1:
            return self.memory.enter_context(closing(devices[0].exchange(devices))).peers
        memory, first = private_peer_memory(plan, group), group * plan.ranks
        return [peers_of(memory, plan, number) for number in range(first, first + plan.ranks)]

    def claim(self, plan: Plan, transport: str | None) -> None:
        """Ask the manager for memory, and for cores where stages run at the same time."""
        if transport is not None:
            self.manager.claim_cores({stage.device: plan.devices[stage.device].threads for stage in plan.stages})
        for stage in plan.stages:
            self.manager.grant(self.owner, stage.device, stage.bytes.total)

    def start_pipeline(self, transport: str | Fleet) -> None:
        """Start threads for the stages, which are loaded, or the processes of a fleet, which load them."""
        if isinstance(transport, str):
            self.pipeline = Pipeline(self.plan, StageThreads(self.plan, self.stages, self.manager.cores))
        else:
            self.fleet = transport
            self.memory.callback(transport.close)
            self.pipeline = Pipeline(self.plan, transport.start(self.plan))
        self.memory.callback(self.close_pipeline)

    def close_pipeline(self) -> None:
        """End the stages that run."""
        assert self.pipeline is not None
        self.pipeline.close()

    def recover(self) -> None:
        """Start the stages of a pipeline anew, on what there is now; sessions compute again what they had computed.

        Raises what keeps them from starting: ``StageDied`` if another try may help.
        """
        assert self.fleet is not None
        assert self.pipeline is not None
        with self.lock:
            self.check_open()
            # So that whoever uses it before there is another one tries this again.
            self.pipeline.fail(StageDied("pipeline.stage-died", "the stages were ended and could not be started anew"))
            self.close_pipeline()
            self.batch.forget()
            self.plan = self.fleet.replan(self.plan)
            self.pipeline = Pipeline(self.plan, self.fleet.start(self.plan))

    def mend(self) -> None:
        """Recover if the stages are known to be dead; asked before it is decided what a step computes."""
        if self.pipeline is not None and isinstance(self.pipeline.broken, StageDied):
            self.engine.recover(self.pipeline.broken)

    @property
    def block_memory(self) -> BlockMemory:
        """Where the cache's blocks lie."""
        return self.pipeline or self.cache

    def copy_blocks(self, copies: Listing[tuple[int, int, int]]) -> None:
        """Copy cache blocks (group, source, target) in every stage, before the next step."""
        self.block_memory.copy_blocks(copies)

    @property
    def parameters(self) -> list[Parameters]:
        """The weights, and the pools of adapters, of each stage of this process."""
        return [memory for stage in self.stages for memory in stage.parameters]

    @property
    def engine(self) -> Engine:
        """Runs requests on this model, of all threads; made by the first that asks."""
        if self._engine is None:
            from labinfer.runtime.pipeline.device_engine import engine_of

            with self.lock:
                self.check_open()
                if self._engine is None:
                    eos_ids = self.tokenizer.eos_ids if self.tokenizer else ()
                    self._engine = engine_of(self, eos_ids, self.policy, self.seed)
        return self._engine

    @property
    def max_len(self) -> int:
        """The longest sequence the plan and its cache hold."""
        return self.plan.limits.max_sequence_len

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return self.plan.vocab_size

    @property
    def interpreters(self) -> list[Interpreter]:
        """Those of the stages of this process, in order."""
        return [stage.interpreter for stage in self.stages]

    def run(self, batch: StepBatch) -> np.ndarray:
        """One step through all stages: float32 logits [rows, vocab_size], which hold until the next step."""
        self.check_open()
        if self.pipeline is not None:
            result = self.pipeline.wait(self.pipeline.submit(StepMessage(batch, wants_logits=True)))
            assert result.logits is not None
            return result.logits
        values: list[dict[str, tuple[Device, Any]]] = [{} for _ in range(self.plan.ranks)]  # of each rank

        def run(interpreter: Interpreter) -> None:
            known = values[interpreter.stage.rank]
            made = interpreter.run(batch, {name: known[name] for name in interpreter.stage.inputs})
            known.update({name: (interpreter.device, array) for name, array in made.items()})

        began = time.perf_counter()
        for ranks in self.groups:
            ranks.each(run)
            ended = time.perf_counter()
            for interpreter in ranks.interpreters:
                self.device_seconds[interpreter.stage.device] += ended - began
            began = ended
        device, made_last = values[0][self.plan.stages[-1].outputs[-1]]
        logits: np.ndarray = device.host_array(made_last)
        self.device_seconds[device.name] += time.perf_counter() - began
        return logits

    def decode(self, batch: StepBatch, counts: Iterable[int]) -> Iterator[np.ndarray]:
        """Decode steps on the only stage, ``counts`` of them in a call: what each call made, int32 [steps, rows].

        See ``GreedyRun``.
        """
        self.check_open()
        [interpreter] = self.interpreters
        run = interpreter.greedy(batch)
        for steps in counts:
            began = time.perf_counter()
            made = run(steps, len(batch.token_ids))
            self.device_seconds[interpreter.device.name] += time.perf_counter() - began
            yield made

    def check_open(self) -> None:
        """Raise ``UsageError`` once the model is closed."""
        if self.closed:
            raise UsageError("run.closed", "the model is closed")

    def session(self, lora_request: LoRARequest | None = None) -> Session:
        """A fresh sequence that keeps its cache: ``session.append(token_ids)`` gives their logits."""
        from labinfer.runtime.session import Session

        return Session(self, lora_request)

    def logits(self, token_ids: Iterable[int], lora_request: LoRARequest | None = None) -> np.ndarray:
        """Logits of every position of one sequence: float32 [len(token_ids), vocab_size]."""
        with interrupts_held(), self.session(lora_request) as session:
            return session.append(token_ids)

    def generate(
        self,
        prompts: str | Listing[str] | Listing[int] | Listing[Listing[int]],
        params: SamplingParams | Listing[SamplingParams] | None = None,
        on_token: Callable[[int, str], None] | None = None,
        lora_request: LoRARequest | Listing[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Answers to one or several prompts (texts, or lists of token ids), in order; see ``generate.generate``."""
        from labinfer.runtime.generate import generate

        return generate(self, prompts, params, on_token, lora_request)

    def chat(
        self,
        messages: Listing[Message] | Listing[Listing[Message]],
        params: SamplingParams | Listing[SamplingParams] | None = None,
        on_token: Callable[[int, str], None] | None = None,
        lora_request: LoRARequest | Listing[LoRARequest | None] | None = None,
        *,
        tools: Listing[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """The next message of one conversation or of several, by the model's chat template; the rest as ``generate``.

        A conversation is a list of messages, ``{"role": "user", "content": "Hello"}``. ``tools`` are functions that the
        model may call, as JSON schemas; ``chat_template_kwargs`` are further names for the template
        (``enable_thinking``). Without ``add_generation_prompt`` the last message is left open.
        """
        from labinfer.runtime.generate import encode_chats, generate

        names = dict(chat_template_kwargs or {}, tools=tools, add_generation_prompt=add_generation_prompt)
        return generate(self, encode_chats(self, messages, names), params, on_token, lora_request)

    def beam_search(
        self, prompts: str | Listing[str] | Listing[int] | Listing[Listing[int]], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The likeliest answers as wholes to one or several prompts, in order; see ``beam_search.beam_search``."""
        from labinfer.runtime.beam_search import beam_search

        return beam_search(self, prompts, params)

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

    def compute(self, part: Part) -> np.ndarray:
        """Run a step of ``part`` and count it as computed: its logits, which hold until the next step.

        The caller has seen that the cache has room for it.
        """
        if self.batch.grow(part) is not None:
            raise LabinferError("run.cache-full", "the cache has too few blocks left for a step")
        logits = self.run(self.batch.step(part))
        self.batch.computed(part)
        return logits

    @contextmanager
    def listen(self, value: str, callback: Callable[[np.ndarray], np.ndarray | None]) -> Iterator[None]:
        """Within the context, ``callback(array)`` sees ``value`` in every step; what it returns, unless None, replaces
        it.

        ``value`` is a name of the plan, ``layers.3.attn.out``; ``array`` is a copy, float32 [T, features].
        """
        interpreter = self.maker(value)
        [ranks] = [group.interpreters for group in self.groups if interpreter in group.interpreters]
        with self.lock:  # no step runs meanwhile
            listeners = [(interpreter, interpreter.listen(value, callback))]
            listeners += [(each, each.listen_along()) for each in ranks if each is not interpreter]
        try:
            yield
        finally:
            with self.lock:
                for each, listener in listeners:
                    each.unlisten(listener)

    def maker(self, value: str) -> Interpreter:
        """The interpreter of the stage that makes ``value``; ``UsageError`` if none here does."""
        if not self.stages:
            remedy = "run it with --transport local"
            raise UsageError("run.other-process", "values of stages in other processes cannot be seen", remedy=remedy)
        for interpreter in self.interpreters:
            here = value in interpreter.slots or value in interpreter.inner
            if here and value not in interpreter.stage.inputs:
                return interpreter
        known = [name for each in self.interpreters for name in each.slots]
        remedy = did_you_mean(value, known) or "`labinfer explain PLAN --values` lists them"
        raise UsageError("run.unknown-value", f"the plan has no value '{value}'", remedy=remedy)

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
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self.proposer is not None:
            self.proposer.close()
        self.closed = True
        self.adapters.close()
        self.memory.close()
        self.stages = []
        self.manager.release(self.owner)
        if self.owns_manager:
            self.manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_devices(plan: Plan) -> None:
    """Raise ``DoesNotFit`` for a plan over devices that are only declared."""
    for stage in plan.stages:
        declared = plan.devices[stage.device].declared
        if declared is not None:
            message = f"device '{stage.device}' ({declared}) is only declared: this plan can be explained, not run"
            raise DoesNotFit("device.declared", message, remedy="compile it for devices that are here")
