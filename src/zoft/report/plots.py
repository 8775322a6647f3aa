"""Plots: curves as inline SVG for the page, and comparisons saved to a file.

matplotlib takes long to import, so only the functions that draw do it.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError

from .run import Record, series
from .text import SHARES, score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins for the page's colours, which differ in light and dark: `_inline_svg` puts its variables in their place.
INK, MUTED, RULE, ACCENT = "#010101", "#020202", "#030303", "#040404"
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", ACCENT: "var(--accent)"}

Point = tuple[float, float, float]
"""Forwards, seconds, and the value there."""

SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "zoft"}


def loss_curve(lines: list[Record]) -> str:
    """SVG of the training loss against forwards, thin, and its running median, thick. Empty without a loss."""
    forwards, losses = series(lines, "loss")
    if not losses:
        return ""
    figure, axes = _page_figure()
    lone = "o" if len(losses) == 1 else None
    axes.plot(forwards, losses, color=ACCENT, linewidth=0.7, alpha=0.5, marker=lone)
    axes.plot(forwards, running_median(losses), color=ACCENT, linewidth=2)
    return _inline_svg(figure, "loss")


def metric_curve(lines: list[Record], metric: str) -> str:
    """SVG of the evaluated metric against forwards, its start and its best marked. Empty without an evaluation."""
    from matplotlib.ticker import FuncFormatter

    forwards, values = series(lines, f"eval_{metric}")
    if not values:
        return ""
    figure, axes = _page_figure()
    if metric in SHARES:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    axes.plot(forwards, values, color=ACCENT, linewidth=2, marker="o", markersize=4)
    axes.axhline(values[0], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    best = max(values)
    label = "start" if best > values[0] else "start, the best"
    axes.annotate(
        f"{label} {score(metric, values[0])}",
        (1, values[0]),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=MUTED,
    )
    if best > values[0]:
        place = forwards[values.index(best)]
        axes.plot(place, best, marker="o", markersize=9, markerfacecolor="none", markeredgecolor=INK)
        late = place > (forwards[0] + forwards[-1]) / 2
        axes.annotate(
            f"best {score(metric, best)}",
            (place, best),
            xytext=(4 if late else -4, 8),
            textcoords="offset points",
            ha="right" if late else "left",
            va="bottom",
            color=INK,
            fontweight="bold",
        )
    axes.margins(y=0.18)
    return _inline_svg(figure, "metric")


def running_median(values: list[float]) -> list[float]:
    """The median of the values around each one, a tenth of all on either side."""
    half = len(values) // 10
    return [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def save_comparison(path: str | Path, rows: list[dict[str, Any]], title: str = "") -> None:
    """Save the plot of each method's measured cosine to the true gradient and of its prediction, on a log scale.

    A row has method, cosine_mean, cosine_sem, predicted_cosine and capture (the share of the gradient's energy in the
    method's subspace); the last two may be None. The figures stand beside each method, so that a mean that is not
    positive, which a log scale cannot show, is not lost.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", nonpositive="clip")
    for place, row in enumerate(rows):
        figures = f"{row['cosine_mean']:.3g} ± {row['cosine_sem']:.1g}"
        if row["capture"] is not None:
            figures += f", captures {100 * row['capture']:.3g}%"
        axes.text(1.02, place, figures, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    measured = [
        (row["cosine_mean"], place, row["cosine_sem"]) for place, row in enumerate(rows) if row["cosine_mean"] > 0
    ]
    if measured:
        means, places, errors = zip(*measured, strict=True)
        axes.errorbar(
            means, places, xerr=errors, fmt="o", color="#2457a6", capsize=3, label="measured, ± standard error"
        )
    predicted = [(row["predicted_cosine"], place) for place, row in enumerate(rows) if row["predicted_cosine"]]
    if predicted:
        axes.plot(*zip(*predicted, strict=True), "D", mfc="none", color="#b3402e", markersize=8, label="predicted")
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("cosine to the true gradient")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left")
    if measured or predicted:
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
    _save(figure, path)


def save_lines(
    path: str | Path, lines: dict[str, list[tuple[int, float]]], xlabel: str, ylabel: str, columns: int = 6
) -> None:
    """Save the plot of named lines through points of whole abscissas, their names in so many columns."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(lines.items()):
        across, values = [point[0] for point in points], [point[1] for point in points]
        style = "-" if number < 10 else "--"  # there are ten colours
        axes.plot(across, values, marker="o", markersize=3, linewidth=1.5, linestyle=style, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=columns, frameon=False)
    _save(figure, path)


def save_errors(path: str | Path, distances: list[float], errors: dict[str, list[float]], title: str = "") -> None:
    """Save the plot of the finite differences' error, relative to the slope, over their distance eps: a line each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for sides, values in errors.items():
        axes.loglog(distances, values, marker="o", markersize=3, linewidth=1.5, label=sides)
    axes.set_xlabel("eps")
    axes.set_ylabel("error / slope")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left")
    axes.legend(frameon=False)
    _save(figure, path)


def save_curves(path: str | Path, panels: dict[str, dict[str, list[Point]]]) -> None:
    """Save the plot of values against forwards and against seconds: a row of panels for each title, a line a method."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    methods = list(dict.fromkeys(method for panel in panels.values() for method in panel))
    colours = {method: f"C{number % 10}" for number, method in enumerate(methods)}
    figure = Figure(figsize=(9, 0.6 + 2.6 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 2, sharey="row", squeeze=False)
    for (title, panel), pair in zip(panels.items(), grid, strict=True):
        for axes, abscissa in zip(pair, (0, 1), strict=True):
            for method, points in panel.items():
                across, values = [point[abscissa] for point in points], [point[2] for point in points]
                axes.plot(across, values, marker="o", markersize=3, linewidth=1.5, color=colours[method])
            axes.set_xlabel(("forward passes", "seconds of training")[abscissa])
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        pair[0].set_title(title, loc="left")
    lines = [Line2D([], [], color=colour, marker="o", markersize=3) for colour in colours.values()]
    figure.legend(lines, methods, loc="outside upper left", ncols=5, frameon=False)
    _save(figure, path)


def _page_figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("forward passes", color=MUTED)
    axes.tick_params(color=RULE, labelcolor=MUTED)
    axes.locator_params(nbins=7)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    return figure, axes


def _inline_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for an HTML page, its ids begun with `name`, its colours the page's."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context(SVG):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (xmlns(:\w+)?|width|height)="[^"]*"', "", svg, count=4)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for stand_in, variable in THEME.items():
        svg = svg.replace(stand_in, variable)
    return svg


def _save(figure: Figure, path: str | Path) -> None:
    from matplotlib import rc_context

    path = Path(path)
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in known:
        raise UserError(f"cannot save a plot as {path.name}; end the name in one of {', '.join(sorted(known))}")
    with rc_context(SVG):
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
