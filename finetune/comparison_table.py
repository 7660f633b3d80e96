"""What a comparison shows: a table with a function for each column, and its plot."""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from finetune.average_precision import PROPOSALS
from finetune.comparison import ONE_CLICK, PROMPTS, Row
from finetune.measures import TRIVIAL
from sami.core.plots import line_style, new_figure, plain, widen
from sami.core.tables import NONE, WITHOUT, interval, percent

Measured = dict[str, Any]  # what comparison.compute_row gives


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        head: its head, with the unit.
        cell: of a row that was measured.
        paper: key of ``Row.paper`` under which papers' numbers stand; empty where they have none.
        trivial: the cell of what needs no model, from any row that was measured.
    """

    head: str
    cell: Callable[[Measured], str]
    paper: str = ""
    trivial: Callable[[Measured], str] = lambda one: NONE

    def theirs(self, row: Row) -> str:
        """The cell of a row's paper."""
        return f"{row.paper[self.paper]:g}" if self.paper in row.paper else NONE


def columns_of(measured: list[Measured], reference: str | None) -> list[Column]:
    """The columns that rows have.

    Args:
        measured: the rows with numbers.
        reference: name of the row whose masks the others' are compared with.
    """
    columns = [
        Column("parameters, M", lambda one: f"{one['parameters'] / 1e6:.3g}", "parameters"),
        Column("encoder, GMAC", lambda one: f"{one['encoder_macs'] / 1e9:.3g}"),
        Column("encoder, ms", lambda one: f"{one['encoder_ms']:.1f}", "latency"),
        Column("decoder, ms", lambda one: f"{one['decoder_ms']:.1f}"),
        Column("images/s", lambda one: f"{one['images_per_second']:.1f} (batch {one['batch']})"),
        Column("peak memory, GB", lambda one: gigabytes(one["peak_memory_gb"])),
    ]
    prompts = dict.fromkeys(info["prompt"] for one in measured for info in one["miou"])
    for name in prompts or PROMPTS:  # without a row, those of papers
        columns.append(
            Column(
                f"mIoU by {name}, %",
                lambda one, name=name: miou_cell(one, name),
                name if name in PROMPTS else "",
                lambda one, name=name: trivial_cell(one, name),
            )
        )
    if reference is not None and any(ONE_CLICK in one.get("agreement", {}) for one in measured):
        columns.append(Column(f"agreement with {reference}, %", agreement_cell))
    for side in dict.fromkeys(side for one in measured for side in one["everything"]):
        columns.append(
            Column(
                f"everything {side}², ms",
                lambda one, side=side: f"{one['everything'][side]['ms']:.0f}",
            )
        )
    return columns + _columns_of_instances(measured) + _columns_of_proposals(measured)


def _columns_of_instances(measured: list[Measured]) -> list[Column]:
    """AP of masks for a detector's boxes, and of their outlines."""
    kinds = {"segm": "AP by boxes, %", "boundary": "boundary AP by boxes, %"}
    return [
        Column(
            head,
            lambda one, kind=kind: _ap_cell(one["instances"]["rows"], kind),
            trivial=lambda one, kind=kind: percent(one["instances"]["rows"][1][kind]["AP"]),
        )
        for kind, head in kinds.items()
        if any("instances" in one for one in measured)
    ]


def _ap_cell(rows: list[dict[str, Any]], kind: str) -> str:
    """AP; marked where it is not above the filled boxes'."""
    ours, trivial = (row[kind]["AP"] for row in rows)
    return percent(ours) + " ↓" * (ours is not None and ours <= trivial)


def _columns_of_proposals(measured: list[Measured]) -> list[Column]:
    """AR of all masks of an image, and of their boxes."""
    return [
        Column(
            f"{name} of {words}, %",
            lambda one, key=key: _ar_cell(one["proposals"]["rows"], *key),
            trivial=lambda one, key=key: interval(one["proposals"]["rows"][1][key[0]][key[1]]),
        )
        for kind, words in (("segm", "masks"), ("bbox", "boxes"))
        for name in (f"AR@{most}" for most in PROPOSALS)
        for key in [(kind, name)]
        if any("proposals" in one for one in measured)
    ]


def _ar_cell(rows: list[dict[str, Any]], kind: str, name: str) -> str:
    """AR with its interval; marked where it is not above a grid of boxes'."""
    ours, trivial = (row[kind][name] for row in rows)
    known = ours["mean"] is not None
    return interval(ours) + " ↓" * (known and ours["mean"] <= trivial["mean"])


def table(
    rows: list[Row], found: list[Measured | None], reference: str | None
) -> tuple[list[str], list[list[str]]]:
    """Head, and a line for each row, one for its paper's numbers, and last what needs no model.

    Args:
        found: what was measured of each row; None without weights.
        reference: as :func:`columns_of` has it.
    """
    measured = [one for one in found if one]
    columns = columns_of(measured, reference)
    lines = []
    for row, one in zip(rows, found, strict=True):
        if one:
            lines.append([row.name, *(column.cell(one) for column in columns)])
        else:
            lines.append([f"{row.name} (no weights)", *[NONE] * len(columns)])
        if row.paper:
            source = row.paper.get("source", "its paper")
            lines.append([f"  theirs: {source}", *(column.theirs(row) for column in columns)])
    if measured:  # the same for all rows
        lines.append([WITHOUT, *(column.trivial(measured[0]) for column in columns)])
    return ["model", *(column.head for column in columns)], lines


def gigabytes(value: float | None) -> str:
    """Memory with two significant digits."""
    return NONE if value is None else f"{value:.2g}"


def miou_of(one: Measured, prompt: str) -> dict[str, dict[str, Any]]:
    """Mean and interval over all objects by choice, of one kind of prompt."""
    return {info["choice"]: info["miou"]["all"] for info in one["miou"] if info["prompt"] == prompt}


def miou_cell(one: Measured, prompt: str) -> str:
    """mIoU with its interval; marked where it is not above what needs no model."""
    by_choice = miou_of(one, prompt)
    if "predicted" not in by_choice:
        return NONE
    trivial = next((info for name, info in by_choice.items() if name in TRIVIAL), None)
    below = trivial is not None and by_choice["predicted"]["mean"] <= trivial["mean"]
    return interval(by_choice["predicted"]) + " ↓" * below


def trivial_cell(one: Measured, prompt: str) -> str:
    """mIoU of what needs no model."""
    found = (info for name, info in miou_of(one, prompt).items() if name in TRIVIAL)
    return next(map(interval, found), NONE)


def agreement_cell(one: Measured) -> str:
    """IoU with the reference's masks by one click."""
    shared = one.get("agreement", {}).get(ONE_CLICK)
    return interval(shared) if shared else NONE


def draw(rows: list[Row], found: list[Measured | None], device: str) -> Figure:
    """Latency of an image with one click against mIoU by one click.

    Papers' numbers are grey, and labelled as theirs.

    Args:
        device: what was measured on, for the axis.
    """
    figure = new_figure(8, 5)
    axis = figure.subplots()
    labels: list[tuple[float, float, str, str]] = []  # x, y, words, colour
    for number, (row, one) in enumerate(zip(rows, found, strict=True)):
        info = miou_of(one, ONE_CLICK).get("predicted") if one else None
        if info is not None:
            x = one["encoder_ms"] + one["decoder_ms"]
            y, low, high = (100 * info[name] for name in ("mean", "low", "high"))
            style = line_style(number) | {"linestyle": "", "capsize": 3}
            # An interval of resampled means need not hold the mean itself.
            axis.errorbar(x, y, [[max(y - low, 0)], [max(high - y, 0)]], **style)
            labels.append((x, y, plain(row.name), style["color"]))
        if {"latency", ONE_CLICK} <= row.paper.keys():
            x, y = row.paper["latency"], row.paper[ONE_CLICK]
            axis.plot(x, y, marker="o", color="0.6", linestyle="")
            labels.append((x, y, f"{plain(row.name)}, theirs", "0.4"))
    axis.set_xscale("log")
    axis.margins(0.08)
    widen(axis, 5, 0, 100)
    low, high = axis.get_xlim()
    missing = max(1.0, 2 * low / high) ** 0.5  # a factor of two at least
    axis.set_xlim(low / missing, high * missing)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    for label in labels:
        _annotate(axis, *label)
    axis.set_xlabel(f"ms an image and a click, {device}; grey: the papers' machines")
    axis.set_ylabel("mIoU by 1 click, % (95 % interval)")
    return figure


def _annotate(axis: Axes, x: float, y: float, words: str, colour: str) -> None:
    """Words beside a point, on the side of the middle: there is room for them."""
    low, high = map(math.log, axis.get_xlim())
    right = math.log(x) > (low + high) / 2
    axis.annotate(
        textwrap.fill(words, 40),
        (x, y),
        (-7 if right else 7, 7),
        textcoords="offset points",
        ha="right" if right else "left",
        color=colour,
    )
