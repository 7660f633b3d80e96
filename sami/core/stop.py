"""How a run is asked to stop, and how its ranks agree on when."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from sami.core.paths import exists


class StopSignal:
    """SIGTERM, SIGUSR1, Ctrl-C, the file ``RUN/stop``, or the launcher's death."""

    def __init__(self, file: Path, cpu_group: Any, launched: bool) -> None:
        """
        Args:
            file: the stop file.
            cpu_group: process group on the CPU; None with one process.
            launched: the parent is a launcher, without which this process is to stop.
        """
        self.file, self._cpu_group = file, cpu_group
        self._exchange: tuple[torch.Tensor, Any] | None = None
        self._asked = False
        self._looked = time.monotonic()
        self._parent = os.getppid() if launched else None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def agree(self, save: bool) -> tuple[bool, bool]:
        """Whether all ranks now stop, and whether one of them wants to save.

        To be called once per step by every rank. With several processes the answer is what they
        said one call earlier: the exchange runs on the CPU meanwhile and nobody waits for it.
        """
        mine = (self._wants_to_stop(), save)
        if self._cpu_group is None:
            return mine
        before, flags = self._exchange, torch.tensor(mine, dtype=torch.int32)
        work = distributed.all_reduce(
            flags, distributed.ReduceOp.MAX, self._cpu_group, async_op=True
        )
        self._exchange = (flags, work)
        if before is None:
            return False, False
        before[1].wait()
        stop, save = before[0].tolist()
        return bool(stop), bool(save)

    def _wants_to_stop(self) -> bool:
        if self._parent is not None and os.getppid() != self._parent:
            self._asked = True  # the launcher died: nobody would stop this rank
        now = time.monotonic()
        if not self._asked and now - self._looked > 1.0:  # a look at the folder, once a second
            self._looked = now
            self._asked = exists(self.file)
        return self._asked

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
