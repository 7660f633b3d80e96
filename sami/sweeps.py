"""The runs of a sweep: each stage's command line and folder, and what identifies their results.

What a sweep's file says is sami/sweepfile.py's; running and reading off is tools/sweep.py's.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sami.core.checkpoint import write_text
from sami.core.config import require
from sami.core.configfile import merge, read_layers
from sami.core.errors import UserError, not_written, raise_if_machine
from sami.core.exits import ASKED_TO_STOP, FINISHED
from sami.core.metrics import MetricsFile
from sami.core.paths import exists
from sami.core.programs import is_locked
from sami.core.shipped import shipped, short
from sami.grids import GRID, grid_of_config
from sami.sweepfile import ARGV, CONFIG, SWEEP, Spec, Stage, Trial, slug, time_of

START = "encoder.checkpoint"
PLAN, DONE = "plan.json", "done.json"
STATE = "state.json"  # of a run: its last stage, the code that it left with, its own sentence


class Sweep(Spec):
    """A file of configs/sweeps, and the folder of its results."""

    # -- what a run consists of -----------------------------------------------------------------

    def stages_of(self, run: Trial) -> Iterator[tuple[str, Stage]]:
        """Those that a setting does not skip."""
        for name, stage in self.stages.items():
            if not run.skips(name):
                yield name, stage

    def folder(self, run: Trial, name: str = "") -> Path:
        """Of a run, or of one of its stages: within the run's, or beside it where it is shared."""
        if not name or not self.is_shared(run, name):
            return self.out / run.name / name
        return self.out / (f"{name}_{slug(run.setting)}" if self.is_own(run, name) else name)

    def is_shared(self, run: Trial, name: str) -> bool:
        """Whether nothing of a stage follows from the run's seed: it is run once for all seeds."""
        stage, needed = self.stages[name], self.needed(run, name)
        one_seed = bool(needed) if stage.config is None else stage.seed is not None
        return one_seed and all(self.is_shared(run, other) for other in needed)

    def is_own(self, run: Trial, name: str) -> bool:
        """Whether a setting changes a stage, or one that this begins from."""
        needed = self.needed(run, name)
        return bool(run.overrides[name]) or any(self.is_own(run, one) for one in needed)

    def needed(self, run: Trial, name: str) -> list[str]:
        """The stages whose folders a stage names."""
        text = json.dumps(self.arguments(run, name))
        return [other for other in self.stages if other != name and f"{{{other}}}" in text]

    def arguments(self, run: Trial, name: str) -> tuple[str | None, list[Any], dict[str, Any]]:
        """A stage's config, its arguments in front, and its options, with {names} in them."""
        stage, overrides = self.stages[name], run.overrides[name]
        options = stage.set | {key: value for key, value in overrides.items() if key}
        argv = options.pop(ARGV, stage.words)
        config = stage.config and options.pop(CONFIG, stage.config)
        return config, argv, options

    def command(self, run: Trial, name: str, steps: int | None = None) -> list[str]:
        """A stage's command line behind the interpreter; folders of stages for their {names}.

        Args:
            steps: in place of "{time of SETTING}".
        """
        stage = self.stages[name]
        config, argv, options = self.arguments(run, name)
        folders = {other: str(self.folder(run, other)) for other in self.stages}

        def fill(value: Any) -> str:
            if steps is not None and time_of(value):
                return str(steps)
            text = plain(value)
            for other, folder in folders.items():
                text = text.replace(f"{{{other}}}", folder)
            return text

        if config is None:
            argv = [*argv]
            for key, value in options.items():
                argv += [f"--{key}", *(value if isinstance(value, list) else [value])]
            return [str(shipped(stage.entry)), *map(fill, argv)]
        options = self._with_grid(options, run, name)
        seed = run.seed if stage.seed is None else stage.seed
        options |= {"run.dir": folders[name], "run.seed": seed}
        argv = [f"--{key}={fill(value)}" for key, value in options.items()]
        return [str(shipped(stage.entry)), "--config", str(shipped(config)), *argv]

    def takes_time_of(self, run: Trial, name: str) -> str | None:
        """The setting that a stage takes as long as, if its steps are "{time of SETTING}".

        Raises:
            UserError: there is no such setting, or its own steps are another's.
        """
        other = self._time_of(run, name)
        rivals = self.runs_of(other)
        trained = any(not rival.skips(name) for rival in rivals)
        require(
            other is None or trained and not any(self._time_of(one, name) for one in rivals),
            f"{self.path}: {run.setting}: there is no setting {other} with steps of {name} of its "
            "own",
        )
        return other

    def paced_by(self, run: Trial, name: str) -> list[Trial]:
        """The runs that tell how long a step of a stage lasts, which takes the time of a setting.

        Those of a setting that differs from the run's own in nothing but the steps; without one,
        of the setting whose time it takes.
        """
        steps = {key for key, value in self.arguments(run, name)[2].items() if time_of(value)}

        def without(one: Trial) -> dict[str, Any]:
            mine = {key: v for key, v in one.overrides[name].items() if key not in steps}
            return one.overrides | {name: mine}

        found = [one for one in self.runs if not self._time_of(one, name)]
        found = [one for one in found if without(one) == without(run) and not one.skips(name)]
        return found or self.runs_of(self.takes_time_of(run, name))

    def _time_of(self, run: Trial, name: str) -> str | None:
        return next(filter(None, map(time_of, self.arguments(run, name)[2].values())), None)

    def _with_grid(self, options: dict[str, Any], run: Trial, name: str) -> dict[str, Any]:
        """The options of a stage 2; from random weights, with the positions of its rivals' stage 1.

        Raises:
            UserError: these differ in it.
        """
        if options.get(START) or "encoder.grid" in options:
            return options
        varied = [key for key in self.vary if key != f"{name}.{START}"]
        rivals = [r for r in self.runs if all(r.value(key) == run.value(key) for key in varied)]
        mine = self.stages[name].set.get(START)  # what counts in a file without a rival
        starts = [(r, r.overrides[name].get(START, mine)) for r in rivals]
        grids = self._grids(starts) or self._grids([(run, mine)])
        require(
            len(grids) < 2,
            f"{self.path}: {run.setting} starts from random weights beside encoders with positions "
            f"for {' and '.join(map(str, grids))} patches a side; set {name}.encoder.grid in it",
        )
        (grid,) = grids or {None}
        return options if grid in (None, GRID) else options | {"encoder.grid": grid}

    def _grids(self, starts: list[tuple[Trial, Any]]) -> set[int | None]:
        """For which grids the encoders have positions that runs start from, "{STAGE}"."""
        grids = set()
        for run, start in starts:
            begun = re.fullmatch(r"\{(\w+)\}", str(start))
            if begun and begun[1] in self.stages and self.stages[begun[1]].config:
                config, _, options = self.arguments(run, begun[1])
                grids.add(grid_of_config(shipped(config), options))
        return grids

    # -- where a run stands ---------------------------------------------------------------------

    def summary(self, run: Trial, name: str) -> dict[str, Any]:
        """What a training run says of itself; empty where it has not begun."""
        return read(self.folder(run, name) / "summary.json")

    def is_finished(self, run: Trial, name: str) -> bool:
        if self.stages[name].config is None:
            return exists(self.folder(run, name) / DONE)
        return self.summary(run, name).get("status") == "finished"

    def state(self, run: Trial) -> tuple[str, str]:
        """What stands of a run, and why."""
        last = read(self.folder(run) / STATE)
        for name, _ in self.stages_of(run):
            if self.is_finished(run, name):
                continue
            summary = self.summary(run, name)
            status, steps = summary.get("status"), summary.get("steps")
            mine = last if last.get("stage") == name else {}
            code = mine.get("code")
            lock = self.folder(run, name) / "lock"
            if is_locked(lock) or mine and is_locked(self.folder(run) / "lock"):
                return "running", f"{name}, at step {steps}" if steps else name
            if code not in (None, FINISHED, ASKED_TO_STOP):
                return "failed", f"{name}: {mine.get('error') or summary.get('error')}"
            if status == "failed":
                return "failed", f"{name}: {summary.get('error')}"
            if status == "interrupted":
                return "interrupted", f"{name}: asked to stop at step {steps}"
            if code == ASKED_TO_STOP:
                return "interrupted", f"{name}: asked to stop"
            if status is None and not mine:
                return "missing", f"{name} has not run"
            return "interrupted", f"{name}: killed"
        return "finished", ""

    def steps_of(self, run: Trial, name: str) -> int | None:
        """The steps of a stage that is to take as long as all of another setting; else None.

        What both have, such as a teacher, does not count.

        Raises:
            UserError: that setting has not run yet.
        """
        other = self.takes_time_of(run, name)
        if other is None:
            return None
        rivals, paced, total, per_step = self.runs_of(other), self.paced_by(run, name), 0.0, 0.0
        needed = {self.runs.index(one): one for one in [*rivals, *paced]}
        left = [str(n) for n, one in sorted(needed.items()) if not self.is_finished(one, name)]
        require(not left, f"{run.name} takes as long as {other}: first run {', '.join(left)}")
        own = {self.folder(run, stage) for stage, _ in self.stages_of(run)}
        for rival in rivals:
            trained = {self.folder(rival, s) for s, info in self.stages_of(rival) if info.config}
            total += sum(map(seconds_of, trained - own)) / len(rivals)
        for one in paced:
            seconds, steps = seconds_of(self.folder(one, name)), self.summary(one, name)["steps"]
            per_step += seconds / steps / len(paced)
        return round(total / per_step)

    # -- what identifies a folder of results ----------------------------------------------------

    def plan(self, run: Trial) -> dict[str, Any]:
        """What a run consists of, wherever its folder is."""
        plan = {}
        for name, _ in self.stages_of(run):
            argv = [word.replace(str(self.out), "OUT") for word in self.command(run, name)]
            plan[name] = [short(word) for word in argv]
            if CONFIG in run.overrides[name]:
                plan[name].append(f"which sets {_digest(shipped(run.overrides[name][CONFIG]))}")
        return plan

    def identity(self) -> dict[str, Any]:
        """What all runs of a folder have in common; settings and seeds may be added to it.

        A config counts by what it sets, not by its words.
        """
        stages = {name: asdict(stage) for name, stage in self.stages.items()}
        for stage in stages.values():
            if stage["config"]:
                stage["config"] += f", which sets {_digest(shipped(stage['config']))}"
            if stage["seed"] is None:  # as folders have it that are older than this key
                del stage["seed"]
        return {"sweep": self.name, "stages": stages}

    def claim(self, run: Trial) -> None:
        """Bind the folders to this sweep and this run; a first attempt that trained nothing goes.

        Raises:
            UserError: they hold another sweep, or a run with another plan.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._bind(self.out / SWEEP, self.identity() | {"set": self.more})
            self._check(self.out / SWEEP, self.identity())
            self.folder(run).mkdir(exist_ok=True)
            self._bind(self.folder(run) / PLAN, self.plan(run))
        except OSError as error:
            raise not_written(error, str(self.out), "name another --out") from error
        self._check(self.folder(run) / PLAN, self.plan(run))

    def check_results(self) -> None:
        """
        Raises:
            UserError: there are none, or they are another sweep's, or of other settings.
        """
        file = self.out / SWEEP
        require(exists(file), f"{self.out} holds no results yet; run one of the sweep's runs")
        self._check(file, self.identity())
        for run in self.runs:
            if exists(self.folder(run) / PLAN):
                self._check(self.folder(run) / PLAN, self.plan(run))

    def _bind(self, file: Path, identity: dict[str, Any]) -> None:
        """Write what identifies a folder, unless it is there and something was begun under it.

        Of several tasks that start together one is first; the others find its file.
        """
        replaces = exists(file)
        if replaces and self._holds_results(file.parent):
            return
        mine = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
        write_text(mine, json.dumps(identity, indent=1) + "\n")
        try:
            with contextlib.suppress(FileExistsError):
                (os.replace if replaces else os.link)(mine, file)
        except OSError:  # no links on this file system
            mine.replace(file)
        mine.unlink(missing_ok=True)

    def _holds_results(self, folder: Path) -> bool:
        """Whether a stage below runs, has begun to learn, or has ended."""
        # A sweep's folder holds its runs, and beside them the stages that these share.
        runs = [folder, *(plan.parent for plan in folder.glob(f"*/{PLAN}"))]
        return any(
            is_locked(run / "lock")
            or any(run.glob(f"*/{DONE}"))
            or any(run.glob("*/checkpoints/step-*"))
            or any(read(file).get("status") == "finished" for file in run.glob("*/summary.json"))
            for run in runs
        )

    def _check(self, file: Path, identity: dict[str, Any]) -> None:
        """
        Raises:
            UserError: the folder's file says otherwise.
        """
        there = {key: value for key, value in read(file).items() if key != "set"}
        if there == identity:
            return
        before, now = set(_words(there)), set(_words(identity))
        old, new = min(before - now, default="nothing"), min(now - before, default="nothing")
        of_sweep = file.name == SWEEP
        what = "results of the sweep as it was before" if of_sweep else "a run with other settings"
        raise UserError(
            f"{file.parent} holds {what}: {old} there, {new} here; name another --out, or delete "
            "it" + "; without --set it is as it was begun" * bool(self.more)
        )


def read(file: Path) -> dict[str, Any]:
    """A JSON file of ours; empty where there is none, or none that is whole."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise_if_machine(error, file)
        return {}


def seconds_of(folder: Path) -> float:
    """What a training's steps took, without its start and its evaluations."""
    step, seconds = 0, 0.0
    for line in MetricsFile(folder / "metrics.jsonl").read():
        seconds += line["seconds_per_step"] * (line["step"] - step)
        step = line["step"]
    return seconds


def plain(value: Any) -> str:
    """A value as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _digest(config: Path) -> str:
    """Of what a config file sets, not of its words."""
    content = json.dumps(merge(read_layers(str(config), "")), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _words(value: Any, key: str = "") -> list[str]:
    """Every value in nested dictionaries and lists, with the keys that it stands under."""
    if isinstance(value, dict):
        inner = [(f"{key}.{name}".strip("."), one) for name, one in value.items()]
        return [word for name, one in inner for word in _words(one, name)]
    if isinstance(value, list):
        return [word for one in value for word in _words(one, key)]
    return [f"{key} {value}".removeprefix("stages.")]
