"""The frequencies of rotary position embedding, plain and scaled for longer contexts, as Hugging Face computes them.

Backends call ``inverse_frequencies`` once and keep cosines and sines as tables; only the kinds in ``LENGTH_DEPENDENT``
need to be asked again as a sequence grows.

Numbers: the powers are taken in float64 and rounded to float32, which is what torch's float32 ``pow`` returns almost
always; everything after is float32 as in ``transformers.modeling_rope_utils``. Angles are ``position * inv_freq`` in
float32 too: an exact angle would differ from torch's by up to 1e-4 at positions of a few thousand.

Sources: RoPE, Su et al., arXiv:2104.09864; linear, Chen et al., arXiv:2306.15595; dynamic NTK and yarn, Peng et al.,
arXiv:2309.00071; longrope, Ding et al., arXiv:2402.13753; llama3, arXiv:2407.21783 and Meta's reference code.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    import numpy as np

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})
"""Kinds whose frequencies change with the length of the sequence."""

REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
"""Entries that a kind cannot do without; the others have defaults."""


class RopeScaling(BaseModel):
    """A checkpoint's ``rope_parameters`` / ``rope_scaling`` entry, in either spelling (``rope_type`` or ``type``).

    Other entries of that dictionary (``rope_theta``, ``partial_rotary_factor``, …) are attributes of the op and are
    ignored here.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    rope_type: RopeType = "default"
    factor: PositiveFloat | None = None
    original_max_position_embeddings: Annotated[float, Field(gt=1)] | None = None
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    short_factor: tuple[PositiveFloat, ...] | None = None
    long_factor: tuple[PositiveFloat, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        if nested := [str(key) for key, value in entry.items() if isinstance(value, dict)]:
            _refuse(f"scaling is nested by layer type ({', '.join(nested)}); the map must pick one of them")
        kind = entry.get("rope_type") or entry.get("type") or "default"
        if kind == "su" or (kind == "yarn" and entry.get("long_factor")):  # first names of Phi-3's longrope
            kind = "longrope"
        return {**entry, "rope_type": kind}

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        missing = [name for name in REQUIRED[self.rope_type] if getattr(self, name) is None]
        if missing:
            _refuse(f"rope scaling '{self.rope_type}' needs {', '.join(missing)}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            _refuse(f"low_freq_factor {low} must be less than high_freq_factor {high}")
        return self


def _refuse(message: str) -> None:
    raise PydanticCustomError("rope_scaling", "{message}", {"message": message})


def trained_length(scaling: RopeScaling, max_position: int | None, original_max_position: int | None) -> float | None:
    """The context length before scaling: the config's own entry, the one inside ``scaling``, or ``max_position``."""
    return original_max_position or scaling.original_max_position_embeddings or max_position


def check_scaling(
    scaling: RopeScaling, rotary_dim: int, max_position: int | None, original_max_position: int | None
) -> None:
    """Raises a validation error when ``scaling`` does not fit the head or lacks a length it needs."""
    kind = scaling.rope_type
    if kind == "dynamic" and (max_position is None or rotary_dim == 2):
        _refuse("rope scaling 'dynamic' needs max_position and a rotary_dim above 2")
    if kind in ("llama3", "yarn", "longrope") and not trained_length(scaling, max_position, original_max_position):
        _refuse(f"rope scaling '{kind}' needs original_max_position or max_position")
    if kind in ("yarn", "longrope") and scaling.factor is None and max_position is None:
        _refuse(f"rope scaling '{kind}' needs factor or max_position")
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        if (count := len(getattr(scaling, name))) != (needed := (rotary_dim + 1) // 2):
            _refuse(f"{name} has {count} entries, rotary_dim {rotary_dim} needs {needed}")


def inverse_frequencies(
    rotary_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    *,
    max_position: int | None = None,
    original_max_position: int | None = None,
    total_len: int | None = None,
) -> tuple[np.ndarray, float]:
    """Inverse frequencies, float32 [rotary_dim / 2, rounded up] in radians per position, and the factor on cos and sin.

    ``max_position`` is the config's ``max_position_embeddings``, ``original_max_position`` the length the model was
    trained with where the config says so outside ``scaling``; ``total_len`` is the length of the sequence, None
    meaning short. The arguments must have passed ``check_scaling``.
    """
    import numpy as np

    scaling = scaling or RopeScaling()
    trained = trained_length(scaling, max_position, original_max_position) or 0.0
    extension = scaling.factor or (max_position or 0.0) / (trained or 1.0)
    if scaling.rope_type == "dynamic" and max_position:
        theta = _dynamic_theta(rotary_dim, theta, extension, max_position, total_len)
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    periods = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    match scaling.rope_type:
        case "linear":
            return 1 / periods / np.float32(extension), 1.0
        case "llama3":
            return _llama3(1 / periods, scaling, extension, trained), 1.0
        case "yarn":
            return _yarn(periods, scaling, extension, _yarn_range(rotary_dim, theta, scaling, trained))
        case "longrope":
            return _longrope(periods, scaling, extension, trained, total_len)
        case _:
            return 1 / periods, 1.0


def _dynamic_theta(rotary_dim: int, theta: float, factor: float, max_position: int, total_len: int | None) -> float:
    """The base grows with the part of the sequence beyond ``max_position`` (in float32, as torch has it)."""
    import numpy as np

    if total_len is None or total_len <= max_position:
        return theta
    growth = np.float32(factor) * np.float32(total_len) / np.float32(max_position) - np.float32(factor - 1)
    power = np.float32(float(growth) ** (rotary_dim / (rotary_dim - 2)))
    return float(np.float32(theta) * power)


def _llama3(inv_freq: np.ndarray, scaling: RopeScaling, factor: float, trained: float) -> np.ndarray:
    """Divide long wavelengths by ``factor``, keep short ones, blend between."""
    import numpy as np

    low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 1.0
    wavelength = np.float32(2 * math.pi) * (1 / inv_freq)  # torch divides a number by a tensor through the reciprocal
    smooth = (np.float32(trained) * (1 / wavelength) - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * inv_freq / np.float32(factor) + smooth * inv_freq
    scaled = np.where(wavelength > trained / low, inv_freq / np.float32(factor), blended)
    return np.where(wavelength < trained / high, inv_freq, scaled).astype(np.float32)


def _yarn_range(rotary_dim: int, theta: float, scaling: RopeScaling, trained: float) -> tuple[float, float]:
    """Indices of the frequencies between which yarn blends: those turning ``beta_fast`` and ``beta_slow`` times."""

    def index(turns: float) -> float:
        return rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(scaling.beta_fast or 32.0), index(scaling.beta_slow or 1.0)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, rotary_dim - 1)


def _yarn(
    periods: np.ndarray, scaling: RopeScaling, factor: float, blend: tuple[float, float]
) -> tuple[np.ndarray, float]:
    """Keep fast frequencies, divide slow ones by ``factor``, ramp between; sharpen attention by a log of ``factor``."""
    import numpy as np

    low, high = blend
    width = high - low or 0.001
    ramp = np.clip((np.arange(len(periods), dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    kept = 1 - ramp
    inv_freq = 1 / (np.float32(factor) * periods) * (1 - kept) + 1 / periods * kept
    if scaling.attention_factor is not None:
        return inv_freq, scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return inv_freq, yarn_mscale(factor, scaling.mscale) / yarn_mscale(factor, scaling.mscale_all_dim)
    return inv_freq, yarn_mscale(factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Yarn's attention temperature ``0.1 * mscale * ln(factor) + 1`` for a context longer by ``factor``."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(
    periods: np.ndarray, scaling: RopeScaling, factor: float, trained: float, total_len: int | None
) -> tuple[np.ndarray, float]:
    """Divide each frequency by a searched factor of its own; the long set only beyond the trained length."""
    import numpy as np

    factors = scaling.long_factor if total_len is not None and total_len > trained else scaling.short_factor
    inv_freq = 1 / (np.array(factors, np.float32) * periods)
    if scaling.attention_factor is not None:
        return inv_freq, scaling.attention_factor
    return inv_freq, math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
