"""The paper's claim from end to end, at a size that fits the machine, with numbers.

python tools/chain.py OUT --train PATTERN --val PATTERN [--config toy] [--inits sami random] ...

Trains a teacher by stage 2 from scratch; pretrains a smaller student from its features (SAMI) and,
with mae among --inits, from pixels (MAE); finetunes the student from each start and from random
weights, for the same number of steps, under the teacher's mask decoder, with --seeds seeds;
finetunes the random start once more for as long as SAMI's pretraining and finetuning took together;
evaluates all of them; and writes OUT/comparison.json and OUT/report.html.

The runs are those of configs/finetune/<config>_teacher.yaml, configs/pretrain/<config>.yaml and
configs/finetune/<config>.yaml. Stopped or killed, the same command goes on where it was.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import yaml

from finetune.measures import TRIVIAL, conclusion, paired
from sami.core.checkpoint import write_text
from sami.core.config import require
from sami.core.errors import UserError
from sami.core.exits import run_entry
from sami.core.options import Options
from sami.core.paths import exists, local_path, path_pattern
from sami.core.shipped import shipped
from sami.core.tables import show_table
from sami.grids import grid_of_config

INITS = ("sami", "mae", "random")
LONG = "random, SAMI's time"
MEASURES = ("box", "1 click", "3 clicks")
PROGRESS = re.compile(rb"[a-z ]+ \d+/\d+( |$)")  # lines of sami/core/progress.py, of any program
MAE = (
    "target.kind=pixels",
    "teacher.name=none",
    "teacher.checkpoint=",
    "decoder.kind=self",
    "loss.tokens=masked",
)


class Chain:
    """The runs of one folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        """With the time since the start, in minutes and seconds."""
        passed = int(time.monotonic() - self.started)
        print(f"{passed // 60:02d}:{passed % 60:02d}  {text}", flush=True)

    def call(self, name: str, script: str, *words: str, threads: int) -> None:
        """Run a script to its end; its output goes to OUT/logs, its progress to the screen too.

        Raises:
            UserError: it failed, with its own last words.
        """
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, str(shipped(script)), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        with process, log.open("wb") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if PROGRESS.match(line):
                    self.say(f"{name}: {line.decode(errors='replace').rstrip()}")
        if process.returncode:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            code = process.returncode
            raise UserError(
                f"{script} for {name} left with {code}: {last[-1] if last else 'nothing'} ({log})"
            )

    def together(self, jobs: list[tuple]) -> None:
        """Calls side by side, ``--jobs`` at a time, the cores shared evenly."""
        threads = max(1, cores() // self.args.jobs)
        with ThreadPoolExecutor(self.args.jobs) as pool:
            waiting = [pool.submit(self.call, *job, threads=threads) for job in jobs]
            for one in waiting:
                one.result()

    def words(self, name: str, config: str, *more: str, seed: int = 0) -> list[str]:
        """Of a training run of ours; ``more`` are overrides as group.field=value."""
        options = [
            f"run.dir={self.out / name}",
            f"run.seed={seed}",
            f"data.shards={json.dumps(self.args.train)}",
            f"data.val_shards={json.dumps(self.args.val)}",
            *more,
        ]
        return ["--config", str(shipped(f"configs/{config}")), *(f"--{word}" for word in options)]

    def pretraining(self, init: str) -> tuple:
        """A student's pretraining, for :meth:`together`."""
        how = ("teacher.name=custom", f"teacher.checkpoint={self.out / 'teacher'}")
        if init == "mae":
            how = MAE
        config = f"pretrain/{self.args.config}.yaml"
        return (init, "sami/pretrain.py", *self.words(init, config, *self.args.set_pretrain, *how))

    def tuning(self, name: str, start: str | None, seed: int, *more: str) -> tuple:
        """A student's finetuning, for :meth:`together`."""
        encoder = "null" if start is None else str(self.out / start)
        words = [f"encoder.checkpoint={encoder}", f"decoder.checkpoint={self.out / 'teacher'}"]
        if start is None:
            words.append(f"encoder.grid={self.grid()}")
        config = f"finetune/{self.args.config}.yaml"
        words = self.words(name, config, *words, *self.args.set_finetune, *more, seed=seed)
        return (name, "finetune/train.py", *words)

    def grid(self) -> int | str:
        """Of the pretrained students' positions: a random start has the same."""
        pairs = (word.partition("=") for word in self.args.set_pretrain)
        overrides = {key: yaml.safe_load(value) for key, _, value in pairs}
        file = shipped(f"configs/pretrain/{self.args.config}.yaml")
        return grid_of_config(file, overrides) or "null"

    def evaluation(self, name: str) -> tuple | None:
        """A model's evaluation, for :meth:`together`; None if it is there."""
        out = self.out / name / "evaluation"
        if exists(out / "evaluation.json"):
            return None
        words = [str(self.out / name), "--shards", *self.args.val, "--prompts", "box", "1", "3"]
        words += ["--out", str(out), "--workers", "0"]
        words += ["--overlays", "4" if name == "teacher" or name.endswith("-0") else "0"]
        if self.args.val_masks:
            words += ["--masks", str(self.args.val_masks)]
        return (f"{name}-evaluation", "tools/evaluate.py", *words)

    def seconds(self, name: str) -> float:
        """What a run's steps took, without its start and its evaluations."""
        before, total = 0, 0.0
        for line in self.metrics(name):
            total += line["seconds_per_step"] * (line["step"] - before)
            before = line["step"]
        return total

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines of a run's metrics.jsonl."""
        lines = (self.out / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def train(self) -> dict[str, list[str]]:
        """All trainings; the runs of each start, one per seed."""
        args = self.args
        everything = cores()
        self.say("1/4  teacher: stage 2 from scratch")
        words = self.words("teacher", f"finetune/{args.config}_teacher.yaml", *args.set_teacher)
        self.call("teacher", "finetune/train.py", *words, threads=everything)
        runs = {init: [f"{init}-{seed}" for seed in range(args.seeds)] for init in args.inits}
        pretrained = [init for init in args.inits if init != "random"]
        tuned = [self.tuning(name, None, seed) for seed, name in enumerate(runs.get("random", []))]
        self.say(f"2/4  students: {' and '.join(pretrained)} pretraining, random finetuned")
        self.together([*map(self.pretraining, pretrained), *tuned])
        tuned = [
            self.tuning(name, init, seed)
            for init in pretrained
            for seed, name in enumerate(runs[init])
        ]
        words = f"3/4  students: {' and '.join(pretrained)} finetuned"
        if {"sami", "random"} <= set(args.inits):
            steps = self.long_steps(runs["random"])
            runs[LONG] = [f"random_long-{seed}" for seed in range(args.seeds)]
            words += f"; random for SAMI's whole time, {steps} steps"
            tuned = [
                self.tuning(name, None, seed, f"train.steps={steps}")
                for seed, name in enumerate(runs[LONG])
            ] + tuned  # the longest first, so that all end together
        self.say(words)
        self.together(tuned)
        return runs

    def long_steps(self, random: list[str]) -> int:
        """Steps of the random start in the time of SAMI's pretraining and as much finetuning."""
        stored = self.out / "long_steps.json"  # the same when the chain goes on after a stop
        if not exists(stored):
            tuned = statistics.mean(self.seconds(name) for name in random)
            steps = self.metrics(random[0])[-1]["step"]
            write_text(stored, json.dumps(round((self.seconds("sami") / tuned + 1) * steps)))
        return json.loads(stored.read_bytes())

    def compare(self, runs: dict[str, list[str]]) -> dict[str, Any]:
        """mIoU of each start and its paired differences from SAMI's, by measure."""
        self.say("4/4  evaluating")
        names = ["teacher", *(name for group in runs.values() for name in group)]
        self.together([job for job in map(self.evaluation, names) if job])
        scores = {init: [self.scores(name) for name in group] for init, group in runs.items()}
        rows = [
            {"start": init, "steps": self.metrics(runs[init][0])[-1]["step"]}
            | {"pretraining_seconds": self.seconds(init) if init in ("sami", "mae") else 0.0}
            | {"finetuning_seconds": statistics.mean(self.seconds(n) for n in runs[init])}
            | {measure: [one[measure] for one in told] for measure in MEASURES}
            for init, told in scores.items()
        ]
        differences = [
            {"other": other, "measure": measure}
            | paired([s[measure] - o[measure] for s, o in zip(scores["sami"], told, strict=True)])
            for other, told in scores.items()
            if "sami" in scores and other != "sami"
            for measure in MEASURES
        ]
        return {
            "teacher": self.scores("teacher"),
            "trivial": self.scores("teacher", TRIVIAL),
            "rows": rows,
            "differences": differences,
        }

    def scores(self, name: str, choices: tuple[str, ...] = ("predicted",)) -> dict[str, float]:
        """mIoU of a run by measure; of TRIVIAL, what needs no model, the same of every run."""
        told = json.loads((self.out / name / "evaluation" / "evaluation.json").read_bytes())
        return {
            row["prompt"]: row["miou"]["all"]["mean"]
            for row in told["results"]
            if row["choice"] in choices
        }


def cores() -> int:
    """Threads to be had; OMP_NUM_THREADS may allow fewer than there are cores."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return int(allowed) if allowed.isdigit() and int(allowed) else os.cpu_count() or 1


def show(found: dict[str, Any]) -> None:
    """The comparison for a terminal, and what it allows to say."""

    def cells(told: dict[str, float]) -> list[str]:
        return [f"{100 * told[measure]:.1f}" for measure in MEASURES]

    rows = [["teacher", "-", "-", *cells(found["teacher"])]]
    for row in found["rows"]:
        told = [row[measure] for measure in MEASURES]
        scores = [f"{100 * statistics.mean(values):.1f}" for values in told]
        if len(told[0]) > 1:
            spans = [f" ({100 * min(v):.1f}-{100 * max(v):.1f})" for v in told]
            scores = [score + span for score, span in zip(scores, spans, strict=True)]
        times = [f"{row['pretraining_seconds']:.0f} s", f"{row['finetuning_seconds']:.0f} s"]
        rows.append([f"{row['start']} ({row['steps']} steps)", *times, *scores])
    rows.append(["without a model", "-", "-", *cells(found["trivial"])])
    caption = (
        f"Mean over {len(found['rows'][0]['box'])} seed(s) of the finetuning (lowest-highest). "
        "Without a model: the box filled; a disc of one size at the clicks."
    )
    head = ["start", "pretrain", "finetune", *MEASURES]
    show_table("mIoU in %", head, rows, caption)
    if found["differences"]:
        print("The SAMI-pretrained student, by")
    for one in found["differences"]:
        print(textwrap.fill(conclusion(one, found), 80, subsequent_indent="  "))


def main(argv: list[str] | None = None) -> int:
    parser = Options(description=__doc__)
    parser.add_argument("out", type=local_path, help="folder for all runs and the report")
    parser.add_argument(
        "--train", type=path_pattern, nargs="+", required=True, help="shards of SA-1B's layout"
    )
    parser.add_argument(
        "--val", type=path_pattern, nargs="+", required=True, help="held-out shards"
    )
    parser.add_argument("--config", default="toy", help="name of the configs; default: toy")
    parser.add_argument("--inits", nargs="+", default=["sami", "random"], choices=INITS)
    parser.add_argument("--seeds", type=int, default=3, help="of the finetuning")
    parser.add_argument("--jobs", type=int, default=2, help="finetunings side by side")
    parser.add_argument("--val-masks", type=int, help="objects of a picture that are evaluated")
    for stage in ("teacher", "pretrain", "finetune"):
        parser.add_argument(
            f"--set-{stage}",
            nargs="+",
            default=[],
            metavar="group.field=value",
            help=f"overrides of the {stage} config",
        )
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        require(getattr(args, name) > 0, f"--{name} {getattr(args, name)} must be positive")
    args.inits = [init for init in INITS if init in args.inits]
    for file in (f"finetune/{args.config}_teacher", f"pretrain/{args.config}"):
        path = shipped(f"configs/{file}.yaml")
        require(exists(path), f"--config {args.config}: there is no {path}")

    chain = Chain(args)
    found = chain.compare(chain.train())
    found["command"] = shlex.join([sys.argv[0], *argv] if argv is not None else sys.argv)
    write_text(args.out / "comparison.json", json.dumps(found, indent=1) + "\n")
    show(found)
    runs = ["teacher", *(init for init in args.inits if init != "random")]
    runs += [f"{init}-0" for init in args.inits]
    runs += ["random_long-0"] * exists(args.out / "random_long-0")
    words = [str(args.out / name) for name in runs]
    words += ["--comparison", str(args.out / "comparison.json")]
    report = args.out / "report.html"
    chain.call("report", "tools/report.py", *words, "--out", str(report), threads=1)
    chain.say(f"the report: {report.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
