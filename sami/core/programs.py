"""Programs that are run to their end: output, requests to stop, locks between processes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from sami.core.config import require
from sami.core.exits import ASKED_TO_STOP, FINISHED
from sami.core.locks import try_lock
from sami.core.paths import exists

PROGRESS = re.compile(rb"[a-z ]+ \d+/\d+( |$)")  # lines of sami/core/progress.py, of any program


@contextlib.contextmanager
def stop_on_signal(stop: Path) -> Iterator[Path]:
    """Meanwhile a signal leaves a stop file; an old one is taken away."""
    stop.unlink(missing_ok=True)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {n: signal.signal(n, lambda number, frame: stop.touch()) for n in numbers}
    try:
        yield stop
    finally:
        stop.unlink(missing_ok=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def run_program(
    argv: list[str],
    stop: Path,
    folder: Path | None,
    log: Path | None = None,
    say: Callable[[str], None] = print,
    threads: int | None = None,
) -> tuple[int, str]:
    """Run a program to its end; its exit code, and the last sentence that it ended with an error.

    Args:
        argv: its command line.
        stop: once this file is there, the program is asked to stop, ...
        folder: ... a training run by the stop file in its folder, again and again, because one that
            is still starting takes an old stop file away; None: a program that is simply ended and
            starts anew the next time.
        log: file for its output; None: it goes where ours does.
        say: called with its lines of progress, where there is a log.
        threads: what it may compute with; None for what it takes by itself.
    """
    own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE if log else None,
        stderr=subprocess.STDOUT if log else subprocess.PIPE,
        env=os.environ | own,
    )
    sentences: list[str] = []

    def pass_on() -> None:
        with contextlib.ExitStack() as opened:
            output = opened.enter_context(process.stdout if log else process.stderr)
            file = opened.enter_context(log.open("ab", 0) if log else contextlib.nullcontext())
            for line in output:
                text = line.decode(errors="replace")
                if file is None:
                    sys.stderr.write(text)
                    sys.stderr.flush()
                else:
                    file.write(line)
                    if PROGRESS.match(line):
                        say(text.rstrip())
                found = re.match(r"(?:rank \d+: )?error: (.*)", text)
                sentences.extend([found[1]] if found else [])

    listener = threading.Thread(target=pass_on, daemon=True)
    listener.start()
    while True:
        try:
            code = process.wait(1)
            break
        except subprocess.TimeoutExpired:
            if exists(stop) and folder is None:
                process.terminate()
            elif exists(stop) and folder.is_dir():
                (folder / "stop").touch()
    listener.join(5)
    if folder is None and code != FINISHED and exists(stop):
        code = ASKED_TO_STOP
    return code, sentences[-1] if sentences else ""


@contextlib.contextmanager
def locked(path: Path, wait: Callable[[], bool] | None = None) -> Iterator[bool]:
    """Hold a lock file; yields whether it was had.

    Args:
        wait: called every time that another process has it: whether to go on waiting. None: it is
            an error.

    Raises:
        UserError: another process has it.
    """
    with path.open("ab") as file:
        held = try_lock(file) is not False  # a file system without locks has to do
        while not held:
            require(wait is not None, f"{path.parent} is being run already; wait for it")
            if not wait():
                break
            held = try_lock(file) is not False
        yield held


def is_locked(path: Path) -> bool:
    """Whether a process, of this machine or another, holds a lock."""
    try:
        with path.open("r+b") as file:
            return try_lock(file) is False
    except OSError:  # it is not there, or not ours
        return False
