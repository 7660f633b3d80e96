"""A run: its folder, its processes, and how it begins and ends."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from torch import distributed

from sami.core.checkpoint import list_checkpoints, write_text
from sami.core.config import PATH, require, to_dict, to_yaml
from sami.core.errors import UserError, not_written
from sami.core.exits import ASKED_TO_STOP, FINISHED, USER_ERROR, user_error
from sami.core.locks import try_lock
from sami.core.paths import exists
from sami.core.processes import choose_device, is_launched, make_accelerator
from sami.core.reporting import Reporter, environment
from sami.core.stop import StopSignal
from sami.core.weights import entry_of_run, read_summary


@dataclass
class RunConfig:
    """A run folder and what is written to it when.

    Attributes:
        dir: the run's folder; the same command again resumes the run in it.
        seed: of the initial weights, the order of the samples, crops, flips and masks.
        device: auto (the GPU if there is one, else the CPU), cpu, cuda, cuda:1, mps.
        debug: show the traceback behind an error message.
        log_every: steps between lines of metrics.jsonl; null is 50, and in a run of fewer than 1000
            steps a twentieth of them.
        save_every: steps between checkpoints.
        save_minutes: minutes after which a checkpoint is due in any case.
        keep: number of checkpoints that stay.
        picture_every: steps between images; 0 for none.
        wandb: online, offline or disabled.
    """

    dir: str = field(default="runs/sami", metadata=PATH)
    seed: int = 0
    device: str = "auto"
    debug: bool = False
    log_every: int | None = None
    save_every: int = 1000
    save_minutes: float = 20.0
    keep: int = 2
    picture_every: int = 1000
    wandb: Literal["online", "offline", "disabled"] = "disabled"

    def log_interval(self, steps: int) -> int:
        """Steps between lines of a run of so many."""
        return self.log_every or min(50, max(1, steps // 20))

    def check(self) -> None:
        require(bool(self.dir), "run.dir is empty; name a folder such as runs/sami_ti")
        require(0 <= self.seed < 2**32, f"run.seed {self.seed} must be within 0..2^32 - 1")
        for name in ("log_every", "save_every", "keep"):
            value = getattr(self, name)
            require(value is None or value > 0, f"run.{name} {value} must be positive")
        require(
            self.picture_every >= 0,
            f"run.picture_every {self.picture_every} must be 0 (never) or more",
        )
        require(self.save_minutes > 0, f"run.save_minutes {self.save_minutes} must be positive")
        choose_device(self.device, "run.device")


class Run:
    """One process's view of a run. Use as a context: leaving it writes how the run ended."""

    def __init__(
        self, config: RunConfig, precision: str = "auto", entry: str | None = None
    ) -> None:
        """Folder, lock, Accelerator, seed, signal handlers.

        Args:
            precision: auto, fp32 or bf16; auto is bf16 where a GPU has it.
            entry: whose run it is, such as sami/pretrain.py.

        Raises:
            UserError: the folder holds a run of another entry, another process holds it, or it
                cannot be written.
        """
        self.config, self.entry, self.dir = config, entry, Path(config.dir)
        device = choose_device(config.device, "run.device")
        self.bf16 = precision == "bf16" or (
            precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        launched = is_launched()
        self.accelerator, self._overruled = make_accelerator(device, self.bf16)
        self.is_main = self.accelerator.is_main_process
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.device = self.accelerator.device
        self._cpu_group = distributed.new_group(backend="gloo") if self.processes > 1 else None
        self.reporter = Reporter(self.dir, self.is_main)
        self.say, self.say_once = self.reporter.say, self.reporter.say_once
        self.record, self.advance = self.reporter.record, self.reporter.advance
        self.image, self.metrics = self.reporter.image, self.reporter.metrics
        self._lock: Any = None
        self._summary: dict[str, Any] = {}
        self._may_write, self._begun = False, False
        self._before = _names(self.dir)  # None: there is no folder yet
        self._last_save = time.monotonic()
        if self.is_main:
            self._take_folder()
        self.wait_for_all()
        # A folder with checkpoints is someone's work: until begin() nothing in it is written.
        self._may_write = not list_checkpoints(self.dir / "checkpoints")
        self._summary_before = self._summary_time()
        set_seed(config.seed)
        self._stop = StopSignal(self.dir / "stop", self._cpu_group, launched)

    # -- how it begins and ends ---------------------------------------------------------------

    def __enter__(self) -> "Run":
        return self

    def begin(self, config: Any, step: int, metadata: dict[str, Any]) -> None:
        """Write ``config.yaml`` and the first ``summary.json``; start wandb.

        Args:
            config: the whole configuration.
            step: where the run stands; metrics behind it are cut off.
            metadata: what else the summary shall hold from the start.
        """
        self._may_write = self._begun = True
        if not self.is_main:
            return
        if step:
            self.say(f"resuming from {self.dir}/checkpoints/step-{step}")
        self.metrics.cut_back(step)
        (self.dir / "pictures").mkdir(exist_ok=True)
        (self.dir / "stop").unlink(missing_ok=True)
        write_text(self.dir / "config.yaml", to_yaml(config))
        for note in self._overruled:
            self.say(note)
        machine = environment(self.device, self.bf16, self.processes)
        self.summarise(status="running", exit_code=None, entry=self.entry, **metadata, **machine)
        if self.config.wandb != "disabled":
            shown = to_dict(config) | {"facts": metadata, "environment": machine}
            self.reporter.start_wandb(self.config.wandb, shown)

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reporter.stop_bar()
        first = None
        if error is not None and not isinstance(error, SystemExit):
            if self.config.debug and user_error(error) is not None:
                traceback.print_exception(error)
            first = self._note_failure(error)
        self.reporter.close(failed=error is not None)
        if self._lock is not None:
            if self._may_write and not self._begun:
                self._clear_away()
            self._lock.close()
        if error is None and distributed.is_initialized():
            distributed.destroy_process_group()
        if first is not None and user_error(error) is None:
            raise UserError(first) from error  # this rank's own error is but the consequence

    def _note_failure(self, error: BaseException) -> str | None:
        """Write into ``summary.json`` why this rank fails, unless another rank did so before.

        A failing rank is followed by the others, whose connections break.

        Returns:
            What the first rank to fail said, if that was for the user to mend.
        """
        info: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            info = json.loads((self.dir / "summary.json").read_bytes())
        fresh = self._summary_time() != self._summary_before
        if fresh and info.get("status") == "failed" and info.get("rank") != self.rank:
            return info["error"] if info["exit_code"] == USER_ERROR else None
        if self._may_write:
            mendable = user_error(error)
            sentence = str(mendable or f"{type(error).__name__}: {error}")
            self._summary = info | {
                "entry": self.entry,
                "status": "failed",
                "exit_code": USER_ERROR if mendable else 1,
                "error": sentence,
                "rank": self.rank,
            }
            with contextlib.suppress(OSError):  # the disk is full: stderr has to do
                self._write_summary()
        return None

    def summarise(self, **values: Any) -> None:
        """Update ``summary.json``, atomically. Only rank 0 writes."""
        if self.is_main:
            self._summary.update(values)
            self._write_summary()

    def _write_summary(self) -> None:
        write_text(self.dir / "summary.json", json.dumps(self._summary, indent=1) + "\n")

    def is_finished(self) -> bool:
        """Whether the run in this folder had come to its end."""
        summary = read_summary(self.dir)
        return summary.get("status") == "finished" and summary.get("exit_code") == FINISHED

    def seed_step(self, step: int) -> None:
        """Make what torch draws in a step a function of (seed, step, rank)."""
        torch.manual_seed(_seed_from(f"{self.config.seed}/{step}/{self.rank}", 8))

    def seed_of(self, step: int) -> int:
        """A seed under 2^32 that is a function of (seed, step), for what all ranks draw alike."""
        return _seed_from(f"{self.config.seed}/{step}", 4)

    def wait_for_all(self) -> None:
        """A barrier."""
        self.accelerator.wait_for_everyone()

    # -- when it stops ------------------------------------------------------------------------

    def stop_and_save(self) -> tuple[bool, bool]:
        """Whether all ranks now stop, and whether a checkpoint is due by the clock.

        To be called once per step by every rank; see :meth:`StopSignal.agree`.
        """
        minutes = (time.monotonic() - self._last_save) / 60
        return self._stop.agree(self.is_main and minutes > self.config.save_minutes)

    def saved(self) -> None:
        """Restart the clock of ``save_minutes``."""
        self._last_save = time.monotonic()

    def gather(self, value: Any) -> list[Any]:
        """Plain data of every rank, on every rank, over the CPU."""
        if self._cpu_group is None:
            return [value]
        values: list[Any] = [None] * self.processes
        distributed.all_gather_object(values, value, self._cpu_group)
        return values

    def leave_asked(self, step: int, **values: Any) -> int:
        """Note that the run stopped as asked, and ``values``; returns the exit code."""
        (self.dir / "stop").unlink(missing_ok=True)
        self.summarise(status="interrupted", exit_code=ASKED_TO_STOP, steps=step, **values)
        self.say(
            f"asked to stop: checkpointed at step {step}; the same command again goes on from there"
        )
        return ASKED_TO_STOP

    def _summary_time(self) -> int | None:
        try:
            return (self.dir / "summary.json").stat().st_mtime_ns
        except OSError:
            return None

    def _clear_away(self) -> None:
        """Of a start that did not begin, leave no folder that looks like a run's.

        summary.json stays, in which scripts read why; what was there before stays too.
        """
        with contextlib.suppress(OSError):
            made = set(_names(self.dir) or ()) - set(self._before or ())
            for name in made & {"lock", "log.txt"}:
                (self.dir / name).unlink()
            if "index" in made:
                shutil.rmtree(self.dir / "index")
            if "checkpoints" in made:
                (self.dir / "checkpoints").rmdir()
            if self._before is None and not _names(self.dir):
                self.dir.rmdir()

    def _take_folder(self) -> None:
        refuse_other_run(self.dir, self.entry)
        try:
            (self.dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._lock = (self.dir / "lock").open("a+", encoding="utf-8")
        except OSError as error:
            remedy = "choose another folder with --run.dir"
            raise not_written(error, f"run.dir {self.dir}", remedy) from error
        has_lock = try_lock(self._lock)
        self._lock.seek(0)
        if has_lock is None:
            self.say(
                f"this file system cannot lock {self.dir}; see to it that only one job uses "
                "the folder"
            )
        elif not has_lock:
            holder = self._lock.read().strip() or "another process"
            raise UserError(
                f"run.dir {self.dir} is in use by {holder}; wait for it or choose another "
                "folder with --run.dir"
            )
        self._lock.truncate()
        self._lock.write(f"host {socket.gethostname()}, pid {os.getpid()}")
        self._lock.flush()


def refuse_other_run(folder: Path, entry: str | None) -> None:
    """Raise UserError if the folder holds a run of another entry, or is none."""
    held = entry_of_run(folder)
    if None not in (held, entry) and held != entry:
        raise UserError(
            f"run.dir {folder} holds a run of {held}, and this is {entry}; name another folder "
            "with --run.dir"
        )
    if exists(folder) and not folder.is_dir():
        raise UserError(f"run.dir {folder} is a file; choose a folder with --run.dir")


def _seed_from(text: str, size: int) -> int:
    """A seed of ``size`` bytes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "little")


def _names(folder: Path) -> list[str] | None:
    """What lies in a folder; None if there is none."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
