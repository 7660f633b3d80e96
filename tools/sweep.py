"""Many runs from one file: settings times seeds, each a chain of stages, and their table.

python tools/sweep.py list   SWEEP      the numbered runs and their overrides
python tools/sweep.py run    SWEEP N    run N here, from where it is; finished stages stay
python tools/sweep.py status SWEEP      finished, running, interrupted, failed, missing
python tools/sweep.py table  SWEEP      mean and deviation by setting: OUT/table.md, table.json
python tools/sweep.py plot   SWEEP      the same as OUT/plot.png
python tools/sweep.py folder SWEEP N    where run N is
    [--out DIR] [--set STAGE.GROUP.FIELD=VALUE ...] [--launch 'accelerate launch ...']

SWEEP is one of configs/sweeps/. --set changes every run, such as --set pretrain.data.shards=...;
it is remembered and need not be said again. Results of other overrides, of another config or of a
sweep file as it was before are refused, not mixed in; settings and seeds may be added.
`run` leaves with the exit code of the stage that did not finish: 75 if it was asked to stop
(SIGTERM, SIGUSR1, Ctrl-C, or a file OUT/RUN/stop); run it again.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from finetune.measures import DATA_SETS, TRIVIAL
from sami.core.checkpoint import write_text
from sami.core.config import require
from sami.core.configfile import meant_for, merge, read_layers, read_yaml
from sami.core.errors import UserError, not_written, raise_if_machine
from sami.core.exits import ASKED_TO_STOP, FINISHED, USER_ERROR, run_entry
from sami.core.options import Options
from sami.core.paths import exists, expand_path, is_file, local_path
from sami.core.plots import LINES, integer_steps, legend_below, new_figure, plain, save_png, widen
from sami.core.shipped import HOME, find, shipped, short
from sami.core.tables import show_table
from sami.grids import GRID, grid_of_config

SKIP, START = "skip", "encoder.checkpoint"
CODES = (FINISHED, USER_ERROR, ASKED_TO_STOP)
PLAN, SWEEP, DONE, STATE = "plan.json", "sweep.json", "done.json", "state.json"
BEFORE = "results of the sweep as it was before"
# What a sweep file holds; {str: x} and [x] of anything many.
SCALAR = (str, int, float, bool, type(None))
FORM: dict[str, Any] = {
    "out": str,
    "seeds": [int],
    "stages": {str: {str: object}},
    "vary": {str: [SCALAR]},
    "settings": {str: (dict, str, type(None))},
    "measures": {str: str},
    "paper": {str: {str: (int, float, type(None))}},
    "paper_on": str,
}
IMAGENET = "ImageNet"  # known by its 50,000 validation pictures and 1,000 classes
PERCENT = ("top1", "top5", "knn", "linear")  # measures of summary.json that are in %
WITHOUT = "without a model"
HELD = (errno.EACCES, errno.EAGAIN)  # of a lock that another process has


@dataclass
class Stage:
    """One program of a chain.

    Attributes:
        entry: path of the script; one with ``config`` is a training run, with a folder and a seed
            of its own.
        config: of the entry.
        set: overrides in every run; options, for an entry without a config.
        words: what stands in front of the options of an entry without a config.
    """

    entry: str
    config: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)


@dataclass
class Run:
    """One setting with one seed: the overrides of each of its stages."""

    name: str
    setting: str
    seed: int
    overrides: dict[str, dict[str, Any]]

    def value(self, key: str) -> Any:
        """Of STAGE.GROUP.FIELD; None where nothing is overridden."""
        stage, _, name = key.partition(".")
        return self.overrides[stage].get(name)


class Sweep:
    """A file of configs/sweeps: its stages and its runs."""

    def __init__(self, path: Path, out: Path | None, more: list[str]) -> None:
        """
        Raises:
            UserError: it cannot be read, or is not what a sweep consists of.
        """
        content = read_yaml(path, "", "configs/sweeps/")
        unknown = next((key for key in content if key not in FORM), None)
        if unknown is not None and "stages" not in content:
            raise UserError(
                f"{path} {meant_for(content, str(path)) or 'is no sweep; see configs/sweeps/'}"
            )
        require(unknown is None, f"{path}: {unknown} is none of {', '.join(FORM)}")
        for key in ("stages", "seeds", "measures"):
            require(bool(content.get(key)), f"{path} has no {key}; see configs/sweeps/")
        for key, told in content.items():
            require(
                _fits(told, FORM[key]) or told is None,
                f"{path}: {key} is not what it should be; see docs/sweeps.md",
            )
        self.path, self.name = path, path.stem
        told = expand_path(content.get("out") or f"runs/sweeps/{path.stem}", f"{path}: out")
        self.out = out or HOME / told
        self.seeds, self.measures = content["seeds"], content["measures"]
        self.paper, self.paper_on = content.get("paper") or {}, content.get("paper_on")
        known = (IMAGENET, *DATA_SETS)
        require(
            self.paper_on is None or self.paper_on in known,
            f"{path}: paper_on {self.paper_on} is none of {', '.join(known)}, the data sets that "
            "are recognised",
        )
        try:
            self.stages = {name: Stage(**told) for name, told in content["stages"].items()}
        except (TypeError, AttributeError) as error:
            raise UserError(f"{path}: stages: {error}") from error
        for name, stage in self.stages.items():
            require(
                _fits(stage.set, {str: (*SCALAR, list, dict)})
                and _fits(stage.words, [SCALAR])
                and _fits([stage.entry, stage.config or ""], [str]),
                f"{path}: stages.{name} is not what it should be; see docs/sweeps.md",
            )
            for file in (stage.entry, stage.config):
                require(
                    file is None or is_file(shipped(file)),
                    f"{path}: stages.{name}: there is no {file}",
                )
        self.more = more or self._stored().get("set", [])
        for word in self.more:
            key, equals, value = word.partition("=")
            require(bool(equals), f"--set {word} must be STAGE.GROUP.FIELD=VALUE")
            stage, field_name = self.split(key, "--set")
            require(bool(field_name), f"--set {word} must be STAGE.GROUP.FIELD=VALUE")
            require(
                key not in (content.get("vary") or {}),
                f"--set {word}: {key} is what the sweep varies; change vary in {path}",
            )
            self.stages[stage].set[field_name] = _value(value)
        for where in self.measures.values():
            self.split(where, "measures")
        self.vary = content.get("vary") or {}
        self.settings = self._settings(content.get("settings") or {"": {}})
        self.runs = self._runs()
        self.unknown: set[str] = set()  # measures that nothing had

    def split(self, key: str, where: str) -> tuple[str, str]:
        """Stage and field of a key.

        Raises:
            UserError: no such stage.
        """
        stage, _, rest = str(key).partition(".")
        require(
            stage in self.stages,
            f"{self.path}: {where}: {key} does not begin with a stage, one of "
            f"{', '.join(self.stages)}",
        )
        return stage, rest

    def _settings(self, named: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Each named setting with each combination of what is varied."""
        found: dict[str, dict[str, Any]] = {}
        for values in itertools.product(*self.vary.values()):
            varied = dict(zip(self.vary, values, strict=True))
            words = [f"{key.split('.', 1)[-1]} {value}" for key, value in varied.items()]
            for name, overrides in named.items():
                whole = ", ".join(filter(None, [str(name), *words]))
                require(whole not in found, f"{self.path}: two settings have the name '{whole}'")
                require(
                    isinstance(overrides or {}, dict),
                    f"{self.path}: settings.{name} must hold fields and values",
                )
                both = next((key for key in overrides or {} if key in varied), None)
                require(both is None, f"{self.path}: settings.{name}: {both} is varied too")
                found[whole] = {**(overrides or {}), **varied}
        return found

    def _runs(self) -> list[Run]:
        runs: dict[str, Run] = {}
        for setting, overrides in self.settings.items():
            by_stage: dict[str, dict[str, Any]] = {name: {} for name in self.stages}
            for key, value in overrides.items():
                stage, name = self.split(key, f"settings.{setting}")
                require(
                    bool(name) or value == SKIP,
                    f"{self.path}: settings.{setting}: {key} can only be {SKIP}",
                )
                require(
                    _fits(value, (*SCALAR, list, dict)),
                    f"{self.path}: settings.{setting}: {key}: {value} is no plain value",
                )
                by_stage[stage][name] = value
            for seed in self.seeds:
                slug = re.sub(r"[^A-Za-z0-9.]+", "-", setting).strip("-")
                name = f"{slug or 'run'}_seed-{seed}"
                require(
                    name not in runs,
                    f"{self.path}: two runs have the name {name}; name the settings, or the "
                    "seeds, apart",
                )
                runs[name] = Run(name, setting, seed, by_stage)
        return list(runs.values())

    def check_fields(self, names: list[str]) -> None:
        """
        Args:
            names: of the stages that are looked at.

        Raises:
            UserError: an override of a field that the stage's configuration does not have.
        """
        told = {name: "--print_config" if self.stages[name].config else "--help" for name in names}
        with ThreadPoolExecutor() as pool:
            entries = [self.stages[name].entry for name in names]
            found = dict(zip(names, pool.map(_fields, entries, told.values()), strict=True))
        for name, shown in told.items():
            stage = self.stages[name]
            used = {key for run in self.runs for key in run.overrides[name] if key}
            for key in sorted(used | set(stage.set)):
                require(
                    key in found[name],
                    f"{self.path}: {name}.{key} is no field of {stage.entry}; "
                    f"python {stage.entry} {shown} shows them",
                )

    def check_values(self, run: Run, names: list[str]) -> None:
        """
        Args:
            names: of the stages that are going to run.

        Raises:
            UserError: a stage would refuse its configuration. Said now, not after the stages
                before it.
        """
        trained = [name for name in names if self.stages[name].config is not None]
        with ThreadPoolExecutor() as pool:
            look = "--check=values"  # what an earlier stage makes is not there yet
            commands = [[sys.executable, *self.command(run, name), look] for name in trained]
            for name, done in zip(trained, pool.map(_ask, commands), strict=True):
                require(not done.returncode, f"{self.path}: {name}: {_last(done.stderr)}")
        self.check_fields([name for name in names if name not in trained])

    # -- one run --------------------------------------------------------------------------------

    def folder(self, run: Run, stage: str = "") -> Path:
        return self.out / run.name / stage if stage else self.out / run.name

    def stages_of(self, run: Run) -> Iterator[tuple[str, Stage]]:
        """Those that a setting does not skip."""
        for name, stage in self.stages.items():
            if run.overrides[name].get("") != SKIP:
                yield name, stage

    def command(self, run: Run, name: str) -> list[str]:
        """A stage's words behind the interpreter; folders of other stages for their {names}."""
        stage = self.stages[name]
        folders = {other: str(self.folder(run, other)) for other in self.stages}

        def fill(value: Any) -> str:
            words = _plain(value)
            for other, folder in folders.items():
                words = words.replace(f"{{{other}}}", folder)
            return words

        options = {**stage.set, **{k: v for k, v in run.overrides[name].items() if k}}
        if stage.config is None:
            words = [*stage.words]
            for key, value in options.items():
                words += [f"--{key}", *(value if isinstance(value, list) else [value])]
            return [str(shipped(stage.entry)), *map(fill, words)]
        options = self._with_grid(options, run, name)
        options |= {"run.dir": folders[name], "run.seed": run.seed}
        words = [f"--{key}={fill(value)}" for key, value in options.items()]
        return [str(shipped(stage.entry)), "--config", str(shipped(stage.config)), *words]

    def _with_grid(self, options: dict[str, Any], run: Run, name: str) -> dict[str, Any]:
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

    def _grids(self, starts: list[tuple[Run, Any]]) -> set[int | None]:
        """For which grids the encoders have positions that runs start from, "{STAGE}"."""
        grids = set()
        for run, start in starts:
            begun = re.fullmatch(r"\{(\w+)\}", str(start))
            before = begun and self.stages.get(begun[1])
            if before and before.config:
                overrides = before.set | run.overrides[begun[1]]
                grids.add(grid_of_config(shipped(before.config), overrides))
        return grids

    def plan(self, run: Run) -> dict[str, Any]:
        """What a run consists of, wherever its folder is."""
        told = {}
        for name, _ in self.stages_of(run):
            words = [word.replace(str(self.out), "OUT") for word in self.command(run, name)]
            told[name] = [short(word) for word in words]
        return told

    def identity(self) -> dict[str, Any]:
        """What all runs of a folder have in common; settings and seeds may be added to it.

        A config counts by what it sets, not by its words.
        """
        stages = {name: asdict(stage) for name, stage in self.stages.items()}
        for stage in stages.values():
            if stage["config"]:
                stage["config"] += f", which sets {_digest(shipped(stage['config']))}"
        return {"sweep": self.name, "stages": stages}

    def _stored(self) -> dict[str, Any]:
        """The identity that the folder of results was begun with; empty before the first run."""
        try:
            told = json.loads((self.out / SWEEP).read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise_if_machine(error, self.out / SWEEP)
            raise UserError(
                f"{self.out / SWEEP} cannot be read ({error}); name another --out"
            ) from error
        require(
            isinstance(told, dict) and told.get("sweep") == self.name,
            f"{self.out} holds the results of another sweep, {told.get('sweep')!r}, "
            f"not of {self.name!r}; name another --out, or delete it",
        )
        return told

    def claim(self, run: Run) -> None:
        """Make the folders this sweep's, and this run's; a first attempt that trained nothing goes.

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

    def _bind(self, file: Path, told: dict[str, Any]) -> None:
        """Write what identifies a folder, unless it is there and something was begun under it.

        Of several tasks that start together one is first; the others find its file.
        """
        replaces = exists(file)
        if replaces and self._holds_results(file.parent):
            return
        mine = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
        write_text(mine, json.dumps(told, indent=1) + "\n")
        try:
            with contextlib.suppress(FileExistsError):
                (os.replace if replaces else os.link)(mine, file)
        except OSError:  # no links on this file system
            mine.replace(file)
        mine.unlink(missing_ok=True)

    def _holds_results(self, folder: Path) -> bool:
        """Whether a stage below runs, has begun to learn, or has ended."""
        runs = [folder] if exists(folder / PLAN) else [p.parent for p in folder.glob(f"*/{PLAN}")]
        return any(
            _is_locked(run / "lock")
            or any(run.glob(f"*/{DONE}"))
            or any(run.glob("*/checkpoints/step-*"))
            or any(_read(file).get("status") == "finished" for file in run.glob("*/summary.json"))
            for run in runs
        )

    def _check(self, file: Path, told: dict[str, Any]) -> None:
        """
        Raises:
            UserError: the folder's file says otherwise.
        """
        there = {key: value for key, value in _read(file).items() if key != "set"}
        if there == told:
            return
        before, now = set(_words(there)), set(_words(told))
        old, new = min(before - now, default="nothing"), min(now - before, default="nothing")
        what = BEFORE if file.name == SWEEP else "a run with other settings"
        raise UserError(
            f"{file.parent} holds {what}: {old} there, {new} here; name another --out, or delete "
            "it" + "; without --set it is as it was begun" * bool(self.more)
        )

    def state(self, run: Run) -> tuple[str, str]:
        """What stands of a run, and why."""
        last = self.last(run)
        for name, _ in self.stages_of(run):
            folder = self.folder(run, name)
            if self.is_finished(run, name):
                continue
            summary = self.summary(run, name)
            status, steps = summary.get("status"), summary.get("steps")
            mine = last if last.get("stage") == name else {}
            if _is_locked(folder / "lock") or mine and _is_locked(self.folder(run) / "lock"):
                return "running", f"{name}{f', at step {steps}' if steps else ''}"
            if mine.get("code") not in (None, FINISHED, ASKED_TO_STOP):
                return "failed", f"{name}: {mine.get('error') or summary.get('error')}"
            if status == "failed":
                return "failed", f"{name}: {summary.get('error')}"
            if status == "interrupted":
                return "interrupted", f"{name}: asked to stop at step {steps}"
            if mine.get("code") == ASKED_TO_STOP:
                return "interrupted", f"{name}: asked to stop"
            if status is None and not mine:
                return "missing", f"{name} has not run"
            return "interrupted", f"{name}: killed"
        return "finished", ""

    def last(self, run: Run) -> dict[str, Any]:
        """The stage that was started last, the code it left with, and its own sentence."""
        return _read(self.folder(run) / STATE)

    def summary(self, run: Run, name: str) -> dict[str, Any]:
        """What a training run says of itself; empty where it has not begun."""
        return _read(self.folder(run, name) / "summary.json")

    def is_finished(self, run: Run, name: str) -> bool:
        if self.stages[name].config is None:
            return exists(self.folder(run, name) / DONE)
        return self.summary(run, name).get("status") == "finished"

    def run(self, run: Run, launch: list[str]) -> int:
        """All stages of a run that are not finished; the exit code of the last one."""
        left = [name for name, _ in self.stages_of(run) if not self.is_finished(run, name)]
        if left and _read(self.folder(run) / PLAN) != self.plan(run):
            self.check_values(run, left)
        self.claim(run)
        with _locked(self.folder(run)), _asked(self.folder(run) / "stop") as stop:
            for name, stage in self.stages_of(run):
                if self.is_finished(run, name):
                    print(f"{run.name}: {name} is finished", flush=True)
                    continue
                if exists(stop):
                    return ASKED_TO_STOP
                code = self._run_stage(run, name, stage, stop, launch)
                if code != FINISHED:
                    return code
        print(f"{run.name}: finished", flush=True)
        return FINISHED

    def _run_stage(self, run: Run, name: str, stage: Stage, stop: Path, launch: list[str]) -> int:
        folder = self.folder(run, name)
        words = self.command(run, name)
        print(f"{run.name}: {name}: {shlex.join(words)}", flush=True)
        if stage.config is None and folder.is_dir():
            shutil.rmtree(folder)  # what a start that was cut off left
        start = launch if stage.config is not None and launch else [sys.executable]
        before = self.summary(run, name)
        write_text(self.folder(run) / STATE, json.dumps({"stage": name}) + "\n")
        code, said = _call([*start, *words], stop, stage.config and folder)
        summary = self.summary(run, name)
        # accelerate launch turns every failure into 1; what the run itself said is there.
        if code not in CODES and summary != before:
            code = summary.get("exit_code") or code
        if code not in CODES and said:
            code = USER_ERROR
        if code == FINISHED and stage.config is None:
            folder.mkdir(exist_ok=True)
            write_text(folder / DONE, json.dumps({"command": shlex.join(words)}) + "\n")
        told = {"stage": name, "code": code, "error": said or f"left with {code}"}
        write_text(self.folder(run) / STATE, json.dumps(told) + "\n")
        return code

    # -- all runs -------------------------------------------------------------------------------

    def measured(
        self, run: Run, where: str, choices: tuple[str, ...] = ("predicted",)
    ) -> float | None:
        """A measure of a run: STAGE.PATH in its summary.json, or STAGE.PROMPT of an evaluation.

        Args:
            choices: of an evaluation, which of its rows.
        """
        stage, path = self.split(where, "measures")
        folder = self.folder(run, stage)
        try:
            if self.is_evaluation(where):
                told = json.loads((folder / "evaluation.json").read_bytes())["results"]
                return next(
                    100 * row["miou"]["all"]["mean"]
                    for row in told
                    if row["prompt"] == path and row["choice"] in choices
                )
            value = self.summary(run, stage) if self.is_finished(run, stage) else {}
            for part in path.split("."):
                value = value[part]
            return None if value is None else float(value)
        except (OSError, ValueError, KeyError, StopIteration, TypeError) as error:
            raise_if_machine(error, folder)
            if self.is_finished(run, stage) and where not in self.unknown:
                self.unknown.add(where)
                print(f"{folder} is finished and has no {path}", file=sys.stderr)
            return None

    def is_evaluation(self, where: str) -> bool:
        """Whether a measure is an mIoU of tools/evaluate.py."""
        return self.stages[self.split(where, "measures")[0]].entry.endswith("evaluate.py")

    def data_of(self, run: Run, where: str) -> str | None:
        """The data set of the paper's that a measure of a run was measured on, whole, if any."""
        folder = self.folder(run, self.split(where, "measures")[0])
        if self.is_evaluation(where):
            return _read(folder / "evaluation.json").get("data")
        told = (_read(folder / "summary.json").get("evaluation") or {}).get("pictures")
        with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError):
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            return IMAGENET if (told, config["data"]["classes"]) == (50_000, 1_000) else None
        return None

    def unit(self, name: str) -> str:
        """A measure with its unit, as a head of a table or the title of a plot."""
        where = self.measures[name]
        if self.is_evaluation(where):
            return f"{name}, mIoU in %"
        return f"{name}, %" if where.rpartition(".")[2] in PERCENT else name

    def results(self) -> list[dict[str, Any]]:
        """By setting and measure: the values by seed, mean, deviation, and what to compare with.

        That is the paper's number, if all were measured on the data set that it belongs to
        (``paper_on``), and of an mIoU the score that needs no model.
        """
        rows = []
        for setting in self.settings:
            row: dict[str, Any] = {"setting": setting, "measures": {}}
            runs = [run for run in self.runs if run.setting == setting]
            for name, where in self.measures.items():
                found = {run.seed: self.measured(run, where) for run in runs}
                there = [run for run in runs if found[run.seed] is not None]
                values = [found[run.seed] for run in there]
                paper, needs_none = (self.paper.get(name) or {}).get(setting), []
                if not there or {self.data_of(run, where) for run in there} != {self.paper_on}:
                    paper = None
                if self.is_evaluation(where):
                    needs_none = [self.measured(run, where, TRIVIAL) for run in there]
                row["measures"][name] = {
                    "by_seed": found,
                    "mean": statistics.mean(values) if values else None,
                    "std": statistics.stdev(values) if len(values) > 1 else None,
                    "paper": None if self.paper_on is None else paper,
                    "trivial": next((one for one in needs_none if one is not None), None),
                }
            rows.append(row)
        return rows


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind: types, [kind] or {str: kind}; True is no number."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(one, kind[0]) for one in value)
    if isinstance(kind, dict):
        (inner,) = kind.values()
        return isinstance(value, dict) and all(
            isinstance(name, str) and _fits(one, inner) for name, one in value.items()
        )
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return isinstance(value, kinds) and not (isinstance(value, bool) and kinds == (int,))


def _plain(value: Any) -> str:
    """A value as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _value(word: str) -> Any:
    """A value on a command line: YAML, and what is none, such as *.tar, as it is."""
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def _read(file: Path) -> dict[str, Any]:
    """A JSON file of ours; empty where there is none, or none that is whole."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise_if_machine(error, file)
        return {}


def _ask(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, errors="replace")


def _last(words: str) -> str:
    """The sentence that a program ended with."""
    return (words.strip().splitlines() or ["no word"])[-1].removeprefix("error: ")


@cache
def _fields(entry: str, option: str) -> set[str]:
    """All options of an entry, as it tells them itself: group.field, or its own words."""
    done = _ask([sys.executable, str(shipped(entry)), option])
    require(not done.returncode, f"{entry}: {_last(done.stderr)}")
    if option == "--help":
        return set(re.findall(r"--([a-z][a-z-]*)", done.stdout))
    groups = yaml.safe_load(done.stdout)
    return {f"{group}.{name}" for group, told in groups.items() for name in told or {}}


def _digest(config: Path) -> str:
    """Of what a config file sets, not of its words."""
    told = json.dumps(merge(read_layers(str(config), "")), sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _words(told: Any, key: str = "") -> list[str]:
    """Every value in nested dictionaries and lists, with the keys that it stands under."""
    if isinstance(told, dict):
        inner = [(f"{key}.{name}".strip("."), one) for name, one in told.items()]
        return [word for name, one in inner for word in _words(one, name)]
    if isinstance(told, list):
        return [word for one in told for word in _words(one, key)]
    return [f"{key} {told}".removeprefix("stages.")]


@contextlib.contextmanager
def _asked(stop: Path) -> Iterator[Path]:
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


def _call(words: list[str], stop: Path, folder: Path | None) -> tuple[int, str]:
    """Run a program to its end; its exit code, and the last sentence that it ended with an error.

    Args:
        words: its command line.
        stop: once this file is there, the program is asked to stop, ...
        folder: ... a training run by the stop file in its folder, again and again, because one that
            is still starting takes an old stop file away; None: a program that is simply ended and
            starts anew the next time.
    """
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    sentences: list[str] = []

    def pass_on() -> None:
        with process.stderr:
            for line in process.stderr:
                sys.stderr.write(line.decode(errors="replace"))
                sys.stderr.flush()
                found = re.match(rb"(?:rank \d+: )?error: (.*)", line)
                sentences.extend([found[1].decode(errors="replace")] if found else [])

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
def _locked(folder: Path) -> Iterator[None]:
    """
    Raises:
        UserError: another process runs this run.
    """
    import fcntl  # not on Windows

    with (folder / "lock").open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            require(error.errno not in HELD, f"{folder} is being run already; wait for it")
        yield


def _is_locked(path: Path) -> bool:
    """Whether a process, of this machine or another, holds a run's lock."""
    import fcntl

    try:
        with path.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # or it is not there, not ours, or not on a file system with locks
        return exists(path) and os.access(path, os.W_OK) and error.errno in HELD
    return False


def list_runs(sweep: Sweep) -> int:
    sweep.check_fields(list(sweep.stages))
    for number, run in enumerate(sweep.runs):
        words = [
            f"{stage}.{key}={_plain(value)}" if key else f"{stage}: not run"
            for stage, overrides in run.overrides.items()
            for key, value in overrides.items()
        ]
        print(f"{number:4}  {run.name:40} {' '.join(words)} seed={run.seed}")
    return 0


def show_status(sweep: Sweep) -> int:
    names = {run.name for run in sweep.runs} | {SWEEP}
    if exists(sweep.out / SWEEP) or sweep.out.is_dir() and names.isdisjoint(os.listdir(sweep.out)):
        sweep.check_results()
    counts: dict[str, int] = {}
    for number, run in enumerate(sweep.runs):
        status, why = sweep.state(run)
        counts[status] = counts.get(status, 0) + 1
        print(f"{number:4}  {status:12} {run.name:40} {why}".rstrip())
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 0


def _cell(told: dict[str, Any], seeds: int) -> str:
    if told["mean"] is None:
        return "–"
    there = sum(value is not None for value in told["by_seed"].values())
    spread = f" ± {told['std']:.3g}" if told["std"] is not None else ""
    return f"{told['mean']:.4g}{spread}" + (f" ({there} of {seeds})" if there < seeds else "")


def make_table(sweep: Sweep) -> int:
    """To the screen, and as Markdown and JSON."""
    sweep.check_results()
    rows = sweep.results()
    on_paper = {n for n in sweep.measures if any(row["measures"][n]["paper"] for row in rows)}
    head = ["setting"]
    for name in sweep.measures:
        head += [sweep.unit(name)] + [f"{name}, paper, {sweep.paper_on}"] * (name in on_paper)
    body = []
    for row in rows:
        cells = [row["setting"]]
        for name, told in row["measures"].items():
            cells.append(_cell(told, len(sweep.seeds)))
            if name in on_paper:
                cells.append("–" if told["paper"] is None else f"{told['paper']:g}")
        body.append(cells)
    needs_none = {n: [r["measures"][n]["trivial"] for r in rows] for n in sweep.measures}
    needs_none = {n: [one for one in told if one is not None] for n, told in needs_none.items()}
    if any(needs_none.values()):
        cells = [WITHOUT]
        for name, told in needs_none.items():
            cells += [f"{told[0]:.4g}" if told else "–"] + ["–"] * (name in on_paper)
        body.append(cells)
    title = f"{sweep.name}: mean ± standard deviation over {len(sweep.seeds)} seeds"
    if len(sweep.seeds) == 1:
        title = f"{sweep.name}: one seed, so that differences may be chance"
    show_table(title, head, body)
    lines = [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body]]
    write_text(sweep.out / "table.md", "\n".join([title, "", *lines]) + "\n")
    write_text(sweep.out / "table.json", json.dumps(rows, indent=1) + "\n")
    if sweep.paper and not on_paper:
        why = f"are of {sweep.paper_on}, whole, and these runs were not measured on it"
        if sweep.paper_on is None:
            why = f"belong to a data set that {sweep.path} does not name (paper_on)"
        print(f"The paper's numbers {why}: left out.")
    print(f"{sweep.out}/table.md and table.json")
    return 0


def make_plot(sweep: Sweep) -> int:
    """A panel for each measure, as OUT/plot.png."""
    sweep.check_results()
    figure = figure_of(sweep, sweep.results())
    save_png(figure, sweep.out / "plot.png", 120)
    print(f"{sweep.out}/plot.png")
    return 0


def figure_of(sweep: Sweep, rows: list[dict[str, Any]]) -> Figure:
    """Each seed a dot, their mean with its deviation; along numbers where one is varied."""
    (axis,) = sweep.vary.values() if len(sweep.vary) == 1 else (None,)
    numeric = (
        axis is not None
        and len(axis) == len(rows)
        and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in axis)
    )
    places = list(axis) if numeric else list(range(len(rows)))
    names = [plain(textwrap.fill(row["setting"], 24)) for row in rows]
    columns = min(3, len(sweep.measures))
    lines = -(-len(sweep.measures) // columns)
    width = max(4.6, 0.0 if numeric else 0.9 * len(rows))
    figure = new_figure(columns * width, lines * (3.6 if numeric else 4.4) + 0.8)
    handles: dict[str, Any] = {}
    for number, name in enumerate(sweep.measures):
        axes = figure.add_subplot(lines, columns, number + 1)
        told = [row["measures"][name] for row in rows]
        for place, one in zip(places, told, strict=True):
            values = [value for value in one["by_seed"].values() if value is not None]
            (dots,) = axes.plot([place] * len(values), values, "o", color=LINES[0], alpha=0.4)
            handles["each seed"] = dots
        there = [(p, o["mean"], o["std"]) for p, o in zip(places, told, strict=True)]
        there = [one for one in there if one[1] is not None]
        if there:
            xs, means, spread = zip(*there, strict=True)
            bars = [0 if std is None else std for std in spread]
            style = {"color": LINES[0], "capsize": 5, "linewidth": 1.5, "markersize": 14}
            style |= {"fmt": "_-" if numeric else "_"}  # no line between names
            handles["mean, bars: one standard deviation over seeds"] = axes.errorbar(
                xs, means, bars, **style
            )
        paper = [(p, o["paper"]) for p, o in zip(places, told, strict=True) if o["paper"]]
        if paper:
            (handles[f"the paper's, on {sweep.paper_on}"],) = axes.plot(
                *zip(*paper, strict=True), "s--" if numeric else "s", color=LINES[1]
            )
        for value in {o["trivial"] for o in told if o["trivial"] is not None}:
            handles[WITHOUT] = axes.axhline(value, color="#666666", linestyle=(0, (1, 1)))
        unit = sweep.unit(name)
        axes.set(title=plain(unit), ylabel=plain(unit))
        axes.margins(x=0.1)
        if "%" in unit:
            widen(axes, 5, 0, 100)
        elif there:
            widen(axes, 0.1 * max(abs(mean) for mean in means))
        axes.grid(alpha=0.3)
        if numeric:
            axes.set_xlabel(plain(next(iter(sweep.vary)).split(".", 1)[-1]))
            if all(isinstance(place, int) for place in places):
                integer_steps(axes)
        else:
            axes.set_xticks(places, names, rotation=30, ha="right")
    figure.suptitle(f"{plain(sweep.name)}, {len(sweep.seeds)} seed{'s' * (len(sweep.seeds) > 1)}")
    legend_below(figure, handles.values(), list(handles), 2)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = Options(description=__doc__)
    parser.add_argument("what", choices=("list", "run", "status", "table", "plot", "folder"))
    parser.add_argument("sweep", type=local_path)
    parser.add_argument("number", type=int, nargs="?", help="of run and folder")
    parser.add_argument(
        "--out", type=local_path, help="folder of the results; default: the sweep's own"
    )
    parser.add_argument("--set", nargs="+", default=[], help="overrides of every run")
    parser.add_argument("--launch", default="", help="what starts a training, instead of python")
    args = parser.parse_args(argv)
    sweep = Sweep(find(args.sweep), args.out and args.out.resolve(), args.set)
    shown = {"list": list_runs, "status": show_status, "table": make_table, "plot": make_plot}
    if args.what in shown:
        return shown[args.what](sweep)
    require(args.number is not None, f"{args.what} needs the number of a run; list shows them")
    last = len(sweep.runs) - 1
    require(
        0 <= args.number <= last,
        f"{args.sweep} has runs 0 to {last}, and no {args.number}; list shows them",
    )
    if args.what == "folder":
        print(sweep.folder(sweep.runs[args.number]))
        return FINISHED
    code = sweep.run(sweep.runs[args.number], shlex.split(args.launch))
    return code if code in CODES else 1


if __name__ == "__main__":
    sys.exit(run_entry(main))
