"""A stage that is ready to run: its weights, its cache and its interpreter on one device."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

from labinfer.backends.base import Device
from labinfer.backends.exchange import RankPeers
from labinfer.compiler.fold import layer_matrices, unfold_ops, unfold_states, unfold_weights
from labinfer.compiler.graph import Op, Weight
from labinfer.compiler.plan import Plan, Stage
from labinfer.runtime.interpreter import Interpreter, check_kernels
from labinfer.runtime.kv_cache import KVCache, stage_states
from labinfer.runtime.parameters import Parameters, Progress
from labinfer.runtime.queued_weights import streamed_weights
from labinfer.runtime.streamed_window import StreamedWindow
from labinfer.runtime.weights import Checkpoint


class LoadedStage:
    """Stage ``number`` of a plan on its device; ``load`` reads its weights, ``close`` gives all memory back.

    ``peers`` are the other ranks that run it, if there are any.
    """

    def __init__(self, plan: Plan, number: int, device: Device, peers: RankPeers | None = None) -> None:
        self.plan, self.stage, self.device = plan, plan.stages[number], device
        check_kernels(self.stage, device)
        ops = [part for op, _ in unfold_ops(self.stage) for part in op.primitives()]
        options = plan.devices[self.stage.device].options
        with ExitStack() as undo:
            weights = unfold_weights(plan)
            self.streamed: StreamedWindow | None = None
            if self.stage.streamed:
                matrices = layer_matrices([op for op, _ in unfold_ops(self.stage)], weights)
                self.streamed = undo.enter_context(closing(streamed_weights(self.stage, matrices, device)))
            arrays = self.streamed.arrays() if self.streamed else {}
            self.parameters = allocate_weights(self.stage, ops, weights, arrays, device, undo)
            arrays |= {name: array for each in self.parameters for name, array in each.arrays().items()}
            self.cache = KVCache(device, unfold_states(plan), stage_states(self.stage), plan.limits)
            undo.callback(self.cache.close)
            self.interpreter = Interpreter(
                self.stage, device, plan.limits, arrays, self.cache, options, self.streamed, peers
            )
            undo.callback(self.interpreter.close)
            self.memory = undo.pop_all()

    def load(self, checkpoint: Checkpoint, progress: Progress, compiling: Callable[[int, int], None]) -> None:
        """Read the weights, and meanwhile bind a first tape, which may have to compile kernels."""
        # binding looks at values of vectors (rope's factors), but only at places of matrices
        for each in self.parameters:
            each.load(checkpoint, progress, vectors=True)
        with ThreadPoolExecutor(1) as background:
            loading = [background.submit(each.load, checkpoint, progress, vectors=False) for each in self.parameters]
            self.interpreter.warm(compiling)
            for each_loading in loading:
                each_loading.result()
        if self.streamed is not None:
            self.streamed.load(checkpoint, progress)

    def close(self) -> None:
        """Give everything back."""
        self.memory.close()


def allocate_weights(
    stage: Stage,
    ops: list[Op],
    weights: Mapping[str, Weight],
    elsewhere: Container[str],
    device: Device,
    undo: ExitStack,
) -> list[Parameters]:
    """Memory for what the ops of ``stage`` multiply with: its weights, and the pools of adapters if it has any."""
    names = dict.fromkeys(name for op in ops for name in op.weights.values() if name not in elsewhere)
    used = [weights[name] for name in names]
    pools = [weight for weight in used if weight.adapter]
    own = [weight for weight in used if not weight.adapter]
    made = [undo.enter_context(closing(Parameters("weights", own, stage.bytes.weights, device)))]
    if pools or stage.bytes.adapters:
        made.append(undo.enter_context(closing(Parameters("adapters", pools, stage.bytes.adapters, device))))
    return made
