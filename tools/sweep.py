"""Many runs from one file: settings times seeds, each a chain of stages, and their table.

python tools/sweep.py list   SWEEP      the numbered runs and their overrides
python tools/sweep.py run    SWEEP N    run N here, from where it is; finished stages stay
python tools/sweep.py run    SWEEP all  all of them, --jobs stages side by side; see OUT/logs
python tools/sweep.py status SWEEP      finished, running, interrupted, failed, missing
python tools/sweep.py table  SWEEP      mean and deviation by setting: OUT/table.md, table.json
python tools/sweep.py plot   SWEEP      the same as OUT/plot.png
python tools/sweep.py folder SWEEP N    where run N is
    [--out DIR] [--set STAGE.GROUP.FIELD=VALUE ...] [--launch 'accelerate launch ...']
    [--seeds COUNT] [--settings NAME ...] [--jobs COUNT]

SWEEP is one of configs/sweeps/. --set changes every run, such as --set pretrain.data.shards=...;
it is remembered and need not be said again. Results of other overrides, of another config or of a
sweep file as it was before are refused, not mixed in; settings and seeds may be added.
`run` leaves with the exit code of the stage that did not finish: 75 if it was asked to stop
(SIGTERM, SIGUSR1, Ctrl-C, or a file OUT/RUN/stop; of all, OUT/stop); run it again.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

from finetune.results import ResultsReader
from sami.core.checkpoint import write_text
from sami.core.config import load_config, require
from sami.core.configfile import types_of
from sami.core.entries import ENTRIES
from sami.core.errors import UserError
from sami.core.exits import ASKED_TO_STOP, FINISHED, USER_ERROR, run_entry
from sami.core.options import Options, require_least
from sami.core.paths import exists, local_path
from sami.core.plots import results_figure, save_png
from sami.core.programs import locked, run_program, stop_on_signal
from sami.core.shipped import find, shipped
from sami.core.tables import show_table
from sami.sweepfile import Trial
from sami.sweeps import DONE, PLAN, STATE, SWEEP, Sweep, plain, read

CODES = (FINISHED, USER_ERROR, ASKED_TO_STOP)


@cache
def options_of(entry: str) -> set[str]:
    """What a program without a config can be told, as it says itself."""
    argv = [sys.executable, str(shipped(entry)), "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace")
    last = (done.stderr.strip().splitlines() or ["no word"])[-1].removeprefix("error: ")
    require(not done.returncode, f"{entry}: {last}")
    return set(re.findall(r"--([a-z][a-z-]*)", done.stdout))


def check(sweep: Sweep, runs: list[Trial], values: bool = True) -> None:
    """
    Args:
        values: whether the trainings that are not finished would take what they are told, too: said
            now, not after the stages before them.

    Raises:
        UserError: they would not; or an override of what a stage does not have.
    """
    for run in runs:
        for name, stage in sweep.stages_of(run):
            known, shown = set(), "--print_config"
            if stage.config is None:
                known, shown = options_of(stage.entry), "--help"
            elif not values:
                known = set(types_of(ENTRIES[stage.entry].config_class))
            elif sweep.is_finished(run, name):
                continue
            else:
                try:
                    load_config(ENTRIES[stage.entry].config_class, sweep.command(run, name, 1)[1:])
                except UserError as error:
                    raise UserError(f"{sweep.path}: {name}: {error}") from error
                continue
            for key in sorted(sweep.arguments(run, name)[2]):
                require(
                    key in known,
                    f"{sweep.path}: {name}.{key} is no field of {stage.entry}; python "
                    f"{stage.entry} {shown} shows them",
                )


# -- running ------------------------------------------------------------------------------------


def run_here(sweep: Sweep, run: Trial, launch: list[str]) -> int:
    """All stages of a run that are not finished; the exit code of the last one."""
    if read(sweep.folder(run) / PLAN) != sweep.plan(run):
        check(sweep, [run])
    for name, _ in sweep.stages_of(run):
        sweep.steps_of(run, name)  # refuses now what has to wait for other runs
    sweep.claim(run)
    folder = sweep.folder(run)
    with locked(folder / "lock"), stop_on_signal(folder / "stop") as stop:
        for name, _ in sweep.stages_of(run):
            if sweep.is_finished(run, name):
                print(f"{run.name}: {name} is finished", flush=True)
                continue
            if exists(stop):
                return ASKED_TO_STOP
            code, _ = run_stage(sweep, run, name, stop, launch)
            if code != FINISHED:
                return code
    print(f"{run.name}: finished", flush=True)
    return FINISHED


def run_stage(
    sweep: Sweep, run: Trial, name: str, stop: Path, launch: list[str], **how: Any
) -> tuple[int, str]:
    """A stage of a run: its exit code, and its own sentence. ``how`` goes to run_program."""
    stage, folder, mine = sweep.stages[name], sweep.folder(run, name), sweep.folder(run)
    argv = sweep.command(run, name, sweep.steps_of(run, name))

    def wait_for_it() -> bool:
        time.sleep(1)
        return not exists(stop)

    with contextlib.ExitStack() as held:
        if sweep.is_shared(run, name):  # another process may be at it, for another run
            lock = folder.with_name(f".{folder.name}.lock")
            if not held.enter_context(locked(lock, wait_for_it)):
                return ASKED_TO_STOP, ""
            if sweep.is_finished(run, name):
                return FINISHED, ""
        if "log" not in how:
            print(f"{run.name}: {name}: {shlex.join(argv)}", flush=True)
        if stage.config is None and folder.is_dir():
            shutil.rmtree(folder)  # what a start that was cut off left
        start = launch if stage.config is not None and launch else [sys.executable]
        before = sweep.summary(run, name)
        write_text(mine / STATE, json.dumps({"stage": name}) + "\n")
        code, said = run_program([*start, *argv], stop, stage.config and folder, **how)
        summary = sweep.summary(run, name)
        # accelerate launch turns every failure into 1; what the run itself said is there.
        if code not in CODES and summary != before:
            code = summary.get("exit_code") or code
        if code not in CODES and said:
            code = USER_ERROR
        if code == FINISHED and stage.config is None:
            folder.mkdir(exist_ok=True)
            write_text(folder / DONE, json.dumps({"command": shlex.join(argv)}) + "\n")
        said = said or f"left with {code}"
        left = {"stage": name, "code": code, "error": said}
        write_text(mine / STATE, json.dumps(left) + "\n")
    return code, said


def run_all(sweep: Sweep, jobs: int, launch: list[str]) -> int:
    """Every stage of every run that is not finished, ``jobs`` side by side, cores shared evenly."""
    check(sweep, sweep.runs)
    parts: dict[Path, tuple[Trial, str]] = {}  # by folder: what runs share is one
    after: dict[Path, set[Path]] = {}
    for run in sweep.runs:
        before: list[Path] = []
        for name, _ in sweep.stages_of(run):
            folder = sweep.folder(run, name)
            parts.setdefault(folder, (run, name))
            rivals = sweep.runs_of(sweep.takes_time_of(run, name))
            rivals += sweep.paced_by(run, name) if rivals else []
            needed = [*before, *(sweep.folder(rival, name) for rival in rivals)]
            after.setdefault(folder, set()).update(needed)
            before.append(folder)
    for run in sweep.runs:
        sweep.claim(run)
    left = {folder for folder, part in parts.items() if not sweep.is_finished(*part)}
    order = sorted(left, key=lambda folder: list(sweep.stages).index(parts[folder][1]))
    cores = os.environ.get("OMP_NUM_THREADS", "")
    cores = int(cores) if cores.isdigit() and int(cores) else os.cpu_count() or 1
    (sweep.out / "logs").mkdir(exist_ok=True)
    began, code, error, running = time.monotonic(), FINISHED, "", {}

    def say(text: str) -> None:
        passed = int(time.monotonic() - began)
        print(f"{passed // 60:02d}:{passed % 60:02d}  {text}", flush=True)

    with contextlib.ExitStack() as held:
        for run in sweep.runs:
            held.enter_context(locked(sweep.folder(run) / "lock"))
        stop = held.enter_context(stop_on_signal(sweep.out / "stop"))
        pool = held.enter_context(ThreadPoolExecutor(jobs))
        while running or order and code == FINISHED:
            ready = [folder for folder in order if not after[folder] & left]
            threads = max(1, cores // min(jobs, len(running) + len(ready)))
            for folder in ready[: jobs - len(running)] if code == FINISHED else ():
                order.remove(folder)
                name = str(folder.relative_to(sweep.out))
                log = sweep.out / "logs" / f"{name.replace(os.sep, '-')}.log"
                how = {"log": log, "threads": threads, "say": lambda t, n=name: say(f"{n}: {t}")}
                say(f"{name}: begins")
                part = pool.submit(run_stage, sweep, *parts[folder], stop, launch, **how)
                running[part] = folder, f"{name} left with {{}}: {{}} ({log})"
            for part in wait(running, return_when=FIRST_COMPLETED).done:
                folder, sentence = running.pop(part)
                left.discard(folder)
                if part.result()[0] != FINISHED and code == FINISHED:
                    code, error = part.result()[0], sentence.format(*part.result())
            if exists(stop) and code == FINISHED:
                code = ASKED_TO_STOP
    require(code in (FINISHED, ASKED_TO_STOP), error)
    say("asked to stop; run it again" if code else "finished")
    return code


# -- commands -----------------------------------------------------------------------------------


def list_runs(sweep: Sweep) -> int:
    check(sweep, sweep.runs, values=False)
    for number, run in enumerate(sweep.runs):
        words = [
            f"{stage}.{key}={plain(value)}" if key else f"{stage}: not run"
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


def make_table(sweep: Sweep) -> int:
    """To the screen, and as Markdown and JSON."""
    sweep.check_results()
    found = ResultsReader(sweep).results()
    show_table(found.title, *found.table())
    for line in found.conclusions():
        print(line)
    write_text(sweep.out / "table.md", found.markdown())
    write_text(sweep.out / "table.json", json.dumps(found.rows, indent=1) + "\n")
    command = shlex.join(["python", *sys.argv])
    write_text(sweep.out / "comparison.json", found.to_json(command))
    if sweep.paper and not found.on_paper():
        why = f"are of {sweep.paper_on}, whole, and these runs were not measured on it"
        if sweep.paper_on is None:
            why = f"belong to a data set that {sweep.path} does not name (paper_on)"
        print(f"The paper's numbers {why}: left out.")
    print(f"{sweep.out}/table.md, table.json and comparison.json")
    return 0


def make_plot(sweep: Sweep) -> int:
    """A panel for each measure, as OUT/plot.png."""
    sweep.check_results()
    axis, values = next(iter(sweep.vary.items())) if len(sweep.vary) == 1 else ("", [])
    figure = results_figure(ResultsReader(sweep).results(), axis.split(".", 1)[-1], values)
    save_png(figure, sweep.out / "plot.png", 120)
    print(f"{sweep.out}/plot.png")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Options(description=__doc__)
    parser.add_argument("what", choices=("list", "run", "status", "table", "plot", "folder"))
    parser.add_argument("sweep", type=local_path)
    parser.add_argument("number", nargs="?", help="of run and folder; run: or all")
    parser.add_argument(
        "--out", type=local_path, help="folder of the results; default: the sweep's own"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], help="overrides of every run"
    )
    parser.add_argument("--seeds", type=int, help="only the first so many")
    parser.add_argument("--settings", nargs="+", help="only these")
    parser.add_argument("--jobs", type=int, default=1, help="stages side by side, of run all")
    parser.add_argument("--launch", default="", help="what starts a training, instead of python")
    args = parser.parse_args(argv)
    require_least(1, args, "seeds", "jobs")
    out = args.out and args.out.resolve()
    sweep = Sweep(find(args.sweep), out, args.set, args.seeds, args.settings)
    ResultsReader(sweep)  # whether it names a data set that is one
    shown = {"list": list_runs, "status": show_status, "table": make_table, "plot": make_plot}
    if args.what in shown:
        return shown[args.what](sweep)
    launch = shlex.split(args.launch)
    require(args.number is not None, f"{args.what} needs the number of a run; list shows them")
    if (args.what, args.number) == ("run", "all"):
        return run_all(sweep, args.jobs, launch)
    last, number = len(sweep.runs) - 1, args.number
    require(
        bool(re.fullmatch(r"-?\d+", number)), f"number must be an integer, or run all, got {number}"
    )
    require(
        0 <= int(number) <= last,
        f"{args.sweep} has runs 0 to {last}, and no {number}; list shows them",
    )
    run = sweep.runs[int(number)]
    if args.what == "folder":
        print(sweep.folder(run))
        return FINISHED
    code = run_here(sweep, run, launch)
    return code if code in CODES else 1


if __name__ == "__main__":
    sys.exit(run_entry(main))
