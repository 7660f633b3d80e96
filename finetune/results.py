"""What the runs of a sweep measured, from what their stages left behind."""

import contextlib
import json
import statistics
import sys
from typing import Any

import yaml

from finetune.measures import DATA_SETS, TRIVIAL
from sami.core.config import require
from sami.core.errors import raise_if_machine
from sami.core.tables import Results
from sami.sweepfile import Trial
from sami.sweeps import Sweep, read, seconds_of

IMAGENET = "ImageNet"  # known by its 50,000 validation images and 1,000 classes
PERCENT = ("top1", "top5", "knn", "linear")  # measures of summary.json that are in %


class ResultsReader:
    """Reads what the runs of a sweep measured."""

    def __init__(self, sweep: Sweep) -> None:
        """
        Raises:
            UserError: the sweep names a data set of the paper's that is none.
        """
        known = (IMAGENET, *DATA_SETS)
        require(
            sweep.paper_on in (None, *known),
            f"{sweep.path}: paper_on {sweep.paper_on} is none of {', '.join(known)}, the data sets "
            "that are recognised",
        )
        self.sweep = sweep
        self.unknown: set[str] = set()  # measures that nothing had

    def is_evaluation(self, where: str) -> bool:
        """Whether a measure is an mIoU of tools/evaluate.py."""
        stage, _ = self.sweep.split(where, "measures")
        return self.sweep.stages[stage].entry.endswith("evaluate.py")

    def measured(
        self, run: Trial, where: str, choices: tuple[str, ...] = ("predicted",)
    ) -> float | None:
        """A measure of a run: STAGE.PATH in its summary.json, or STAGE.PROMPT of an evaluation.

        Args:
            choices: of an evaluation, which of its rows.
        """
        stage, path = self.sweep.split(where, "measures")
        folder = self.sweep.folder(run, stage)
        ended = not run.skips(stage) and self.sweep.is_finished(run, stage)
        try:
            if self.is_evaluation(where):
                results = json.loads((folder / "evaluation.json").read_bytes())["results"]
                return next(
                    100 * row["miou"]["all"]["mean"]
                    for row in results
                    if row["prompt"] == path and row["choice"] in choices
                )
            if ended and path == "seconds":
                return seconds_of(folder)
            value = self.sweep.summary(run, stage) if ended else {}
            for part in path.split("."):
                value = value[part]
            return None if value is None else float(value)
        except (OSError, ValueError, KeyError, StopIteration, TypeError) as error:
            raise_if_machine(error, folder)
            if ended and where not in self.unknown:
                self.unknown.add(where)
                print(f"{folder} is finished and has no {path}", file=sys.stderr)
            return None

    def data_of(self, run: Trial, where: str) -> str | None:
        """The data set of the paper's that a measure of a run was measured on, whole, if any."""
        folder = self.sweep.folder(run, self.sweep.split(where, "measures")[0])
        if self.is_evaluation(where):
            return read(folder / "evaluation.json").get("data")
        images = (read(folder / "summary.json").get("evaluation") or {}).get("pictures")
        with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError):
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            return IMAGENET if (images, config["data"]["classes"]) == (50_000, 1_000) else None
        return None

    def unit(self, name: str) -> str:
        """A measure with its unit, as a head of a table or the title of a plot."""
        where = self.sweep.measures[name]
        if self.is_evaluation(where):
            return f"{name}, mIoU in %"
        return f"{name}, %" if where.rpartition(".")[2] in PERCENT else name

    def row(self, setting: str) -> dict[str, Any]:
        """What a setting measured: each seed, mean, deviation, the paper's, and without a model."""
        sweep, measures = self.sweep, {}
        for name, where in sweep.measures.items():
            stage = sweep.split(where, "measures")[0]
            runs = {sweep.folder(run, stage): run for run in reversed(sweep.runs_of(setting))}
            found = {run.seed: self.measured(run, where) for run in reversed(runs.values())}
            there = [run for run in runs.values() if found[run.seed] is not None]
            values = [value for value in found.values() if value is not None]
            data, trivial = {self.data_of(run, where) for run in there}, []
            on_paper = sweep.paper_on is not None and data == {sweep.paper_on}
            if self.is_evaluation(where):
                trivial = [self.measured(run, where, TRIVIAL) for run in there]
            measures[name] = {
                "by_seed": found,
                "mean": statistics.mean(values) if values else None,
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "paper": (sweep.paper.get(name) or {}).get(setting) if on_paper else None,
                "trivial": next((one for one in trivial if one is not None), None),
            }
        return {"setting": setting, "against": sweep.against.get(setting), "measures": measures}

    def results(self) -> Results:
        """What a table, a plot and a report show."""
        sweep = self.sweep
        units = {name: self.unit(name) for name in sweep.measures}
        rows = [self.row(setting) for setting in sweep.settings]
        return Results(sweep.name, len(sweep.seeds), units, rows, sweep.paper_on)
