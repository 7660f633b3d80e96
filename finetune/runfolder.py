"""What a run, or an evaluation, left behind, for those that read it; runs that belong together."""

import json
import os
import statistics
from pathlib import Path
from typing import Any

import yaml

from finetune.measures import TRIVIAL
from sami.core.config import require
from sami.core.entries import entry_of_groups
from sami.core.errors import UserError, raise_if_machine
from sami.core.metrics import MetricsFile
from sami.core.paths import exists
from sami.core.tables import percent

PROMPT_NAMES = ("box", "1_click", "3_clicks")
TO_TEACHER = {  # of distillation, whose truth is the teacher's masks
    "teacher_1_click": "to the teacher's masks by 1 click",
    **{
        f"teacher_pair_{n}": f"to the teacher's masks by two points {n} px apart"
        for n in range(100, 600, 100)
    },
}


class RunFolder:
    """What a run, or an evaluation, left behind.

    Attributes:
        name: what tells it from the others; set by :func:`name_apart`.
        kind: the entry's name (pretrain, finetune ...), evaluate for the folder of an evaluation,
            or failed for a start that never became a run.
        config: every field, as group.field.
        evaluation: what tools/evaluate.py found, if it was asked.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: neither.
        """
        self.path, self.name = path.resolve(), path.name
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.metrics: list[dict[str, Any]] = []
        self.kind, self.drawn, self.evaluation = "evaluate", path, None
        try:
            if not exists(path / "evaluation.json"):
                self.drawn = path / "evaluation"
                self.summary = json.loads((path / "summary.json").read_bytes())
                self.kind = "failed"
                if self.summary.get("status") != "failed" or exists(path / "config.yaml"):
                    groups = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
                    self.config = {f"{g}.{f}": v for g, of in groups.items() for f, v in of.items()}
                    self.metrics = MetricsFile(path / "metrics.jsonl").read()
                    self.kind = entry_of_groups(groups).name
            if exists(self.drawn / "evaluation.json"):
                self.evaluation = json.loads((self.drawn / "evaluation.json").read_bytes())
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise_if_machine(error, path)
            why = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise UserError(
                f"{path} is not the folder of a run that has begun ({why}); name one with "
                "summary.json, config.yaml and metrics.jsonl, or one of tools/evaluate.py; of a "
                "sweep, NAME/*/STAGE"
            ) from error

    @property
    def failure(self) -> str:
        """What became of a start that failed, as a sentence."""
        entry, why = self.summary.get("entry"), self.summary.get("error")
        return f"{self.path} is a start of {entry} that failed and left no run: {why}"

    @property
    def step(self) -> int:
        """Where the run stands: at its end, or in its last recorded line."""
        last = self.metrics[-1]["step"] if self.metrics else 0
        return self.summary.get("steps", last)

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a number, where it was recorded."""
        info = [(line["step"], line[name]) for line in self.metrics if line.get(name) is not None]
        return [step for step, _ in info], [value for _, value in info]

    def images(self, most: int) -> list[tuple[str, Path]]:
        """What was drawn while training, first to last, ``most`` of them, evenly; and after it."""
        drawn = sorted(self.path.glob("pictures/*.png"))
        count = min(most, len(drawn))
        places = [round(i * (len(drawn) - 1) / max(count - 1, 1)) for i in range(count)]
        found = [(self._when(drawn[place]), drawn[place]) for place in places]
        masks = self.drawn / "masks.png"
        return found + [("evaluated", masks)] * exists(masks)

    @property
    def numbers(self) -> dict[str, tuple[float, str, str]]:
        """A run's main numbers: value, interval over images, and what needs no model."""
        found: dict[str, tuple[float, str, str]] = {}
        if self.evaluation:
            rows = self.evaluation["results"]
            trivial = {
                r["prompt"]: r["miou"]["all"]["mean"] for r in rows if r["choice"] in TRIVIAL
            }
            for row in rows:
                prompt, info = row["prompt"], row["miou"]["all"]
                if row["choice"] == "predicted" and info["mean"] is not None:
                    low, high = percent(info["low"]), percent(info["high"])
                    span = f"95 % of images' resamples {low}-{high}"
                    known = prompt in trivial
                    without = f"without a model {percent(trivial[prompt])}" if known else ""
                    found[f"mIoU in % by {prompt}"] = (100 * info["mean"], span, without)
            return found
        info = self.summary.get("evaluation") or {}
        if info.get("r2") is not None:
            found["r2"] = (info["r2"], "", "the best constant map 0")
        for name in (*PROMPT_NAMES, *TO_TEACHER):
            if info.get(f"miou_{name}") is not None:
                share, value = info.get(f"trivial_{name}"), 100 * info[f"miou_{name}"]
                without = "" if share is None else f"without a model {percent(share)}"
                words = TO_TEACHER.get(name, f"by {name.replace('_', ' ')}")
                found[f"mIoU in % {words}"] = (value, "", without)
        if info.get("top1") is not None:
            share, count = info["top1"] / 100, info["pictures"]
            half = 196 * (share * (1 - share) / count) ** 0.5
            span = f"± {half:.1f}, the 95 % interval of {count:.0f} images"
            found["top-1 in %"] = (info["top1"], span, "")
        return found

    def _when(self, image: Path) -> str:
        """The step, and the epoch where the run knows its epochs, of an image's name."""
        step = int(image.stem.rpartition("-")[2])
        images = (self.summary.get("data") or {}).get("pictures")
        batch = self.config.get("train.batch_size")
        epoch = f", epoch {step * batch / images:.3g}" if images and batch else ""
        return f"step {step}{epoch}"


def name_apart(runs: list[RunFolder]) -> None:
    """Name each by as much of its path as tells it from the others."""
    for parts in range(1, max(len(run.path.parts) for run in runs) + 1):
        names = ["/".join(run.path.parts[-parts:]) for run in runs]
        if len(set(names)) == len(runs):
            break
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"{twice} is named twice; name each run once")
    for run, name in zip(runs, names, strict=True):
        run.name = name


def settings_of(runs: list[RunFolder]) -> dict[str, list[RunFolder]]:
    """The runs that differ in nothing but their seed, together, by what their names share."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        seed = run.config.get("run.seed")
        info = {k: v for k, v in run.config.items() if k not in ("run.dir", "run.seed")}
        # What they start from lies in folders named by the seed, as a sweep has it.
        key = json.dumps(info).replace(f"seed-{seed}", "seed")
        twice = seed in [other.config.get("run.seed") for other in groups.get(key, [])]
        groups.setdefault(f"{key} {run.name}" if twice else key, []).append(run)
    named = {}
    for group in groups.values():
        names = [run.name for run in group]
        start = os.path.commonprefix(names)
        end = os.path.commonprefix([name[len(start) :][::-1] for name in names])[::-1]
        shared = start.rstrip("-_").removesuffix("seed").rstrip("-_/") + end
        named[names[0] if len(names) == 1 or shared in named or not shared else shared] = group
    return named


def mean_and_std(group: list[RunFolder], name: str) -> tuple[list[int], list[float], list[float]]:
    """Steps, mean over seeds and standard deviation (0 of one seed) where all recorded a number."""
    info = [dict(zip(*run.column(name), strict=True)) for run in group]
    info = [one for one in info if one]
    steps = sorted(set.intersection(*map(set, info))) if info else []
    values = [[one[step] for one in info] for step in steps]
    spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    return steps, [statistics.mean(v) for v in values], spread
