"""What is said to those who do not look at a terminal: soon, and every 30 seconds."""

import os
import re

import pytest

from sami.core import progress
from sami.core.progress import Progress, follow, track
from sami.core.run import RunConfig
from sami.pretrain import main
from tests.runs import arguments, write_shards


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def test_a_line_every_thirty_seconds_with_the_time_left(clock):
    told = []
    lines = Progress("step", 100, lambda text: told.append(text), first=40)
    for step in range(41, 45):
        clock(9)
        lines.at(step)
    assert told == ["step 43/100 · 00:08:33 left"]  # after 27 s: the next chance would be late
    clock(25)
    lines.at(45)
    assert told[1:] == ["step 45/100 · 00:11:11 left"]  # 61 s for 5 steps, 55 to come


def test_days(clock):
    told = []
    lines = Progress("step", 1_000_000, lambda text: told.append(text))
    clock(30)
    lines.at(100)
    assert told == ["step 100/1000000 · 3 d 11:19:30 left"]


def test_what_follows_something_speaks_only_if_it_is_long(clock):
    told = []
    for _ in follow(range(6), "held out", 12, told.append, count=lambda item: 2):
        clock(11)
    assert told[:2] == ["held out 4/12 · 00:00:44 left", "held out 8/12 · 00:00:22 left"]
    assert told[2:] == ["held out 12/12"]


def test_a_tools_progress_without_a_terminal(clock, capsys):
    for _ in track(range(4), "writing", 4):
        clock(15)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["writing 0/4", "writing 2/4 · 00:00:30 left", "writing 4/4"]


def test_a_tools_progress_in_a_terminal_is_a_bar(capsys, monkeypatch):
    bars = []

    def bar(items, what, total):
        bars.append((what, total))
        yield from items

    monkeypatch.setattr(progress, "draw_bar", bar)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert list(track(range(4), "writing", 4)) == [0, 1, 2, 3]
    assert bars == [("writing", 4)] and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "steps", "expected"),
    [
        (None, 1, 1),
        (None, 30, 1),
        (None, 200, 10),
        (None, 1000, 50),
        (None, 10**6, 50),
        (7, 20, 7),
    ],
)
def test_short_runs_are_logged_more_often(given, steps, expected):
    assert RunConfig(log_every=given).log_interval(steps) == expected


def test_a_run_says_how_far_it_is(tmp_path, in_process, monkeypatch):
    """Between the lines of metrics.jsonl too, within an evaluation, and of workers only once."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    shards = write_shards(tmp_path / "shards")
    held_out = write_shards(tmp_path / "val", (7,), seed=1)
    workers = len(os.sched_getaffinity(0)) + 1
    options = {"train.steps": 4, "run.log_every": 100, "data.workers": workers}
    options |= {"data.val_shards": held_out, "train.micro_batch_size": 4}
    code, error = in_process(main, arguments(tmp_path / "run", shards, **options))
    assert code == 0, error
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.count(f"data.workers {workers} are more than the {workers - 1} core(s)") == 1
    for step in (1, 2, 3):
        assert re.search(rf" step {step}/4 · \d\d:\d\d:\d\d left\n", text)
    assert " held out 7/7\n" in text and " step 4/4 · loss " in text
