"""How every figure looks: colours of objects, of lines, axes, and a PNG that is there or is not."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from sami.core.tables import WITHOUT, Results

# Of objects over a photograph: saturated, and neighbours differ in lightness too, which helps those
# who do not tell hues apart.
OBJECTS = (
    *("#f5182d", "#00b3ff", "#ffd500", "#b23cff", "#00d060", "#ff8000"),
    *("#0038d0", "#ff3ddb", "#00e5d0", "#b30047", "#a6f000", "#00707a"),
)
# Of lines on white: Okabe and Ito's, which the colour-blind can tell apart, without its yellow.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9")
MARKERS = "osD^vPX"


def object_colour(number: int) -> str:
    """The colour of an image's object, the same in all its panels."""
    return OBJECTS[number % len(OBJECTS)]


def line_style(number: int) -> dict[str, str]:
    """Colour, marker and dashes of a line: 7 x 7 x 4 of them differ."""
    turn = number // len(LINES)
    return {
        "color": LINES[number % len(LINES)],
        "marker": MARKERS[(number + turn) % len(MARKERS)],
        "linestyle": ("-", "--", "-.", ":")[turn % 4],
    }


def ink_on(colour: str) -> str:
    """Black or white, whichever is read on a colour."""
    return "black" if np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) > 0.5 else "white"


def plain(text: str) -> str:
    """A name as a figure shows it: no dollar begins a formula, bytes that are no text are ?."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def integer_steps(axis: Axes) -> None:
    """Ticks of the horizontal axis at whole numbers, 20,000 and not 2e4."""
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def widen(axis: Axes, least: float, low: float | None = None, high: float | None = None) -> None:
    """Make the vertical axis span ``least`` at least, so that noise does not fill it.

    Args:
        low, high: what a value cannot pass; the axis ends there.
    """
    bottom, top = axis.get_ylim()
    missing = max(0.0, least - (top - bottom)) / 2
    bottom, top = bottom - missing, top + missing
    if low is not None and bottom < low:
        bottom, top = low, max(top, low + least)
    if high is not None and top > high:
        bottom, top = min(bottom, high - least), high
    axis.set_ylim(bottom, top)


def logarithmic(axis: Axes, least: float = 2.0) -> None:
    """A logarithmic vertical axis over a factor of ``least`` at least, with plain numbers."""
    axis.set_yscale("log")
    bottom, top = axis.get_ylim()
    missing = max(1.0, least / (top / bottom)) ** 0.5
    axis.set_ylim(bottom / missing, top * missing)
    wide = axis.get_ylim()[1] / axis.get_ylim()[0] > 20
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, handles: Iterable, names: list[str], columns: int) -> None:
    """One legend for all axes, under them."""
    if names:
        names, place = [plain(name) for name in names], "outside lower center"
        figure.legend(handles, names, loc=place, ncols=columns, frameon=False)


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path, dpi: int = 100) -> None:
    """Write a PNG aside and rename it: a half-written one is never met."""
    temporary = path.with_name(f".{path.name}.writing")
    figure.savefig(temporary, dpi=dpi, format="png")
    temporary.replace(path)


def results_figure(found: Results, axis: str = "", values: Sequence[Any] = ()) -> Figure:
    """A panel for each measure: each seed a dot, their mean with its deviation.

    Args:
        axis: what is varied, alone, if anything is.
        values: of it; numbers are drawn to scale.
    """
    numeric = len(values) == len(found.rows) and all(
        type(value) in (int, float) for value in values
    )
    places = list(values) if numeric else list(range(len(found.rows)))
    names = [plain(textwrap.fill(row["setting"], 24)) for row in found.rows]
    columns = min(3, len(found.units))
    lines = -(-len(found.units) // columns)
    width = max(4.6, 0.0 if numeric else 0.9 * len(found.rows))
    figure = new_figure(columns * width, lines * (3.6 if numeric else 4.4) + 0.8)
    handles: dict[str, Any] = {}
    for number, (name, unit) in enumerate(found.units.items()):
        axes = figure.add_subplot(lines, columns, number + 1)
        measured = list(zip(places, found.measures(name), strict=True))
        for place, info in measured:
            seeds = [value for value in info["by_seed"].values() if value is not None]
            (dots,) = axes.plot([place] * len(seeds), seeds, "o", color=LINES[0], alpha=0.4)
            handles["each seed"] = dots
        there = [(p, o["mean"], o["std"] or 0) for p, o in measured if o["mean"] is not None]
        if there:
            style = {"color": LINES[0], "capsize": 5, "linewidth": 1.5, "markersize": 14}
            style |= {"fmt": "_-" if numeric else "_"}  # no line between names
            handles["mean, bars: one standard deviation over seeds"] = axes.errorbar(
                *zip(*there, strict=True), **style
            )
        paper = [(place, info["paper"]) for place, info in measured if info["paper"]]
        if paper:
            (handles[f"the paper's, on {found.paper_on}"],) = axes.plot(
                *zip(*paper, strict=True), "s--" if numeric else "s", color=LINES[1]
            )
        for value in {info["trivial"] for _, info in measured} - {None}:
            handles[WITHOUT] = axes.axhline(value, color="#666666", linestyle=(0, (1, 1)))
        axes.set(title=plain(unit), ylabel=plain(unit))
        axes.margins(x=0.1)
        if "%" in unit:
            widen(axes, 5, 0, 100)
        elif there:
            widen(axes, 0.1 * max(abs(mean) for _, mean, _ in there))
        axes.grid(alpha=0.3)
        if numeric:
            axes.set_xlabel(plain(axis))
            if all(isinstance(place, int) for place in places):
                integer_steps(axes)
        else:
            axes.set_xticks(places, names, rotation=30, ha="right")
    figure.suptitle(f"{plain(found.name)}, {found.seeds} seed{'s' * (found.seeds > 1)}")
    legend_below(figure, handles.values(), list(handles), 2)
    return figure
