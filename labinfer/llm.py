"""``labinfer.load`` and ``labinfer.LLM``: a plan, its checkpoint and its tokenizer as a model that answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from labinfer.api import checkpoint_source, find_plan, is_plan, sha256
from labinfer.compiler.fold import unfold_weights
from labinfer.compiler.plan import Plan
from labinfer.compiler.source import MAX_MAP_BYTES
from labinfer.errors import StalePlan, UsageError, WeightsError
from labinfer.home import graphs_dir
from labinfer.ops.formats import stored_bytes
from labinfer.progress import Progress, silent
from labinfer.replanning import check_movable, with_layers
from labinfer.runtime.cache import CacheOptions
from labinfer.runtime.eviction import EvictionPolicy, LeastRecentlyUsed
from labinfer.runtime.manager import Manager
from labinfer.runtime.model import Model
from labinfer.runtime.pipeline.balance import BalancedFleet
from labinfer.runtime.pipeline.workers import Fleet, ProcessFleet
from labinfer.runtime.scheduler import Policy
from labinfer.runtime.speculation import DraftModel, PromptLookup, Proposer, SpeculativeConfig
from labinfer.runtime.tokenizer import Tokenizer
from labinfer.runtime.weights import Checkpoint, open_checkpoint

LOAD_LOGITS_ROWS = 64
"""Rows of logits that ``load`` and ``LLM`` plan for at least, so that ``Model.logits`` goes 64 positions a step."""


def load(model: str | Path | Plan | None = None, **options: Any) -> LLM:
    """A model ready to run, from a plan, a plan.json or anything ``compile`` takes; see ``LLM``."""
    return LLM(model, **options)


class LLM(Model):
    """A model that answers prompts. Close it, or use it as a context manager.

    ``model`` is a plan, a plan.json or anything ``compile`` takes; None is the embedded default. ``options`` go to the
    compiler under vLLM's names (``max_model_len``, ``max_num_seqs``, ``max_num_batched_tokens``, ``block_size``, ...)
    and are refused for a plan, which has decided them. ``progress`` shows the weights being loaded. ``seed`` makes
    requests without a seed of their own repeatable, in the order in which they come. The keywords from
    ``enable_prefix_caching`` to ``cold_bytes`` are those of ``labinfer.runtime.cache.CacheOptions``; ``transport``
    makes the plan's stages a pipeline (``local``, ``shm``, ``tcp``, or the fleet of ``labinfer.cluster``); ``policy``
    decides what each step computes. With ``rebalance`` layers move between processes (``shm``, ``tcp``) that take
    unequal times.
    """

    def __init__(
        self,
        model: str | Path | Plan | None = None,
        *,
        weights: str | Path | None = None,
        devices: str | Sequence[str] | None = None,
        manager: Manager | None = None,
        progress: Progress | None = None,
        seed: int | None = None,
        enable_prefix_caching: bool = True,
        eviction_policy: Callable[[], EvictionPolicy] = LeastRecentlyUsed,
        cold_folder: str | Path | None = None,
        cold_bytes: int = 10 * 10**9,
        speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None,
        transport: str | Fleet | None = None,
        policy: Policy | None = None,
        rebalance: bool = False,
        **options: Any,
    ) -> None:
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise UsageError("run.seed", f"seed must be a whole number, got {seed!r:.60}")
        guessing = None if speculative_config is None else SpeculativeConfig.of(speculative_config)
        if devices is not None:
            options["devices"] = devices
        rows = {"max_logits_rows": default_logits_rows(options)}
        plan = find_plan(model, weights=weights, progress=progress, defaults=rows, **options)
        if guessing is not None and (transport is not None or plan.ranks > 1):
            raise UsageError("speculation.pipeline", "a pipeline does not speculate", remedy="leave the transport out")
        checkpoint = open_plan_checkpoint(plan, weights, str(model) if isinstance(model, str | Path) else "the plan")
        self.checkpoint = checkpoint
        try:
            tokenizer = Tokenizer.load(checkpoint.path, checkpoint.config if checkpoint.kind == "gguf" else None)
            show = progress or silent
            compiling = partial(show, "preparing kernels")
            cache = CacheOptions(enable_prefix_caching, eviction_policy, cold_folder, cold_bytes)
            processes = self.balanced(plan, transport) if rebalance else ProcessFleet
            super().__init__(
                plan, checkpoint, tokenizer, manager, loading(plan, show), compiling, cache, seed, transport, policy,
                processes,
            )  # fmt: skip
        except BaseException:
            checkpoint.close()
            raise
        if guessing is not None:
            try:
                self.proposer = self.open_proposer(guessing, progress)
            except BaseException:
                self.close()
                raise

    def balanced(self, plan: Plan, transport: str | Fleet | None) -> Callable[..., Fleet]:
        """What starts processes whose layers move; ``UsageError`` where they cannot."""
        if transport not in ("shm", "tcp"):
            message = "layers are moved between the processes of a pipeline only"
            raise UsageError("rebalance.transport", message, remedy="run it with --transport shm")
        check_movable(plan, self.checkpoint.path)
        return partial(BalancedFleet, move=self.moved)

    def moved(self, plan: Plan, counts: Sequence[int]) -> Plan:
        """``plan`` with so many layers in each stage, for which memory is granted; ``DoesNotFit`` where it is not."""
        found = with_layers(plan, counts, self.checkpoint.path)
        self.manager.regrant(self.owner, {stage.device: stage.bytes.total for stage in found.stages})
        return found

    def open_proposer(self, config: SpeculativeConfig, progress: Progress | None) -> Proposer:
        """Where the guesses of speculation come from; a draft model is opened on the devices of this one."""
        count, limits = config.num_speculative_tokens, self.plan.limits
        if min(limits.max_num_batched_tokens, limits.max_logits_rows) < 2:
            message = f"steps of {limits.max_num_batched_tokens} tokens and {limits.max_logits_rows} rows of logits"
            remedy = f"compile with --max-logits-rows {1 + count}"
            raise UsageError("speculation.no-room", f"{message} have no room for guesses", remedy=remedy)
        if config.method == "ngram":
            return PromptLookup(count, config.prompt_lookup_max, config.prompt_lookup_min)
        plan = draft_plan(config.model, self.plan, progress)
        draft = DraftModel(LLM(plan, manager=self.manager, progress=progress), count)
        try:
            draft.check(self)
        except BaseException:
            draft.close()
            raise
        return draft

    def close(self) -> None:
        """Give back memory and the checkpoint's files."""
        super().close()
        self.checkpoint.close()


def default_logits_rows(options: Mapping[str, Any]) -> int:
    """Rows of logits for the limits among ``options``, whose values nobody has checked yet."""
    limits = {name: value for name, value in options.items() if isinstance(value, int)}
    rows: int = max(LOAD_LOGITS_ROWS, limits.get("max_num_seqs", 0))
    return min(rows, limits.get("max_num_batched_tokens", rows))


def draft_plan(model: str | Path | Plan, plan: Plan, progress: Progress | None) -> Plan:
    """The plan of a draft for the model of ``plan``: with its limits, if the draft is not for shorter texts."""
    if isinstance(model, Plan) or is_plan(model):
        return find_plan(model)
    limits = plan.limits
    options: dict[str, Any] = {"devices": list(plan.devices), "max_num_seqs": limits.max_num_seqs}
    options["max_num_batched_tokens"] = limits.max_num_batched_tokens
    try:
        return find_plan(model, progress=progress, max_model_len=limits.max_model_len, **options)
    except UsageError as error:
        if error.code != "limits.max-model-len":
            raise
        return find_plan(model, progress=progress, **options)


def loading(plan: Plan, progress: Progress) -> Callable[[int], None]:
    """Counts the bytes read from the checkpoint and shows them with ``progress``."""
    read = [weight for weight in unfold_weights(plan).values() if not weight.adapter]
    total = sum(stored_bytes(weight.format, weight.shape) for weight in read)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("loading weights", done, total)

    return advance


def open_plan_checkpoint(plan: Plan, weights: str | Path | None, place: str) -> Checkpoint:
    """The checkpoint that ``plan`` was made for; ``StalePlan`` when map, config or weights have changed since."""
    path = weights or plan.source.checkpoint
    if path is None:
        message = f"{place} was compiled without weights, for '{plan.source.name}'"
        raise WeightsError("weights.none", message, remedy="give the model: --weights DIR")
    checkpoint = open_checkpoint(path)
    try:
        found = dict(checkpoint_source(checkpoint).digests)
        found |= map_digest([graphs_dir() / file for file in plan.source.maps])  # an absolute path stays what it is
        changed = [name for name, digest in plan.source.sha256.items() if found.get(name, digest) != digest]
        if changed:
            message = f"{place} is stale: {' and '.join(changed)} changed since it was compiled"
            raise StalePlan("plan.stale", message, remedy=f"compile it again: labinfer compile {path}")
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def map_digest(files: Sequence[Path]) -> dict[str, str]:
    """The digest of a plan's map, or nothing when it is not on this machine."""
    try:
        if all(file.is_file() and file.stat().st_size <= MAX_MAP_BYTES for file in files):
            return {"map": sha256(*(file.read_bytes() for file in files))}
    except (OSError, ValueError):
        pass
    return {}
