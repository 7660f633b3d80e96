"""Starting real runs from tests: small shards, small arguments, processes in their own group."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from sami.core.index import Source, open_sources
from sami.core.patterns import expand
from tests.preloaded import Popen

ROOT = Path(__file__).parents[1]
# A limit is there to end what hangs, not to judge how fast a machine is. These are all there are,
# in seconds: of one program or one thing that is waited for, and of a whole test.
LIMIT = 1200 * float(os.environ.get("SAMI_TEST_TIMEOUT_SCALE", 1))
TEST_LIMIT = 1.5 * LIMIT
# What may differ between two runs of the same numbers.
TIMING = {"images_per_second", "data_wait", "seconds_per_step"}


def write_shards(
    folder: Path,
    counts: tuple[int, ...] = (13, 9, 17),
    seed: int = 0,
    corrupt: int = 0,
    detail: int = 5,
) -> str:
    """Shards of smooth random images, the first ``corrupt`` cut short; returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number, count in enumerate(counts):
        with wds.TarWriter(str(folder / f"s-{number:03d}.tar")) as writer:
            for item in range(count):
                coarse = rng.integers(0, 256, (detail, detail, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((90, 75), Image.Resampling.BICUBIC)
                buffer = io.BytesIO()
                image.save(buffer, "JPEG")
                data = buffer.getvalue()
                if number == 0 and item < corrupt:
                    data = data[: len(data) // 2]
                writer.write({"__key__": f"p{item:04d}", "jpg": data})
    return f"{folder}/s-{{000..{len(counts) - 1:03d}}}.tar"


def write_cache(shards: str, out: Path, *shape: str) -> str:
    """The shards with features of a random custom teacher at 64 px; returns their pattern."""
    words = ["--teacher", "custom", *shape, "--checkpoint", "random", "--image-size", "64"]
    found = [url for urls, _ in expand(shards, "shards") for url in urls]
    tool = [sys.executable, str(ROOT / "tools/cache_teacher.py"), *found, "--out", str(out)]
    done = run([*tool, *words])
    assert done.returncode == 0, done.stderr
    return f"{out}/*.tar"


def opened(pattern: str | list[str] | dict[str, float], folder: Path) -> list[Source]:
    """The sources of a pattern, indexed in a folder."""
    return open_sources(expand(pattern, "k"), folder / "index", lambda text: None)


def arguments(folder: Path, shards: str, **more: object) -> list[str]:
    """Options of a run that takes about 20 ms a step."""
    options: dict[str, object] = {
        "run.dir": folder,
        "run.log_every": 1,
        "run.save_every": 4,
        "run.picture_every": 0,
        "data.shards": shards,
        "data.workers": 0,
        "data.image_size": 64,
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
        "train.steps": 12,
        "train.batch_size": 8,
        **more,
    }
    return [f"--{key}={value}" for key, value in options.items()]


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / "sami" / "pretrain.py"), *arguments]


def run(words: list[str], cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run to the end and return what it said."""
    words = [*map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Popen(words, cwd=cwd, env=os.environ | environment, **pipes) as process:
        try:
            out, err = process.communicate(timeout=LIMIT)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def start(words: list[str], truly: bool = False) -> subprocess.Popen:
    """Start as the leader of a process group of its own.

    Args:
        truly: with a Python of its own, as a user does.
    """
    return (subprocess.Popen if truly else Popen)(
        [*map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
    )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the whole process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(LIMIT)


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen | None = None, pause: float = 0.01
) -> bool:
    """Look again and again until something holds; False if the process ended before.

    Raises:
        TimeoutError: it hangs.
    """
    end = time.monotonic() + LIMIT
    while not condition():
        if process is not None and process.poll() is not None:
            return bool(condition())
        if time.monotonic() > end:
            raise TimeoutError(f"waited for {LIMIT} s")
        time.sleep(pause)
    return True


def numbers(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def every_parameter_was_updated(folder: Path, steps: int) -> None:
    """In each of a run's steps, or DDP would stop at the second one: it waits for all gradients."""
    state = torch.load(folder / "checkpoints" / f"step-{steps}" / "state.pt", weights_only=True)
    optimizer = state["optimizer"]
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    assert numbers and {number: int(optimizer["state"][number]["step"]) for number in numbers} == (
        dict.fromkeys(numbers, steps)
    )
