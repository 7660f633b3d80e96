"""What a run says: the screen, log.txt, metrics.jsonl and wandb; and what it runs on."""

import os
import platform
import secrets
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from sami.core.checkpoint import write_text
from sami.core.errors import UserError
from sami.core.metrics import MetricsFile
from sami.core.paths import exists
from sami.core.progress import Progress, duration

VERSIONS = (
    *("torch", "torchvision", "timm", "accelerate"),
    *("webdataset", "segment-anything", "numpy", "pillow"),
)


class Reporter:
    """Where the words and numbers of one process go; of rank 0, unless another one has to speak."""

    def __init__(self, folder: Path, is_main: bool) -> None:
        """``folder``: the run's."""
        self.dir, self.is_main = folder, is_main
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self._console = Console(highlight=False, markup=False, soft_wrap=True, emoji=False)
        self._bar: Bar | None = None
        self._progress: Progress | None = None
        self._wandb: Any = None
        self._said: set[str] = set()

    def start_wandb(self, mode: str, config: dict[str, Any]) -> None:
        """Begin a run of wandb, or go on with the one that this folder knows.

        Args:
            mode: online or offline.
            config: what wandb shows of the run.

        Raises:
            UserError: wandb does not start.
        """
        import wandb

        name_file = self.dir / "wandb_id"
        if not exists(name_file):
            write_text(name_file, secrets.token_hex(4))
        try:
            self._wandb = wandb.init(
                project="sami",
                name="/".join(self.dir.absolute().parts[-2:]),
                id=name_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(self.dir),
                mode=mode,
                config=config,
            )
        except wandb.Error as error:
            raise UserError(
                f"wandb does not start ({' '.join(str(error).split())}); run 'wandb login', or "
                "set --run.wandb offline or disabled"
            ) from error

    def stop_bar(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def close(self, failed: bool) -> None:
        """End wandb's run."""
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))

    def say(self, text: str, any_rank: bool = False) -> None:
        """A line on the screen and in ``log.txt``; of rank 0, or of ``any_rank``."""
        if self.is_main or any_rank:
            (self._bar.console if self._bar else self._console).print(text)
            log = self.dir / "log.txt"
            with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def say_once(self, text: str) -> None:
        """A line of rank 0 that is not repeated: what every evaluation would say again."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def record(self, step: int, steps: int, values: dict[str, Any]) -> None:
        """One line of ``metrics.jsonl``, the same on the screen and in wandb."""
        if not self.is_main:
            return
        self.metrics.append(values)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        text = (
            f"loss {_short(values['loss'])} · lr {values['lr']:.2e} · "
            f"{values['images_per_second']:.1f} images/s · data wait {values['data_wait']:.0%}"
        )
        held_out = [
            f"{name.removeprefix('val_')} {_short(value)}"
            for name, value in values.items()
            if name.startswith("val_")
        ]
        if held_out:
            self.say(f"step {step}/{steps} · held out: " + " · ".join(held_out))
        if not sys.stdout.isatty():
            left = duration((steps - step) * values["seconds_per_step"])
            self.say(f"step {step}/{steps} · {text} · {left} left")
            if self._progress is not None:
                self._progress.said = time.monotonic()
        else:
            self.advance(step, steps, text)

    def advance(self, step: int, steps: int, text: str | None = None) -> None:
        """Move the progress bar; where there is no terminal, a line unless there was one lately."""
        if not self.is_main:
            return
        if not sys.stdout.isatty():
            if self._progress is None:
                self._progress = Progress("step", steps, self.say, first=step)
            self._progress.at(step)
            return
        if self._bar is None:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeLeft(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.dir.name, total=steps, text="", completed=step)
        self._bar.update(self._task, completed=step, **({} if text is None else {"text": text}))

    def image(self, path: Path, step: int) -> None:
        """Hand an image that was written to wandb."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({path.stem.split("-")[0]: wandb.Image(str(path))}, step=step)


class TimeLeft(ProgressColumn):
    """How long a progress bar's task still takes."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        return Text("-:--:--" if left is None else duration(left), "progress.remaining")


def environment(device: torch.device, bf16: bool, processes: int = 1) -> dict[str, Any]:
    """Versions, commit and hardware, for a summary."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", here, *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in VERSIONS},
        "commit": commit and commit + (" with changes" if changed else ""),
        "hardware": {
            "host": socket.gethostname(),
            "gpu": gpu,
            "processes": processes,
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "precision": "bf16" if bf16 else "fp32",
        },
    }


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
