"""What a service did under load as one HTML page without scripts: the figures, and plots of all answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from labinfer.bench.load import Sample, percentile

WIDTH, HEIGHT = 640.0, 240.0
LEFT, BOTTOM, TOP = 64.0, 24.0, 12.0
PERCENTS = (*range(100), 99.5, 99.9, 100)
BINS = 60

STYLE = """\
:root{color-scheme:light dark}
body{font:15px system-ui,sans-serif;max-width:760px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse}td{padding:.1em 1em .1em 0}td+td{text-align:right;font-variant-numeric:tabular-nums}
svg{width:100%;height:auto}text{font:12px system-ui,sans-serif;fill:currentColor}
line{stroke:currentColor;opacity:.25}polyline{fill:none;stroke:#3067d6;stroke-width:2}
"""


def load_report(found: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    """The page of the figures that ``load.summary`` has ``found``, and of the ``samples`` that they are of."""
    good = [each for each in samples if each.error is None]
    texts = {escape(name.replace("_", " ")): f"{value:,.2f}" for name, value in found.items()}
    rows = "".join(f"<tr><td>{name}</td><td>{text}</td></tr>" for name, text in texts.items())
    curves = {
        "Time to the first token (ms), by percent of answers": [each.first for each in good],
        "Time from piece to piece (ms), by percent of pieces": [gap for each in good for gap in each.gaps],
        "Time to the end (ms), by percent of answers": [each.total for each in good],
    }
    plots = [plot(title, quantiles(values)) for title, values in curves.items() if values]
    plots.append(plot("Pieces of answers a second, by seconds from the start", rates(good)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Load on a service</title>\n'
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">\n"""
        f"<style>\n{STYLE}</style></head>\n<body><h1>Load on a service</h1>\n<table>{rows}</table>\n"
        + "\n".join(plots)
        + "\n</body></html>\n"
    )


def quantiles(seconds: Sequence[float]) -> list[tuple[float, float]]:
    """Percents, and the ms that so many of ``seconds`` do not exceed."""
    return [(percent, 1000 * percentile(seconds, percent)) for percent in PERCENTS]


def rates(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """The middles of ``BINS`` equal spans of time in seconds, and the pieces a second that came in each."""
    start = min(each.asked for each in samples)
    times = [time - start for each in samples for time in each.times]
    span = max(times) / BINS
    counts = [0] * BINS
    for time in times:
        counts[min(int(time / span), BINS - 1)] += 1
    return [((number + 0.5) * span, count / span) for number, count in enumerate(counts)]


def plot(title: str, points: Sequence[tuple[float, float]]) -> str:
    """A line through ``points``, both axes from 0."""
    right, top = max(x for x, _ in points), max(y for _, y in points) or 1.0
    width, height = WIDTH - LEFT - 8, HEIGHT - TOP - BOTTOM
    line = " ".join(f"{LEFT + width * x / right:.1f},{TOP + height * (1 - y / top):.1f}" for x, y in points)
    ticks = []
    for part in (0, 0.25, 0.5, 0.75, 1):
        x, y = LEFT + width * part, TOP + height * (1 - part)
        ticks.append(f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        ticks.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * part:,.4g}</text>')
        ticks.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{right * part:.3g}</text>')
    size = f'viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(title)}"'
    return f'<h2>{escape(title)}</h2>\n<svg {size}>{"".join(ticks)}<polyline points="{line}"/></svg>'
