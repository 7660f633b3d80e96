"""Numbers of a run: summed on the device, read when due, written as JSON lines."""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from sami.core.checkpoint import write_text
from sami.core.paths import exists


class Window:
    """Means over the steps since the last reading. Adding does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor, share: float) -> None:
        """One 0-dim value; one that is not finite is left out of the mean.

        Args:
            share: of the step that the value stands for. So each step counts the same, also where
                the run went on with other processes or micro-batches in between.
        """
        finite = value.isfinite()
        if name not in self.sums:
            self.sums[name] = torch.zeros((), device=self.device)
            self.counts[name] = torch.zeros((), device=self.device)
        self.sums[name] += share * torch.where(finite, value.detach().float(), 0.0)
        self.counts[name] += share * finite

    def read(self, accelerator: Accelerator) -> dict[str, float | None]:
        """Means over steps and ranks, and a new start; None where nothing finite came."""
        names = sorted(self.sums)
        if not names:
            return {}
        table = torch.stack([torch.stack([self.sums[n], self.counts[n]]) for n in names])
        table = accelerator.reduce(table, "sum").tolist()
        self.sums, self.counts = {}, {}
        return {
            name: total / count if count else None
            for name, (total, count) in zip(names, table, strict=True)
        }

    def state(self) -> dict[str, list[float]]:
        """For a checkpoint, so that a resumed run logs what an uninterrupted one logs."""
        return {name: [self.sums[name].item(), self.counts[name].item()] for name in self.sums}

    def load(self, states: list[dict[str, list[float]]]) -> None:
        """What this rank had added, or several together."""
        for name in dict.fromkeys(name for state in states for name in state):
            total, count = np.sum([state[name] for state in states if name in state], 0)
            self.sums[name] = torch.tensor(total, dtype=torch.float32, device=self.device)
            self.counts[name] = torch.tensor(count, dtype=torch.float32, device=self.device)


class BadSamples:
    """Samples that could not be used: how many, and the first few keys, by reason."""

    NAMED = 20

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.keys: dict[str, list[str]] = {}

    def add(self, reason: str, key: str) -> bool:
        """Count one; returns whether its key is among the first few and new."""
        self.counts[reason] += 1
        keys = self.keys.setdefault(reason, [])
        new = key not in keys and len(keys) < self.NAMED
        if new:
            keys.append(key)
        return new

    def state(self) -> dict[str, Any]:
        """Plain data, for a checkpoint or another rank."""
        return {"counts": dict(self.counts), "keys": self.keys}

    def merge(self, state: dict[str, Any]) -> None:
        """Add what another rank, or an earlier process, counted."""
        self.counts.update(state["counts"])
        for reason, keys in state["keys"].items():
            merged = dict.fromkeys([*self.keys.get(reason, []), *keys])
            self.keys[reason] = list(merged)[: self.NAMED]


class Clock:
    """Steps, seconds spent on them and, of these, waiting for data, since the last reading."""

    def __init__(self) -> None:
        self.steps = 0
        self.training = self.waiting = 0.0
        self.started: float | None = None

    def start(self) -> None:
        self.started = time.perf_counter()

    def pause(self) -> None:
        if self.started is not None:
            self.training += time.perf_counter() - self.started
            self.started = None

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """What happens inside counts as waiting for data."""
        asked = time.perf_counter()
        yield
        self.waiting += time.perf_counter() - asked

    def read(self) -> tuple[int, float, float]:
        """Steps, seconds, and the share of them spent waiting; a new start."""
        self.pause()
        result = self.steps, self.training, self.waiting / self.training if self.training else 0.0
        self.steps, self.training, self.waiting = 0, 0.0, 0.0
        return result


class MetricsFile:
    """``metrics.jsonl``: one object a line, each step once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut_back(self, step: int) -> None:
        """Drop what was written after a checkpoint's step, a torn last line too."""
        if not exists(self.path):
            return
        kept = [line for line in self.read() if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole lines."""
        records = []
        written = self.path.read_text(encoding="utf-8") if exists(self.path) else ""
        for line in written.splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break  # torn by a kill: nothing whole comes after it
        return records
