"""Tables for a terminal: 80 columns where nothing says otherwise, and no number broken in two."""

import textwrap
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

LABEL = 16  # characters that a column of words keeps, or its longest cell
GAP = 3  # characters between two columns
HEAD = 10  # characters that a head may be wider than its column


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
    numbers, first = list(range(words, len(head))), True
    while numbers or first:
        count = len(numbers)
        while count > 1 and _least(head, rows, words, numbers[:count]) > console.width:
            count -= 1
        table = _table(head, rows, words, numbers[:count])
        if first:
            table.title = title
        numbers, first = numbers[count:], False
        if not numbers:
            table.caption = caption or None
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
