"""Curves as SVG that takes its colors from the page: a smoothed line in a band of its spread, on logarithmic axes."""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 440, 260  # of a figure, in CSS pixels before it is scaled to its column
BANDWIDTH = 0.1  # of the smoothing, in units of log(step): a tenth of what has been trained so far
POINTS = 240  # at most, of a smoothed curve
INK, GRID = "#010203", "#040506"  # stand for colors of the page; those of runs are #0a0a00, #0a0a01, ...
NAMES = {INK: "var(--ink)", GRID: "var(--grid)"} | {f"#0a0a{n:02x}": f"var(--c{n})" for n in range(8)}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Values over steps; `smooth` draws a line in a band, `points` a line through dots, `dashes` a dashed line."""

    steps: Sequence[float]
    values: Sequence[float]
    color: int
    style: Literal["smooth", "points", "dashes"] = "points"
    opacity: float = 1.0


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: int
    kind: Literal["resumed", "stopped", "spike"]
    color: int


def smooth(steps: Floats, values: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Return steps, the local mean there, and the band of one standard deviation below and above.

    The weights are Gaussian in log(step). Positive values are averaged in their logarithm, as they are drawn, so that
    the band stays positive.
    """
    positive = bool((values > 0).all())
    x, y = np.log(steps), np.log(values) if positive else values
    at = np.unique(np.linspace(0, len(x) - 1, POINTS).round().astype(int)) if len(x) > POINTS else np.arange(len(x))
    weights = np.exp(-0.5 * ((x[at, None] - x[None, :]) / BANDWIDTH) ** 2)
    weights /= weights.sum(1, keepdims=True)
    mean = weights @ y
    deviation = np.sqrt(np.maximum(0, (weights * (y[None, :] - mean[:, None]) ** 2).sum(1)))
    three = (mean, mean - deviation, mean + deviation)
    low_mid_high = [np.exp(each) for each in three] if positive else list(three)
    return steps[at], low_mid_high[0], low_mid_high[1], low_mid_high[2]


def draw(name: str, curves: Sequence[Curve], marks: Sequence[Mark] = (), *, x: str = "step", y: str = "") -> str:
    """Return an SVG of the curves; `name` makes its ids unique in the page. A step of 0 is drawn at the left edge."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 11,
             "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "xtick.color": INK,
             "ytick.color": INK, "text.parse_math": False, "path.simplify": True}  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        axes = figure.add_subplot()
        first = min((step for curve in curves for step in curve.steps if step > 0), default=1.0)
        for curve in curves:
            _add(axes, curve, 0.8 * first)
        for mark in marks:
            if mark.step > 0:
                line = {"resumed": ":", "stopped": "-", "spike": "-."}[mark.kind]
                axes.axvline(mark.step, color=_color(mark.color), linestyle=line, linewidth=1, alpha=0.7)
        axes.set_xscale("log")
        if all(value > 0 for curve in curves for value in curve.values):
            axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            _plain_numbers(axis)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set(xlabel=x, ylabel=y)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        file = io.StringIO()
        canvas: Any = FigureCanvasSVG(figure)  # untyped
        canvas.print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(file.getvalue(), name)


def _add(axes: Any, curve: Curve, left: float) -> None:
    steps, values = np.maximum(np.asarray(curve.steps, float), left), np.asarray(curve.values, float)
    color = _color(curve.color)
    if curve.style == "smooth":
        steps, mean, low, high = smooth(steps, values)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, mean, color=color, linewidth=1.6)
    elif curve.style == "points":
        axes.plot(steps, values, color=color, linewidth=1.2, marker="o", markersize=3.5, alpha=curve.opacity)
    else:
        axes.plot(steps, values, color=color, linewidth=1, linestyle="--", alpha=curve.opacity)


def _plain_numbers(axis: Any) -> None:
    """Write 0.05 and 2000 rather than powers of ten, and name a few values between the powers if there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:.4g}")
    if axis.get_scale() != "log":
        return
    low, high = sorted(axis.get_view_interval())
    axis.set_major_formatter(plain)
    if high / max(low, 1e-300) < 30:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 3 else tuple(range(1, 10))))
        axis.set_minor_formatter(NullFormatter() if high / low > 1.5 else plain)
    else:
        axis.set_minor_formatter(NullFormatter())


def _color(index: int) -> str:
    return f"#0a0a{index % 8:02x}"


def _for_page(svg: str, name: str) -> str:
    """Strip what only a file of its own needs; make colors those of the page and ids unique in it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg[^>]*viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{name}">', svg)
    used = set(re.findall(r'(?:#|href="#)([\w-]+)', svg))
    svg = re.sub(r' id="([\w-]+)"', lambda found: found[0] if found[1] in used else "", svg)
    prefix = "s" + hashlib.sha256(name.encode()).hexdigest()[:8]
    svg = re.sub(r'( id="|url\(#|href="#)([\w-]+)', rf"\1{prefix}-\2", svg)
    return re.sub(r"#0[14a][0a][25a][0-9a-f]{2}", lambda found: NAMES.get(found[0], found[0]), svg)
