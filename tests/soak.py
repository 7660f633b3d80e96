"""Kill a small run at random moments, again and again, and compare its end with an unkilled one.

python -m tests.soak [--kills 100] [--processes 1] [--workers 1] [--seed 0] [--folder runs/soak]

The kills (SIGKILL to all processes at once) fall into the start of a run, into training, and into
the writing of checkpoints; some of the images are damaged. Equal means every number of
metrics.jsonl but the clock's, the bytes of the exported encoder, and the counts in summary.json.
Exit code 0 if equal, 1 if not.
"""

import argparse
import random
import shutil
import socket
import sys
import time
from collections import Counter
from pathlib import Path

from tests.preloaded import Popen
from tests.runs import LIMIT, ROOT, arguments, command, kill, numbers, summary, write_shards

COUNTED = ("status", "exit_code", "steps", "loss", "bad_samples", "bad_sample_keys")
STEPS_PER_KILL = 12


def launched(words: list[str], processes: int) -> list[str]:
    """The command line of a run in several processes, which meet at a free port."""
    if processes == 1:
        return words
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = str(ROOT / "configs/accelerate/cpu_2.yaml")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config]
    more = ["--num_processes", str(processes), "--main_process_port", port]
    return [words[0], *launcher, *more, *words[1:]]


def step_of(folder: Path) -> int:
    """The last step in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def is_saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".writing-*"))


def kill_once(words: list[str], folder: Path, rng: random.Random, log: Path) -> str | None:
    """Start the run, kill it at a random moment; returns where that fell, None if it had ended."""
    before = step_of(folder)
    with log.open("a", encoding="utf-8") as file:
        process = Popen(words, stdout=file, stderr=file, start_new_session=True)
    kind = rng.choices(["start", "training", "saving"], [1, 4, 2])[0]
    if kind == "start":
        time.sleep(rng.uniform(0.5, 4))
    else:
        while step_of(folder) <= before and process.poll() is None:
            time.sleep(0.002)
        until = time.monotonic() + rng.uniform(0, 0.3)
        while time.monotonic() < until and not (kind == "saving" and is_saving(folder)):
            pass
    ended = process.poll() is not None
    kill(process)
    if ended:
        return None
    if is_saving(folder):
        return "while a checkpoint was written"
    return "in training" if step_of(folder) > before else "during the start"


def outcome(folder: Path) -> dict[str, object]:
    """What has to be equal."""
    return {
        "metrics": numbers(folder),
        "encoder": (folder / "encoder.safetensors").read_bytes(),
        "summary": {key: summary(folder)[key] for key in COUNTED},
    }


def finish(words: list[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as file:
        code = Popen(words, stdout=file, stderr=file).wait(LIMIT)
    assert code == 0, f"a run ended with {code}; see {log}"


def soak(folder: Path, kills: int, processes: int = 1, workers: int = 1, seed: int = 0) -> bool:
    """Whether a run killed so often ends as one that was not; the folder goes if it does."""
    assert kills > 0 and processes > 0 and not folder.exists()
    folder, rng = folder.absolute(), random.Random(seed)
    shards, log = write_shards(folder / "shards", (51, 50, 50, 50, 50), corrupt=8), folder / "log"
    steps = STEPS_PER_KILL * kills
    options = {"run.seed": seed, "run.save_every": 3, "optim.ema": 0.9}
    options |= {"data.workers": workers, "train.steps": steps}

    def words(name: str) -> list[str]:
        return launched(command(arguments(folder / name, shards, **options)), processes)

    finish(words("whole-run"), log)
    whole, run = outcome(folder / "whole-run"), folder / "killed-run"
    places: Counter[str] = Counter()
    resumed, started = 0, time.monotonic()
    while places.total() < kills:
        resumed += any((run / "checkpoints").glob("step-*"))
        place = kill_once(words("killed-run"), run, rng, log)
        assert place is not None, f"the run ended after {places.total()} kills; see {log}"
        places[place] += 1
        if places.total() % 10 == 0:
            print(f"{places.total()} kills, step {step_of(run)} of {steps}", flush=True)
    finish(words("killed-run"), log)
    killed = outcome(run)
    print(
        f"{kills} kills ({', '.join(f'{n} {place}' for place, n in places.items())}), "
        f"{resumed} starts had a checkpoint to go on from, {steps} steps of "
        f"{processes} process(es) x {workers} worker(s), "
        f"{time.monotonic() - started:.0f} s; bad samples {whole['summary']['bad_samples']}"
    )
    different = [name for name in whole if whole[name] != killed[name]]
    print(f"DIFFERENT: {', '.join(different)}" if different else "equal to the run without kills")
    if not different:
        shutil.rmtree(folder)
    return not different


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="per process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    sys.exit(not soak(**vars(parser.parse_args())))
