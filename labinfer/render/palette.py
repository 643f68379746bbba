"""Colours: one family of ops, one hue, in a light and a dark variant; as CSS for the drawings."""

from __future__ import annotations

CATEGORIES: dict[str, tuple[str, ...]] = {
    "linear": ("linear",),
    "norm": ("rms_norm", "layer_norm"),
    "attention": ("attention", "mla_attention", "kv_write"),
    "position": ("rope",),
    "activation": ("glu", "activation", "softcap"),
    "expert": ("router", "moe"),
    "lookup": ("embedding", "select_rows"),
    "elementwise": ("add", "scale", "split"),
}
"""Category -> op kinds; a kind that stands nowhere is ``elementwise``."""

_OF = {kind: category for category, kinds in CATEGORIES.items() for kind in kinds}

Color = tuple[int, int, int]

HUES: dict[str, tuple[Color, Color]] = {
    "linear": ((48, 103, 214), (122, 162, 247)),
    "norm": ((24, 138, 96), (94, 201, 155)),
    "attention": ((204, 104, 22), (244, 164, 96)),
    "position": ((123, 84, 204), (178, 149, 245)),
    "activation": ((201, 61, 90), (243, 139, 160)),
    "expert": ((170, 61, 158), (226, 140, 216)),
    "lookup": ((12, 130, 150), (92, 200, 215)),
    "elementwise": ((100, 108, 122), (160, 168, 182)),
}
"""Category -> its hue on a light and on a dark ground."""

DEVICES = ("linear", "attention", "norm", "position", "activation", "lookup", "expert", "elementwise")
"""Hues of devices in the order of the plan."""

HEAT_LEVELS = 7

GROUND: tuple[dict[str, Color], dict[str, Color]] = (
    {
        "surface": (255, 255, 255),
        "ink": (28, 30, 36),
        "muted": (92, 98, 110),
        "line": (214, 217, 223),
        "edge": (158, 164, 176),
    },
    {
        "surface": (29, 32, 39),
        "ink": (232, 234, 240),
        "muted": (160, 167, 181),
        "line": (58, 63, 74),
        "edge": (106, 114, 130),
    },
)
"""Neutral colours on a light and on a dark ground."""


def category_of(kind: str) -> str:
    """The category whose colour an op kind takes."""
    return _OF.get(kind, "elementwise")


def mix(color: Color, ground: Color, share: float) -> str:
    """``share`` of ``color`` over ``ground``, as ``#rrggbb``."""
    return "#" + "".join(f"{round(c * share + g * (1 - share)):02x}" for c, g in zip(color, ground, strict=True))


def drawing_css(theme: int, scope: str = "") -> str:
    """The rules that colour a drawing on a light (0) or dark (1) ground, each selector behind ``scope``."""
    ground = GROUND[theme]
    plain = {name: mix(color, color, 1) for name, color in ground.items()}
    rules = {
        "text": f"fill:{plain['ink']}",
        ".soft": f"fill:{plain['muted']}",
        ".edge": f"fill:none;stroke:{plain['edge']};stroke-width:1.5",
        ".arrow": f"fill:{plain['edge']}",
        ".frame": f"fill:{plain['surface']};stroke:{plain['line']}",
        ".group": f"fill:{mix(ground['ink'], ground['surface'], 0.035)}",
        ".pill .box,.card .box,.shade": f"fill:{plain['surface']};stroke:{plain['edge']}",
        ".badge": f"fill:{plain['ink']}",
        ".badge-text": f"fill:{plain['surface']}",
    }
    for name, hues in HUES.items():
        rules |= _tint(f".c-{name}", hues[theme], ground["surface"], 0.10 + 0.04 * theme, 0.5)
    for level in range(HEAT_LEVELS):
        share = level / (HEAT_LEVELS - 1)
        rules |= _tint(
            f".h-{level}", HUES["attention"][theme], ground["surface"], 0.04 + 0.5 * share, 0.2 + 0.8 * share
        )
    for number, name in enumerate(DEVICES):
        rules |= _tint(f".d-{number}", HUES[name][theme], ground["surface"], 0.14, 0.5)
    return "".join(f"{_scoped(selector, scope)}{{{rule}}}\n" for selector, rule in rules.items())


def _tint(selector: str, hue: Color, surface: Color, fill: float, stroke: float) -> dict[str, str]:
    return {
        f"{selector} .box,{selector}.swatch": f"fill:{mix(hue, surface, fill)};stroke:{mix(hue, surface, stroke)}",
        f"{selector} .bar": f"fill:{mix(hue, surface, min(1.0, stroke * 2))}",
    }


def _scoped(selector: str, scope: str) -> str:
    return ",".join(f"{scope}.drawing {one}" for one in selector.split(","))
