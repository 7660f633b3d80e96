"""A sweep's file: stages, settings and seeds, and the numbered runs that they make."""

import copy
import dataclasses
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from sami.core.config import require
from sami.core.configfile import meant_for, read_yaml
from sami.core.entries import ENTRIES
from sami.core.errors import UserError, raise_if_machine
from sami.core.paths import expand_path, is_file
from sami.core.shipped import HOME, shipped

SWEEP = "sweep.json"  # in the folder of results: what identifies them
SKIP, CONFIG, ARGV = "skip", "config", "words"  # of a setting: no stage; a stage's own
SEE = "see docs/sweeps_and_slurm.md"
# Text stays text, also what YAML would read as something else: str comes first.
Scalar = str | int | float | bool | None
Value = Scalar | list[Scalar] | dict[str, Scalar]


@dataclass
class Stage:
    """One program of a chain.

    Attributes:
        entry: path of the script; one with ``config`` is a training run, with a folder and a seed
            of its own.
        config: of the entry.
        set: overrides in every run; options, for an entry without a config.
        words: what stands in front of the options of an entry without a config.
        seed: the same in every run, in place of the run's. What several runs have in common, down
            to the last option, is run once.
    """

    entry: str
    config: str | None = None
    set: dict[str, Value] = field(default_factory=dict)
    words: list[Scalar] = field(default_factory=list)
    seed: int | None = None


@dataclass
class SweepFile:
    """A file of configs/sweeps/, as docs/sweeps_and_slurm.md has it."""

    stages: dict[str, Stage]
    seeds: list[int]
    measures: dict[str, str]
    out: str | None = None
    vary: dict[str, list[Scalar]] | None = None
    settings: dict[str, dict[str, Value] | None] | None = None
    paper: dict[str, dict[str, float | None]] | None = None
    paper_on: str | None = None
    compare: str | None = None


def parse(kind: type, content: dict[str, Any], name: str, where: str = "", see: str = SEE) -> Any:
    """The dataclass that a part of a sweep's file is, or of another one.

    Args:
        name: of the file, for errors.
        where: of the part; else the key that is wrong is named.
        see: what errors end with.

    Raises:
        UserError: it is not.
    """
    known = [one.name for one in dataclasses.fields(kind)]
    for key in content:
        require(key in known, f"{name}: {key} is none of {', '.join(known)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        return parser.instantiate(parser.parse_object(copy.deepcopy(content)))
    except ArgumentError as error:
        key = where or re.sub(r'.*?Parser key "(\w+)".*', r"\1", str(error), flags=re.DOTALL)
        raise UserError(f"{name}: {key} is not what it should be; {see}") from error


@dataclass
class Trial:
    """One setting with one seed: the overrides of each of its stages."""

    name: str
    setting: str
    seed: int
    overrides: dict[str, dict[str, Any]]

    def value(self, key: str) -> Any:
        """Of STAGE.GROUP.FIELD; None where nothing is overridden."""
        stage, _, name = key.partition(".")
        return self.overrides[stage].get(name)

    def skips(self, stage: str) -> bool:
        return self.overrides[stage].get("") == SKIP


class Spec:
    """What a sweep's file says, with what the command line adds to it."""

    def __init__(
        self,
        path: Path,
        out: Path | None = None,
        more: list[str] | None = None,
        seeds: int | None = None,
        only: list[str] | None = None,
    ) -> None:
        """
        Args:
            out: the folder of the results, in place of the file's.
            more: overrides of every run, STAGE.GROUP.FIELD=VALUE.
            seeds: only the first so many.
            only: only these settings.

        Raises:
            UserError: it cannot be read, or is not what a sweep consists of.
        """
        content = read_yaml(path, "", "configs/sweeps/")
        if "stages" not in content:
            other = meant_for(content, str(path))
            require(other is None, f"{path} {other}")
            known = {one.name for one in dataclasses.fields(SweepFile)}
            require(content.keys() <= known, f"{path} is no sweep; see configs/sweeps/")
        for key in ("stages", "seeds", "measures"):
            require(bool(content.get(key)), f"{path} has no {key}; see configs/sweeps/")
        named = content["stages"]
        require(isinstance(named, dict), f"{path}: stages is not what it should be; {SEE}")
        for name, info in named.items():
            where = f"stages.{name}"
            require(isinstance(info, dict), f"{path}: {where} is not what it should be; {SEE}")
            self.check_stage(path, where, parse(Stage, info, str(path), where))
        file: SweepFile = parse(SweepFile, content, str(path))
        self.path, self.name, self.stages = path, path.stem, file.stages
        out_of_file = expand_path(file.out or f"runs/sweeps/{path.stem}", f"{path}: out")
        self.out = out or HOME / out_of_file
        self.seeds, self.measures = file.seeds[:seeds], file.measures
        self.paper, self.paper_on = file.paper or {}, file.paper_on
        self.vary = file.vary or {}
        self.override(more or self.remembered())
        for where in self.measures.values():
            self.split(where, "measures")
        self.seeds_of: dict[str, list[int]] = {}  # by setting
        self.against: dict[str, str] = {}  # with which setting one is compared
        self.settings = self.find_settings(file.settings or {"": {}}, file.compare)
        for name in only or []:
            known = ", ".join(self.settings)
            require(name in self.settings, f"{path}: --settings: {name} is none of {known}")
        if only:
            self.settings = {name: self.settings[name] for name in self.settings if name in only}
        self.runs = self.find_runs()

    @staticmethod
    def check_stage(path: Path, where: str, stage: Stage) -> None:
        """
        Raises:
            UserError: a file that a stage needs is not there, or its config has no entry.
        """
        for file in (stage.entry, stage.config):
            require(file is None or is_file(shipped(file)), f"{path}: {where}: there is no {file}")
        require(
            stage.config is None or stage.entry in ENTRIES,
            f"{path}: {where}: config goes with one of {', '.join(ENTRIES)}; a program without "
            "one has words and set",
        )

    def remembered(self) -> list[str]:
        """The overrides that the folder of results was begun with; none before the first run.

        Raises:
            UserError: another sweep's results are there.
        """
        file = self.out / SWEEP
        try:
            stored = json.loads(file.read_bytes())
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise_if_machine(error, file)
            raise UserError(f"{file} cannot be read ({error}); name another --out") from error
        require(
            isinstance(stored, dict) and stored.get("sweep") == self.name,
            f"{self.out} holds the results of another sweep, {stored.get('sweep')!r}, "
            f"not of {self.name!r}; name another --out, or delete it",
        )
        return stored.get("set", [])

    def override(self, more: list[str]) -> None:
        """What ``--set`` says, in every run.

        Raises:
            UserError: it is no override, or of what is varied.
        """
        self.more = more
        for argument in more:
            key, equals, value = argument.partition("=")
            stage, name = self.split(key, "--set") if equals else ("", "")
            require(bool(name), f"--set {argument} must be STAGE.GROUP.FIELD=VALUE")
            require(
                key not in self.vary,
                f"--set {argument}: {key} is what the sweep varies; change vary in {self.path}",
            )
            self.stages[stage].set[name] = _value(value)

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

    def find_settings(
        self, named: dict[str, dict[str, Any] | None], compare: str | None
    ) -> dict[str, dict[str, Any]]:
        """Each named setting with each combination of what is varied.

        Args:
            compare: the setting that the others are compared with, where their values are the same.
        """
        found: dict[str, dict[str, Any]] = {}
        for values in itertools.product(*self.vary.values()):
            varied = dict(zip(self.vary, values, strict=True))
            words = [f"{key.split('.', 1)[-1]} {value}" for key, value in varied.items()]
            for name, overrides in named.items():
                whole = ", ".join(filter(None, [str(name), *words]))
                require(whole not in found, f"{self.path}: two settings have the name '{whole}'")
                own = dict(overrides or {})
                seeds = self.seeds_of[whole] = own.pop("seeds", self.seeds)
                right = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
                require(right, f"{self.path}: settings.{name}: seeds must be a list of integers")
                for key, value in own.items():
                    where = f"{self.path}: settings.{name}: {key}"
                    require(key not in varied, f"{where} is varied too")
                    if other := time_of(value):
                        own[key] = f"{{time of {', '.join([other, *words])}}}"
                if compare not in (None, name, whole) and seeds is self.seeds:
                    first = compare if compare not in named else ", ".join([compare, *words])
                    self.against[whole] = first
                found[whole] = own | varied
        known = ", ".join(dict.fromkeys([*filter(None, named), *found]))
        right = compare is None or compare in named or compare in found
        require(right, f"{self.path}: compare: {compare} is none of {known}")
        return found

    def find_runs(self) -> list[Trial]:
        """Every setting with every seed, by number."""
        runs: dict[str, Trial] = {}
        for setting, overrides in self.settings.items():
            by_stage: dict[str, dict[str, Any]] = {name: {} for name in self.stages}
            for key, value in overrides.items():
                where = f"{self.path}: settings.{setting}: {key}"
                stage, name = self.split(key, f"settings.{setting}")
                require(bool(name) or value == SKIP, f"{where} can only be {SKIP}")
                if name == CONFIG and self.stages[stage].config:
                    require(is_file(shipped(str(value))), f"{where}: there is no {value}")
                require(name != ARGV or isinstance(value, list), f"{where} must be a list of words")
                by_stage[stage][name] = value
            for seed in self.seeds_of[setting]:
                name = f"{slug(setting) or 'run'}_seed-{seed}"
                require(
                    name not in runs,
                    f"{self.path}: two runs have the name {name}; name the settings, or the "
                    "seeds, apart",
                )
                runs[name] = Trial(name, setting, seed, by_stage)
        return list(runs.values())

    def runs_of(self, setting: str | None) -> list[Trial]:
        return [run for run in self.runs if run.setting == setting]


def time_of(value: Any) -> str | None:
    """SETTING of "{time of SETTING}"."""
    found = re.fullmatch(r"\{time of (.+)\}", value) if isinstance(value, str) else None
    return found and found[1]


def slug(setting: str) -> str:
    """A setting's name as a folder's."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", setting).strip("-")


def _value(word: str) -> Any:
    """A value on a command line: YAML, and what is none, such as *.tar, as it is."""
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word
