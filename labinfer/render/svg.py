"""The drawing as SVG: a static picture of its own, and the same elements for the page."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from labinfer.render.drawing import Drawing, layers_text
from labinfer.render.palette import drawing_css
from labinfer.render.picture import Box, Group, Line, Picture, block_picture, cards, overview

FRAME_PAD = 22.0
FRAME_HEAD = 42.0
COLUMN_GAP = 56.0
CORNER = 9.0

TEXT_CSS = """\
.drawing text{font:600 13.5px system-ui,-apple-system,"Segoe UI",Inter,"Liberation Sans",sans-serif}
.drawing .mono{font:400 12px ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",Consolas,monospace}
.drawing .big{font-size:15px}
.drawing .cache{stroke-dasharray:3 4}
"""


def render_svg(drawing: Drawing) -> str:
    """One SVG file: the overview, then every repeated block beside it; light or dark as the viewer prefers."""
    pictures = [framed(block_picture(drawing, block), drawing, block) for block in cards(drawing)]
    main = overview(drawing)
    parts = [f'<g transform="translate(24 24)">{picture_svg(main, tips=True)}</g>']
    x, height = 24 + main.width + COLUMN_GAP, main.height
    for text, width, tall in pictures:
        parts.append(f'<g transform="translate({x:.1f} 24)">{text}</g>')
        x += width + 24
        height = max(height, tall)
    width = x if pictures else main.width + 48
    dark = "".join(f"  {line}\n" for line in (*drawing_css(1).splitlines(), ".drawing .page{fill:#14161b}"))
    style = (
        f"{TEXT_CSS}.drawing .page{{fill:#fafaf8}}\n{drawing_css(0)}@media (prefers-color-scheme:dark){{\n{dark}}}\n"
    )
    size = f'width="{width:.0f}" height="{height + 48:.0f}" viewBox="0 0 {width:.0f} {height + 48:.0f}"'
    name = escape(drawing.plan.source.name)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" {size} role="img">\n<title>{name}</title>\n'
        f'<style>\n{style}</style>\n<rect class="page" width="100%" height="100%"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def framed(picture: Picture, drawing: Drawing, block: int, tips: bool = True) -> tuple[str, float, float]:
    """A block's picture in a frame with its title; the text, its width and its height."""
    width, height = picture.width + 2 * FRAME_PAD, picture.height + FRAME_HEAD + FRAME_PAD
    layers = sorted({layer for s in drawing.sections if s.block == block for layer in s.layers})
    count = f"{len(layers)} layers" if len(layers) > 1 else "layer"
    text = (
        f'<rect class="frame" width="{width:.1f}" height="{height:.1f}" rx="14"/>'
        f"{_badge(cards(drawing)[block], 28, 25)}"
        f'<text class="big" x="48" y="30">{escape(picture.title.split(".")[0])}</text>'
        f'<text class="mono soft" text-anchor="end" x="{width - 20:.1f}" y="30">{count} {layers_text(layers)}</text>'
        f'<g transform="translate({FRAME_PAD} {FRAME_HEAD})">{picture_svg(picture, tips)}</g>'
    )
    return text, width, height


def picture_svg(picture: Picture, tips: bool = False) -> str:
    """The elements of one picture; ``tips`` adds titles that viewers show on hover."""
    parts = [_group_svg(group) for group in picture.groups]
    parts += [_line_svg(line, picture) for line in picture.lines]
    parts += [_box_svg(box, number, tips) for number, box in enumerate(picture.boxes)]
    return "\n".join(parts)


def _group_svg(group: Group) -> str:
    x, y, width, height = group.area
    label = (
        f'<text class="mono soft" text-anchor="middle" transform="translate({x + 15:.1f} {y + height / 2:.1f}) '
        f'rotate(-90)">{escape(group.label)}</text>'
    )
    if group.kind == "bracket":
        return f'<path class="edge" d="M{x + width:.1f} {y:.1f}h-4v{height:.1f}h4"/>{label}'
    return f'<rect class="group" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="10"/>{label}'


def _line_svg(line: Line, picture: Picture) -> str:
    """Right angles with round corners, an arrow head at the end."""
    points = [*line.points[:-1], (line.points[-1][0], line.points[-1][1] - 5)]
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (ax, ay), (x, y), (bx, by) in zip(points, points[1:], points[2:], strict=False):
        before, after = abs(x - ax) + abs(y - ay), abs(bx - x) + abs(by - y)
        if before and after and (ax == x) != (x == bx):
            r = min(CORNER, before / 2, after / 2)
            into, out = (
                (x - (x - ax) / before * r, y - (y - ay) / before * r),
                (x + (bx - x) / after * r, y + (by - y) / after * r),
            )
            path += f"L{into[0]:.1f} {into[1]:.1f}Q{x:.1f} {y:.1f} {out[0]:.1f} {out[1]:.1f}"
    x, y = points[-1]
    path += f"L{x:.1f} {y:.1f}"
    ends = [picture.boxes[end] for end in (line.source, line.target)]
    data = "".join(f' data-{side}="{_key(box)}"' for side, box in zip("ab", ends, strict=True) if _key(box))
    kind = "edge cache" if line.cache else "edge"
    arrow = f'<path class="arrow" d="M{x - 3.5:.1f} {y - 1:.1f}h7l-3.5 6z"/>'
    return f'<g class="link"{data}><path class="{kind}" d="{path}"/>{arrow}</g>'


def _key(box: Box) -> str:
    """What links and the page call a box: ``n4`` an op, ``s1`` a section."""
    return f"n{box.node}" if box.node is not None else f"s{box.section}" if box.section is not None else ""


def _box_svg(box: Box, number: int, tips: bool) -> str:
    x, y = box.at
    width, height = box.size
    tip = f"<title>{escape(box.tip)}</title>" if tips and box.tip else ""
    frame = f'width="{width:.1f}" height="{height:.1f}"'
    start = f'transform="translate({x:.1f} {y:.1f})">{tip}'
    if box.kind == "pill":
        label = f'<text class="mono soft" text-anchor="middle" x="{width / 2:.1f}" y="17">{escape(box.title)}</text>'
        return f'<g class="pill" {start}<rect class="box" {frame} rx="13"/>{label}</g>'
    key = f'data-key={quoteattr(_key(box))} tabindex="0" role="button" aria-label={quoteattr(box.tip)}'
    if box.kind == "card":
        stack = (
            "".join(f'<rect class="shade" x="{d}" y="{d}" {frame} rx="10"/>' for d in (8, 4))
            if "×" in box.title
            else ""
        )
        return (
            f'<g class="card" {key} {start}{stack}<rect class="box" {frame} rx="10"/>'
            f'<text class="big" x="16" y="24">{escape(box.title)}</text>'
            f'<text class="mono soft" x="16" y="43">{escape(box.detail)}</text>{_badge(box.corner, width - 24, 20)}</g>'
        )
    return (
        f'<g class="op c-{box.category}" {key} {start}<rect class="box" {frame} rx="8"/>'
        f'<rect class="bar" x="0" y="8" width="3.5" height="{height - 16:.0f}" rx="1.75"/>'
        f'<text x="14" y="16">{escape(box.title)}</text>'
        f'<text class="mono soft" text-anchor="end" x="{width - 10:.1f}" y="16">{escape(box.corner)}</text>'
        f'<text class="mono soft" x="14" y="32">{escape(box.detail)}</text></g>'
    )


def _badge(text: str, x: float, y: float) -> str:
    return (
        f'<circle class="badge" cx="{x:.1f}" cy="{y:.1f}" r="11"/>'
        f'<text class="mono badge-text" text-anchor="middle" x="{x:.1f}" y="{y + 4.2:.1f}">{escape(text)}</text>'
    )
