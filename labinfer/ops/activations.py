"""The activation functions of feed-forward networks, under the names Hugging Face configs use (``ACT2FN``).

Several names mean one function; ``Activation`` turns them into the canonical one when the attributes are read, so that
a backend has eight functions to write. References: GELU, Hendrycks & Gimpel, arXiv:1606.08415; SiLU, Elfwing et al.,
arXiv:1702.03118; squared ReLU, So et al., arXiv:2109.08668; gated units, Shazeer, arXiv:2002.05202.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from labinfer.errors import did_you_mean

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

ALIASES = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu_squared": "relu2",
}
"""Other spellings of the functions in ``FUNCTIONS``; all the tanh forms of GELU are one formula."""

_ERFC_P = (
    2.15311535474403846e-8,
    5.64188496988670089e-1,
    8.88314979438837594e0,
    6.61191906371416295e1,
    2.98635138197400131e2,
    8.81952221241769090e2,
    1.71204761263407058e3,
    2.05107837782607147e3,
    1.23033935479799725e3,
)
_ERFC_Q = (
    1.0,
    1.57449261107098347e1,
    1.17693950891312499e2,
    5.37181101862009858e2,
    1.62138957456669019e3,
    3.29079923573345963e3,
    4.36261909014324716e3,
    3.43936767414372164e3,
    1.23033935480374942e3,
)


def sigmoid(x: Array) -> Array:
    """``1 / (1 + exp(-x))`` without overflow at either end."""
    import numpy as np

    e = np.exp(-np.abs(x))
    y: Array = np.where(x >= 0, 1, e) / (1 + e)
    return y


def normal_cdf(x: Array) -> np.ndarray:
    """The normal distribution function, float64, within 1e-10.

    ``erfc(z) = exp(-z*z) * P(z) / Q(z)`` with the middle-range coefficients of Cody, "Rational Chebyshev approximation
    for the error function", Math. Comp. 23 (1969). Used outside that range too: the error stays far below float32.
    """
    import numpy as np

    z = np.minimum(np.abs(x.astype(np.float64)), 38.0) * math.sqrt(0.5)
    upper_tail = 0.5 * np.exp(-z * z) * np.polyval(_ERFC_P, z) / np.polyval(_ERFC_Q, z)
    cdf: np.ndarray = np.where(x >= 0, 1.0 - upper_tail, upper_tail)
    return cdf


def silu(x: Array) -> Array:
    """``x * sigmoid(x)``."""
    return x * sigmoid(x)


def gelu(x: Array) -> Array:
    """``x`` times the normal distribution function of ``x``."""
    import numpy as np

    y: Array = (x * normal_cdf(x)).astype(np.float32)
    return y


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation of ``gelu``."""
    import numpy as np

    y: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return y


def quick_gelu(x: Array) -> Array:
    """``x * sigmoid(1.702 * x)``."""
    return x * sigmoid(1.702 * x)


def relu(x: Array) -> Array:
    """``max(x, 0)``."""
    import numpy as np

    return np.maximum(x, 0)


def relu2(x: Array) -> Array:
    """``max(x, 0) ** 2``."""
    return relu(x) ** 2


def tanh(x: Array) -> Array:
    """``tanh(x)``."""
    import numpy as np

    return np.tanh(x)


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    f.__name__: f for f in (silu, gelu, gelu_tanh, quick_gelu, relu, relu2, tanh, sigmoid)
}
"""The numpy reference of every canonical activation: float32 in, float32 out."""

KNOWN_NAMES = (*FUNCTIONS, *ALIASES)


def canonical_name(name: str) -> str:
    """The canonical name of an activation; an unknown one is a validation error listing the known names."""
    canonical = ALIASES.get(name, name)
    if canonical not in FUNCTIONS:
        hint = did_you_mean(name, KNOWN_NAMES)
        raise PydanticCustomError(
            "unknown_activation",
            "there is no activation function '{name}'; known: {known}{hint}",
            {"name": name, "known": ", ".join(KNOWN_NAMES), "hint": f" ({hint})" if hint else ""},
        )
    return canonical


Activation = Annotated[
    str, AfterValidator(canonical_name), WithJsonSchema({"type": "string", "enum": sorted(KNOWN_NAMES)})
]
"""The type of a ``function`` attribute: any known name, kept as the canonical one."""
