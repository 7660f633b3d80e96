"""The last word under a launcher.

``accelerate launch`` and ``torchrun`` print up to a hundred lines of their own once a process has
failed, over which its one sentence would scroll away. So a small process is left behind that waits
for the launcher to end and then says the sentence: last, and once for all of its processes.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

LAUNCHERS = {
    *("accelerate", "accelerate-launch", "accelerate.commands.launch"),
    *("torchrun", "torch.distributed.launch", "torch.distributed.run"),
}
PATIENCE = 120  # seconds after which the sentence is said, whatever the launcher does
EVERY = 0.002  # seconds between two looks at the launcher


def find_launcher() -> psutil.Process | None:
    """The launcher that started this process; None if something else did."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        arguments = [Path(word).name for word in parent.cmdline()[:4]]
        if arguments and arguments[0].startswith("python") and LAUNCHERS & set(arguments[1:]):
            return parent
    return None


def say_last(sentence: str) -> None:
    """Print a line to stderr: at once, or behind what a launcher has to say, once for all ranks."""
    rank, node = (os.environ.get(name, "0") for name in ("RANK", "GROUP_RANK"))
    launcher = find_launcher()
    if launcher is not None and _outlives(launcher):
        try:
            _claim(launcher).open("x").close()
        except FileExistsError:  # another of its processes says it
            return
        except OSError:  # no temporary folder: it may be said by each
            pass
        sentence = sentence if node == "0" else f"rank {rank}: {sentence}"
        with contextlib.suppress(OSError):
            subprocess.Popen(
                [sys.executable, "-P", __file__, str(launcher.pid), sentence[:50_000]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # what ends the launcher does not end it
            )
            return
    elif rank != "0":
        sentence = f"rank {rank}: {sentence}"
    print(sentence, file=sys.stderr, flush=True)


def is_said() -> bool:
    """Whether another process of this launcher has said why it fails."""
    launcher = find_launcher()
    return launcher is not None and _claim(launcher).exists()


def _outlives(launcher: psutil.Process) -> bool:
    """Whether a process that is left behind lives until it has spoken.

    Not so where the launcher is all that a container runs, nor in a job of SLURM, whose step ends
    with it.
    """
    with contextlib.suppress(psutil.Error):
        return launcher.pid != 1 and launcher.ppid() != 0 and "SLURM_JOB_ID" not in os.environ
    return False


def _claim(launcher: psutil.Process) -> Path:
    """The file that stands for "it is said"."""
    began = round(1000 * launcher.create_time())
    return Path(tempfile.gettempdir()) / f"sami-said-{launcher.pid}-{began}"


def _wait_and_say(pid: int, sentence: str) -> None:
    """What the process that is left behind does.

    A process that ends gives its memory back before its parent hears of it: said then, the
    sentence stands before the shell's next prompt.
    """
    claim = None
    with contextlib.suppress(psutil.Error):
        launcher = psutil.Process(pid)
        claim = _claim(launcher)
        until = time.monotonic() + PATIENCE
        while launcher.memory_info().rss > 0 and time.monotonic() < until:
            time.sleep(EVERY)
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)
    if claim is not None:
        claim.unlink(missing_ok=True)


if __name__ == "__main__":
    _wait_and_say(int(sys.argv[1]), sys.argv[2])
