"""Kill a small run at random moments, again and again, and compare its end with an unkilled one.

python tools/soak.py [--kills 100] [--processes 1] [--workers 1] [--seed 0] [--folder runs/soak]

Both runs train a tiny student on drawn scenes of which a few are damaged. The kills (SIGKILL to all
processes at once) fall into the start of a run, into training, and into the writing of checkpoints.
Equal means every number of metrics.jsonl but the clock's, the bytes of the exported encoder, and
the counts in summary.json. Exit code 0 if equal, 1 if not.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

from sami.core.config import require
from sami.core.errors import UserError
from sami.core.exits import run_entry
from sami.core.options import Options
from sami.core.paths import local_path
from sami.core.shipped import shipped

CLOCK = {"images_per_second", "data_wait", "seconds_per_step"}
COUNTED = ("status", "exit_code", "steps", "loss", "bad_samples", "bad_sample_keys")
STEPS_PER_KILL = 12


def draw_shards(folder: Path) -> str:
    """Five shards of 251 scenes of which every thirtieth is cut in half; returns their pattern."""
    tool = shipped("tools/make_toy_shards.py")
    words = [tool, folder / "whole", "--pictures", "251", "--shards", "5"]
    subprocess.run(
        [sys.executable, *map(str, words), "--size", "64x80"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for path in sorted((folder / "whole").glob("*.tar")):
        with tarfile.open(path) as source, tarfile.open(folder / path.name, "w") as target:
            for number, member in enumerate(source):
                data = source.extractfile(member).read()
                if number % 60 == 20:
                    data = data[: len(data) // 2]
                member.size = len(data)
                target.addfile(member, io.BytesIO(data))
    return f"{folder}/*.tar"


def command(args: argparse.Namespace, folder: Path, shards: str, steps: int) -> list[str]:
    """A run of about 20 ms a step."""
    options = {
        "run.dir": folder,
        "run.log_every": 1,
        "run.save_every": 3,
        "run.picture_every": 0,
        "run.seed": args.seed,
        "data.shards": shards,
        "data.workers": args.workers,
        "data.image_size": 64,
        "data.shuffle_mb": 1,
        "encoder.name": "custom",
        "encoder.width": 32,
        "teacher.name": "custom",
        "teacher.width": 32,
        "teacher.depth": 1,
        "teacher.checkpoint": "random",
        "teacher.image_size": 64,
        "decoder.width": 32,
        "decoder.depth": 1,
        "decoder.heads": 2,
        "optim.ema": 0.9,
        "train.steps": steps,
        "train.batch_size": 8,
    }
    words = [
        str(shipped("sami/pretrain.py")),
        *(f"--{key}={value}" for key, value in options.items()),
    ]
    if args.processes == 1:
        return [sys.executable, *words]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(args.processes)]
    config = str(shipped("configs/accelerate/cpu_2.yaml"))
    more = ["--config_file", config, "--main_process_port", port]
    return [sys.executable, *launcher, *more, *words]


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
        process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
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
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    if ended:
        return None
    if is_saving(folder):
        return "while a checkpoint was written"
    return "in training" if step_of(folder) > before else "during the start"


def outcome(folder: Path) -> dict[str, object]:
    """What has to be equal."""
    lines = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    summary = json.loads((folder / "summary.json").read_bytes())
    return {
        "metrics": [{k: v for k, v in line.items() if k not in CLOCK} for line in lines],
        "encoder": (folder / "encoder.safetensors").read_bytes(),
        "summary": {key: summary[key] for key in COUNTED},
    }


def finish(words: list[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(words, stdout=file, stderr=file)
    if done.returncode != 0:
        raise UserError(f"a run ended with {done.returncode}; see {log}")


def main(argv: list[str] | None = None) -> int:
    parser = Options(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="per process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=local_path, default=Path("runs/soak"))
    args = parser.parse_args(argv)
    require(args.kills > 0, f"--kills {args.kills} must be positive")
    require(args.processes > 0, f"--processes {args.processes} must be positive")
    require(not args.folder.exists(), f"{args.folder} is there already; delete it or give --folder")
    folder, rng = args.folder.absolute(), random.Random(args.seed)
    folder.mkdir(parents=True)
    shards, log = draw_shards(folder), folder / "log.txt"
    steps = STEPS_PER_KILL * args.kills
    finish(command(args, folder / "whole-run", shards, steps), log)
    whole = outcome(folder / "whole-run")

    places: Counter[str] = Counter()
    resumed = 0
    started = time.monotonic()
    run = folder / "killed-run"
    while places.total() < args.kills:
        resumed += any((run / "checkpoints").glob("step-*"))
        place = kill_once(command(args, run, shards, steps), run, rng, log)
        if place is None:
            raise UserError(f"the run ended after {places.total()} kills; see {log}")
        places[place] += 1
        if places.total() % 10 == 0:
            print(f"{places.total()} kills, step {step_of(run)} of {steps}", flush=True)
    finish(command(args, run, shards, steps), log)
    killed = outcome(run)
    print(
        f"{places.total()} kills ({', '.join(f'{n} {place}' for place, n in places.items())}), "
        f"{resumed} starts had a checkpoint to go on from, {steps} steps of "
        f"{args.processes} process(es) x {args.workers} worker(s), "
        f"{time.monotonic() - started:.0f} s; bad samples {whole['summary']['bad_samples']}"
    )
    different = [name for name in whole if whole[name] != killed[name]]
    print(f"DIFFERENT: {', '.join(different)}" if different else "equal to the run without kills")
    if not different:
        shutil.rmtree(folder)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
