"""Reads LoRA adapters as PEFT saves them: a folder with adapter_config.json and adapter_model.safetensors.

Nothing of the config is trusted: what would change the arithmetic beyond ``x W^T + scale x A^T B^T`` is refused by
name, and every tensor's shape is known before any is read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from labinfer.errors import ErrorSink, Place, WeightsError
from labinfer.ops.dequantization import dequantize
from labinfer.runtime.weights.checkpoint import Checkpoint
from labinfer.runtime.weights.json_text import read_json_object
from labinfer.runtime.weights.safetensors_file import read_safetensors
from labinfer.runtime.weights.tensor_info import TensorInfo, quoted

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FLOATS = ("f32", "f16", "bf16")
MAX_NAME = 512

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "kasa_config": (None,),
    "arrow_config": (None,),
    "megatron_config": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),  # others change the base weights too
}
"""Settings that change what an adapter computes, and the values that plain LoRA has; a missing one is plain."""

Patterns = dict[str, tuple[int, Any]]
"""Ends of module names, or whole ones after ``^``; the place of each among all of them, and its value."""

_TENSOR = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])\.weight$")
_PATTERN = re.compile(r"^(?P<anchor>\^?)(?P<name>[\w.-]+)\$?$")
_MERGE = "merge the adapter into its model with PEFT (merge_and_unload), and run that"
_SAVE = "save or download the adapter again"


class PeftAdapter:
    """An adapter on disk; a context manager. ``modules`` gives the rank of each module that it adapts.

    Modules have the names of the Hugging Face model. Raises WeightsError, or Errors with every fault found.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        for name in (CONFIG, TENSORS):
            if not os.path.exists(self.folder / name):
                remedy = f"give a folder with {CONFIG} and {TENSORS}, as PEFT's save_pretrained writes it"
                place = Place(str(self.folder))
                raise WeightsError("lora.missing-file", f"there is no {name} here", place=place, remedy=remedy)
        self.place = Place(str(self.folder / CONFIG))
        config = read_json_object(self.folder / CONFIG, WeightsError)
        tensors = read_safetensors(self.folder / TENSORS)
        sink = ErrorSink()
        self.checkpoint = Checkpoint(self.folder / TENSORS, "safetensors", {}, tensors)
        self.read_config(config, sink)
        sink.check()
        self.parts = self.pair(tensors, sink)
        sink.check()
        self.modules = {module: parts["A"].shape[0] for module, parts in self.parts.items()}
        for module, rank in self.modules.items():
            self.check_module(module, rank, sink)
        sink.check()

    @property
    def rank(self) -> int:
        """The greatest rank of a module."""
        return max(self.modules.values())

    def read_config(self, config: Mapping[str, Any], sink: ErrorSink) -> None:
        """Take rank, alpha and their exceptions from ``config``; what is not plain LoRA goes to ``sink``."""
        if config.get("peft_type") != "LORA":
            sink.add(self.refused("lora.unsupported", f"peft_type is {config.get('peft_type')!r:.40}, not 'LORA'"))
        for key, plain in NEUTRAL.items():
            value = config.get(key, plain[0])
            if not any(value == each and type(value) is type(each) for each in plain):
                sink.add(self.refused("lora.unsupported", f"{key} is {value!r:.60}: only plain LoRA is applied"))
        self.default_rank, self.default_alpha = config.get("r", 8), config.get("lora_alpha", 8)
        self.by_root = config.get("use_rslora", False)
        if not isinstance(self.by_root, bool):
            sink.add(self.refused("lora.config", f"use_rslora is {self.by_root!r:.40}, neither true nor false"))
        ranks = self.patterns(config, "rank_pattern", sink)
        alphas = self.patterns(config, "alpha_pattern", sink)
        for value in (self.default_rank, *(value for _, value in ranks.values())):
            if type(value) is not int or not 1 <= value < 1 << 31:
                sink.add(self.refused("lora.config", f"a rank is {value!r:.40}, not a positive whole number"))
        for value in (self.default_alpha, *(value for _, value in alphas.values())):
            if type(value) not in (int, float) or not abs(value) < 1e30:
                sink.add(self.refused("lora.config", f"a lora_alpha is {value!r:.40}, not a number"))
        self.ranks, self.alphas = ranks, alphas

    def patterns(self, config: Mapping[str, Any], key: str, sink: ErrorSink) -> Patterns:
        """The exceptions under ``key``."""
        given = config.get(key) or {}
        if not isinstance(given, dict):
            sink.add(self.refused("lora.config", f"{key} is {given!r:.40}, not a mapping"))
            return {}
        found: Patterns = {}
        for order, (pattern, value) in enumerate(given.items()):
            match = _PATTERN.match(pattern.replace("\\.", "."))
            if match is None:  # a regular expression from a file could take forever
                message = f"{key} has {quoted(pattern)}; only names are taken, no regular expressions"
                sink.add(self.refused("lora.unsupported", message))
            else:
                found.setdefault(match["anchor"] + match["name"], (order, value))
        return found

    def refused(self, code: str, message: str) -> WeightsError:
        """An error of the config."""
        return WeightsError(code, message, place=self.place, remedy=_MERGE if code == "lora.unsupported" else _SAVE)

    def pair(self, tensors: list[TensorInfo], sink: ErrorSink) -> dict[str, dict[str, TensorInfo]]:
        """``A`` and ``B`` of every module."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for info in tensors:
            match = _TENSOR.match(info.name) if len(info.name) <= MAX_NAME else None
            if match is None:
                sink.add(self.wrong("lora.unsupported", info, "is no A or B of a LoRA adapter", _MERGE))
            elif len(info.shape) != 2 or min(info.shape) < 1 or info.format not in FLOATS:
                sink.add(self.wrong("lora.tensor", info, f"is {info.format}{list(info.shape)}, not a matrix of floats"))
            elif match["part"] in found.setdefault(match["module"], {}):
                sink.add(self.wrong("lora.tensor", info, "is there twice"))
            else:
                found[match["module"]][match["part"]] = info
        for module, parts in found.items():
            if len(parts) == 1:
                [(part, info)] = parts.items()
                sink.add(self.wrong("lora.tensor", info, f"has no lora_{'B' if part == 'A' else 'A'} beside it"))
            elif len(parts) == 2 and parts["A"].shape[0] != parts["B"].shape[1]:
                message = f"is {list(parts['B'].shape)}, but {quoted(module)} has rank {parts['A'].shape[0]}"
                sink.add(self.wrong("lora.tensor", parts["B"], message))
        if not tensors:
            place = Place(str(self.folder / TENSORS))
            sink.add(WeightsError("lora.tensor", "the adapter has no tensors", place=place, remedy=_SAVE))
        return found

    def wrong(self, code: str, info: TensorInfo, message: str, remedy: str = _SAVE) -> WeightsError:
        """An error of one tensor."""
        return WeightsError(code, f"tensor {quoted(info.name)} {message}", place=Place(str(info.file)), remedy=remedy)

    def check_module(self, module: str, rank: int, sink: ErrorSink) -> None:
        """The config must give a module the rank that its tensors have."""
        stated = exception(self.ranks, module, self.default_rank)
        if stated != rank:
            message = f"has rank {rank}, {CONFIG} says {stated}"
            sink.add(self.wrong("lora.tensor", self.parts[module]["A"], message))

    def scale(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) of rank-stabilized LoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        rank, alpha = self.modules[module], float(exception(self.alphas, module, self.default_alpha))
        return alpha / (math.sqrt(rank) if self.by_root else rank)

    def down(self, module: str) -> np.ndarray:
        """A of ``module``, float32 [rank, in_features]."""
        return self.matrix(self.parts[module]["A"])

    def up(self, module: str) -> np.ndarray:
        """B of ``module`` times its scale, float32 [out_features, rank]."""
        return self.matrix(self.parts[module]["B"]) * np.float32(self.scale(module))

    def matrix(self, info: TensorInfo) -> np.ndarray:
        """A tensor as float32."""
        return dequantize(self.checkpoint.raw(info.name), info.format, info.shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.checkpoint.close()


def exception(patterns: Patterns, module: str, default: Any) -> Any:
    """What the first pattern that ``module`` fits says, as PEFT's ``get_pattern_key`` chooses it."""
    starts = [0, *(at + 1 for at, character in enumerate(module) if character == ".")]
    ends = [f"^{module}", *(module[start:] for start in starts)]
    return min((patterns[end] for end in ends if end in patterns), default=(0, default))[1]
