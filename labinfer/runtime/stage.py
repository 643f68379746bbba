"""A stage that is ready to run: its weights, its cache and its interpreter on one device."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

from labinfer.backends.base import Device, capabilities
from labinfer.backends.exchange import RankPeers
from labinfer.compiler.fold import layer_matrices, unfold_ops, unfold_states, unfold_weights
from labinfer.compiler.graph import Op, Weight
from labinfer.compiler.plan import Plan
from labinfer.errors import InvalidFile
from labinfer.ops.formats import stored_bytes
from labinfer.runtime.interpreter import Interpreter, check_kernels
from labinfer.runtime.kv_cache import KVCache, stage_states
from labinfer.runtime.parameters import Parameters, Progress, load_parameters
from labinfer.runtime.queued_weights import streamed_weights
from labinfer.runtime.streamed_window import StreamedWindow
from labinfer.runtime.weights import Checkpoint

Kept = dict[tuple[Weight, ...], Parameters]
"""Weights that are loaded on a device and that no stage uses: those of a layer, or one that is beside the layers."""


class LoadedStage:
    """Stage ``number`` of a plan on its device; ``load`` reads its weights, ``close`` gives all memory back.

    ``peers`` are the other ranks that run it, if there are any. With ``kept``, of the same device, each layer's weights
    have memory of their own: they are taken from there, or given back before anything is allocated if they are not
    wanted, so that at no time there is more than either of two plans says; ``rest`` leaves them for another plan.
    """

    def __init__(
        self, plan: Plan, number: int, device: Device, peers: RankPeers | None = None, kept: Kept | None = None
    ) -> None:
        self.plan, self.stage, self.device = plan, plan.stages[number], device
        self.parameters: list[Parameters] = []
        with ExitStack() as undo:
            undo.callback(self.close_parameters)
            check_kernels(self.stage, device)
            ops = [part for op, _ in unfold_ops(self.stage) for part in op.primitives()]
            options = plan.devices[self.stage.device].options
            weights = unfold_weights(plan)
            self.streamed: StreamedWindow | None = None
            if self.stage.streamed:
                matrices = layer_matrices([op for op, _ in unfold_ops(self.stage)], weights)
                self.streamed = undo.enter_context(closing(streamed_weights(self.stage, matrices, device)))
            arrays = self.streamed.arrays() if self.streamed else {}
            self.missing = self.allocate_weights(ops, weights, arrays, kept)
            arrays |= {name: array for each in self.parameters for name, array in each.arrays().items()}
            self.cache = KVCache(device, unfold_states(plan), stage_states(self.stage), plan.limits)
            undo.callback(self.cache.close)
            self.interpreter = Interpreter(
                self.stage, device, plan.limits, arrays, self.cache, options, self.streamed, peers
            )
            undo.callback(self.interpreter.close)
            self.memory = undo.pop_all()

    def allocate_weights(
        self, ops: list[Op], weights: Mapping[str, Weight], elsewhere: Container[str], kept: Kept | None
    ) -> list[Parameters]:
        """Have memory for what ``ops`` multiply with: weights, and the pools of adapters if any; those to be loaded."""
        names = {name: op.layer for op in ops for name in op.weights.values() if name not in elsewhere}
        own = {weights[name]: layer for name, layer in names.items() if not weights[name].adapter}
        pools = [weights[name] for name in names if weights[name].adapter]
        check_bytes("weights", own, self.stage.bytes.weights, self.device)
        check_bytes("adapters", pools, self.stage.bytes.adapters, self.device)
        if kept is None:
            self.parameters.append(Parameters("weights", list(own), self.device))
            if pools:
                self.parameters.append(Parameters("adapters", pools, self.device))
            return list(self.parameters)
        wanted = list(by_layer(own))
        self.parameters += [kept.pop(group) for group in wanted if group in kept]
        there = {each.weights for each in self.parameters}
        while kept:
            kept.popitem()[1].close()
        missing = [Parameters("weights", group, self.device) for group in wanted if group not in there]
        self.parameters += missing
        return missing

    @property
    def kept_bytes(self) -> int:
        """Of the weights that need not be loaded, as the checkpoint stores them."""
        there = (weight for each in self.parameters if each not in self.missing for weight in each.weights)
        return sum(stored_bytes(weight.format, weight.shape) for weight in there)

    def load(self, checkpoint: Checkpoint, progress: Progress, compiling: Callable[[int, int], None]) -> None:
        """Read the weights, and meanwhile bind a first tape, which may have to compile kernels."""
        # binding looks at values of vectors (rope's factors), but only at places of matrices
        load_parameters(self.missing, checkpoint, self.device, progress, vectors=True)
        with ThreadPoolExecutor(1) as background:
            loading = background.submit(load_parameters, self.missing, checkpoint, self.device, progress, vectors=False)
            self.interpreter.warm(compiling)
            loading.result()
        if self.streamed is not None:
            self.streamed.load(checkpoint, progress)

    def rest(self) -> Kept:
        """Give everything back but the weights, which are loaded: they are for another stage of the device."""
        kept = {each.weights: each for each in self.parameters}
        self.parameters = []
        self.close()
        return kept

    def close_parameters(self) -> None:
        """Give back the weights that it has."""
        for each in self.parameters:
            each.close()

    def close(self) -> None:
        """Give everything back."""
        self.memory.close()


def check_bytes(label: str, used: Iterable[Weight], nbytes: int, device: Device) -> None:
    """Raise ``InvalidFile`` unless weights take as many bytes as the plan says."""
    weight_bytes = capabilities(device.name).weight_bytes
    needed = sum(weight_bytes(weight.format, weight.shape) for weight in used)
    if needed != nbytes:
        message = f"the {label} of '{device.name}' take {needed} bytes, the plan says {nbytes}"
        raise InvalidFile("plan.bytes", message, remedy="compile the plan again")


def by_layer(own: Mapping[Weight, int | None]) -> Iterator[tuple[Weight, ...]]:
    """Weights that stay or go together: those of a layer, and each that is beside the layers."""
    layers: dict[int | Weight, list[Weight]] = {}
    for weight, layer in own.items():
        layers.setdefault(weight if layer is None else layer, []).append(weight)
    return map(tuple, layers.values())
