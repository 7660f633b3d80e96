"""How far something is, also where no terminal shows a bar: in a line at once, and every 30 s."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.progress import track as draw_bar

Item = TypeVar("Item")
EVERY = 30.0  # seconds


class Progress:
    """Says where something stands, but not more often than is worth reading."""

    def __init__(
        self, what: str, total: int, say: Callable[[str], None] | None = None, first: int = 0
    ) -> None:
        """
        Args:
            what: such as "step"; a line reads "step 3/40 · 00:01:10 left".
            say: where the lines go; stdout if None.
            first: where it begins.
        """
        self.what, self.total, self.first = what, total, first
        self.say = say or (lambda text: print(text, flush=True))
        self.began = self.said = time.monotonic()
        self.last = -1  # what was said last

    def at(self, done: int) -> None:
        """Say it if nothing was said for two thirds of EVERY: the next chance may be late."""
        if time.monotonic() - self.said >= 2 / 3 * EVERY:
            self.tell(done)

    def tell(self, done: int) -> None:
        """Say it in any case."""
        self.said, self.last = time.monotonic(), done
        left = ""
        if self.first < done < self.total:
            seconds = (self.said - self.began) / (done - self.first) * (self.total - done)
            left = f" · {duration(seconds)} left"
        self.say(f"{self.what} {done}/{self.total}{left}")


def track(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """The items, with a bar in a terminal and lines elsewhere."""
    if sys.stdout.isatty():
        yield from draw_bar(items, what, total)
        return
    progress, done = Progress(what, total), 0
    progress.tell(0)
    for done, item in enumerate(items, 1):
        yield item
        progress.at(done)
    if done != progress.last:
        progress.tell(done)


def follow(
    items: Iterable[Item],
    what: str,
    total: int,
    say: Callable[[str], None] | None = None,
    count: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Item]:
    """The items, with lines only if they take long; ``count`` is what one counts for."""
    progress, done = Progress(what, total, say), 0
    for item in items:
        yield item
        done += count(item)
        progress.at(done)


def duration(seconds: float) -> str:
    """Such as 03:04:05, or 2 d 03:04:05."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d " * (days > 0) + f"{hours:02d}:{minutes:02d}:{rest:02d}"
