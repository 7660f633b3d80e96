"""What tables show, and how: settings over seeds, paired differences, a terminal's columns.

A terminal's table has 80 columns where nothing says otherwise, and no number broken in two.
"""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.special import stdtrit

LABEL = 16  # characters that a column of words keeps, or its longest cell
GAP = 3  # characters between two columns
HEAD = 10  # characters that a head may be wider than its column
WITHOUT = "without a model"
NONE = "–"  # a cell without a number


def show_table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    words: int = 1,
) -> None:
    """Print a table as wide as the terminal (``COLUMNS``; 80 where there is none).

    Columns that do not fit stand below, in a table of their own under the same words.

    Args:
        words: how many columns, the first ones, are words: wrapped where they must be. The others
            are numbers and stay whole.
    """
    console = Console(markup=False, highlight=False, emoji=False)
    numbers = list(range(words, len(head)))
    while numbers or title:
        count = len(numbers)
        while count > 1 and _least(head, rows, words, numbers[:count]) > console.width:
            count -= 1
        table = _table(head, rows, words, numbers[:count])
        table.title, title = title or None, ""
        numbers = numbers[count:]
        table.caption = None if numbers else caption or None
        console.print(table)


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], words: int, numbers: list[int]
) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
    )
    for name in head[:words]:
        table.add_column(name, overflow="fold")
    for place in numbers:
        lines, width = _number(head, rows, place)
        table.add_column("\n".join(lines), justify="right", width=width)
    for row in rows:
        table.add_row(*row[:words], *(row[place] for place in numbers))
    return table


def _number(
    head: Sequence[str], rows: Sequence[Sequence[str]], place: int
) -> tuple[list[str], int]:
    """The head of a column of numbers, in lines, and its width."""
    longest = max((len(row[place]) for row in rows), default=0)
    lines = textwrap.wrap(head[place], max(longest, HEAD), break_long_words=False)
    return lines, max([longest, *map(len, lines)])


def _least(
    head: Sequence[str], rows: Sequence[Sequence[str]], words: int, numbers: list[int]
) -> int:
    """The width of a table whose words have no more than ``LABEL`` characters each."""
    longest = [max(len(row[place]) for row in [head, *rows]) for place in range(words)]
    widths = [min(LABEL, one) for one in longest]
    widths += [_number(head, rows, place)[1] for place in numbers]
    return sum(widths) + GAP * (len(widths) - 1) + 2


def percent(value: float | None) -> str:
    """A share as tables have it, in %."""
    return "-" if value is None else f"{100 * value:.1f}"


def interval(info: dict[str, Any]) -> str:
    """A "mean" with its interval, "low" to "high", in %."""
    return f"{percent(info['mean'])} ({percent(info['low'])}-{percent(info['high'])})"


# -- what runs scored ---------------------------------------------------------------------------


@dataclass
class Results:
    """What settings scored, over seeds: a table, its plot, and what differences allow to say.

    Attributes:
        seeds: how many a setting has that is whole.
        units: by measure, its name with the unit, in which "%" tells a score.
        rows: "setting", "against" (the one that it is compared with) and "measures": by name
            "by_seed" (None where it is missing), "mean", "std", "paper" (the paper's own number)
            and "trivial" (the score that needs no model).
        paper_on: the data set that the paper's numbers are of.
        command: that made this.
    """

    name: str
    seeds: int
    units: dict[str, str]
    rows: list[dict[str, Any]]
    paper_on: str | None = None
    command: str = ""

    @property
    def title(self) -> str:
        if self.seeds == 1:
            return f"{self.name}: one seed, so that differences may be chance"
        return f"{self.name}: mean ± standard deviation over {self.seeds} seeds"

    def measures(self, name: str) -> list[dict[str, Any]]:
        """A measure of every setting."""
        return [row["measures"][name] for row in self.rows]

    def on_paper(self) -> set[str]:
        """The measures that the paper has a number for."""
        return {name for name in self.units if any(one["paper"] for one in self.measures(name))}

    def trivial(self, name: str) -> float | None:
        """What scores without a model."""
        rows = (one["trivial"] for one in self.measures(name))
        return next((value for value in rows if value is not None), None)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows; the last one, where there are any, what scores without a model."""
        on_paper = self.on_paper()
        head, last = ["setting"], [WITHOUT]
        body = [[row["setting"]] for row in self.rows]
        for name, unit in self.units.items():
            trivial = self.trivial(name)
            head.append(unit)
            last.append(NONE if trivial is None else f"{trivial:.4g}")
            for cells, info in zip(body, self.measures(name), strict=True):
                cells.append(_cell(info))
            if name in on_paper:
                head.append(f"{name}, paper, {self.paper_on}")
                last.append(NONE)
                for cells, info in zip(body, self.measures(name), strict=True):
                    cells.append(NONE if info["paper"] is None else f"{info['paper']:g}")
        return head, body + [last] * any(self.trivial(name) is not None for name in self.units)

    def markdown(self) -> str:
        head, body = self.table()
        rows = [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body]]
        said = [f"- {line}" for line in self.conclusions()]
        return "\n".join([self.title, "", *rows, *[""] * bool(said), *said]) + "\n"

    def to_json(self, command: str) -> str:
        return json.dumps(asdict(self) | {"command": command}, indent=1) + "\n"

    def differences(self) -> list[dict[str, Any]]:
        """Of each setting from the one that it is compared with, by score (:func:`paired`)."""
        found, rows = [], {row["setting"]: row for row in self.rows}
        for row in self.rows:
            against = rows.get(row["against"])
            for name, unit in self.units.items() if against is not None else ():
                first, second = against["measures"][name], row["measures"][name]
                pairs = zip(first["by_seed"].values(), second["by_seed"].values(), strict=True)
                values = [a - b for a, b in pairs if None not in (a, b)]
                if "%" in unit and values:
                    info = {"first": row["against"], "other": row["setting"], "measure": name}
                    info |= paired(values)
                    means, trivial = (first["mean"], second["mean"]), self.trivial(name)
                    info["verdict"] = verdict(info, row["against"], *means, trivial)
                    found.append(info)
        return found

    def conclusions(self) -> list[str]:
        """A sentence on each difference, with what it rests on."""
        found = []
        for one in self.differences():
            seeds, span = len(one["by_seed"]), ""
            if one["low"] is not None:
                span = f", 95 % interval {one['low']:+.1f} to {one['high']:+.1f}"
            found.append(
                f"{one['measure']}, {one['first']} against {one['other']}: {one['mean']:+.1f} "
                f"points{span}, ahead in {one['ahead']} of {seeds} seed{'s' * (seeds > 1)}: "
                f"{one['verdict']}"
            )
        return found


def _cell(info: dict[str, Any]) -> str:
    """Mean and deviation of a measure, and how many seeds it lacks."""
    if info["mean"] is None:
        return NONE
    values = info["by_seed"].values()
    there = sum(value is not None for value in values)
    spread = f" ± {info['std']:.3g}" if info["std"] is not None else ""
    lacking = f" ({there} of {len(values)})" if there < len(values) else ""
    return f"{info['mean']:.4g}{spread}{lacking}"


def paired(values: list[float]) -> dict[str, Any]:
    """What differences of two runs each, one for each seed, say together.

    ``low`` and ``high`` bound the 95 % interval of the mean by Student's t; None for a single seed,
    which has none. ``ahead``: in how many seeds the first was better.
    """
    mean, low, high = float(np.mean(values)), None, None
    if len(values) > 1:
        half = stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / len(values) ** 0.5
        low, high = float(mean - half), float(mean + half)
    ahead = sum(value > 0 for value in values)
    return {"by_seed": values, "mean": mean, "low": low, "high": high, "ahead": ahead}


def verdict(
    info: dict[str, Any], name: str, first: float, second: float, trivial: float | None
) -> str:
    """What a paired difference (:func:`paired`) of a setting and another allows to say; no more.

    Args:
        name: of the first setting.
        first, second: the means that are compared.
        trivial: the score that needs no model.
    """
    seeds = len(info["by_seed"])
    if trivial is not None and max(first, second) <= trivial:
        return "no conclusion: both are below the answer that needs no model"
    if seeds == 1:
        return "no conclusion from one seed"
    if info["low"] > 0:
        return f"{name} is ahead"
    if info["high"] < 0:
        return f"{name} is behind"
    return f"no conclusion from {seeds} seeds: the interval holds 0"
