"""Two processes over gloo, started by accelerate launch."""

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch

from tests.preloaded import title_of
from tests.runs import (
    LIMIT,
    ROOT,
    arguments,
    kill,
    numbers,
    run,
    start,
    summary,
    wait_for,
    write_cache,
    write_shards,
)


def launch(config: str, script: str, *words: str, more: tuple[str, ...] = ()) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    more = more or ("--main_process_port", free_port())
    file = str(ROOT / "configs/accelerate" / config)
    return [*launcher, "--config_file", file, *more, str(ROOT / script), *words]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def alive(folder) -> list[int]:
    """The processes that were told to use a run folder."""
    told, found = f"--run.dir={folder}", []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            forked = (path / "comm").read_text().strip() == title_of([told])
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            if (forked or told.encode() in words) and state != "Z":
                found.append(int(path.name))
    return found


def kill_all(folder, process) -> None:
    """SIGKILL to the launcher, and to its ranks before they notice."""
    kill(process)
    for pid in alive(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until_gone(folder)


def wait_until_gone(folder) -> None:
    """Until no process of a run is left."""
    wait_for(lambda: not alive(folder), pause=0.1)


def wait_for_step(folder, step: int, process) -> None:
    metrics = folder / "metrics.jsonl"
    assert wait_for(lambda: metrics.exists() and len(numbers(folder)) >= step, process)


def test_two_processes_give_the_gradients_of_one(tmp_path):
    pattern = write_shards(tmp_path / "shards", (5, 3))
    results = []
    for config in ("cpu.yaml", "cpu_2.yaml"):
        out = tmp_path / config
        done = run(launch(config, "tests/gradients.py", str(out), pattern), PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
        results.append(torch.load(out, weights_only=True))
    one, two = results
    assert one["processes"] == 1 and two["processes"] == 2
    flat = [
        torch.cat([g.double().flatten() for g in result["gradients"].values()])
        for result in results
    ]
    assert all(gradient.norm() > 0 for gradient in one["gradients"].values())
    assert (flat[0] - flat[1]).norm() / flat[0].norm() <= 1e-6


def test_one_ranks_bad_loss_leaves_the_update_out_on_both(tmp_path):
    pattern = write_shards(tmp_path / "shards", (8,))
    words = launch("cpu_2.yaml", "tests/gradients.py", str(tmp_path / "out"), pattern, "spoilt")
    done = run(words, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "out").tolist() == [[1.0, 1.0], [1.0, 1.0]]  # skipped, kept


def test_two_processes_stopped_and_killed_again_and_again(tmp_path):
    """A stop file stops both ranks at one step; kills lose nothing; the end is bit-equal."""
    pattern = write_shards(tmp_path / "shards", (13, 9, 17), corrupt=1)
    held_out = write_shards(tmp_path / "val", (5,), seed=1)
    options = {"data.workers": 1, "train.steps": 80, "run.save_every": 10, "run.log_every": 5}
    options |= {"data.val_shards": held_out, "eval.every": 0, "optim.ema": 0.9}
    words = [
        launch("cpu_2.yaml", "sami/pretrain.py", *arguments(tmp_path / name, pattern, **options))
        for name in "ab"
    ]
    done = run(words[0])
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "a")["hardware"]["processes"] == 2
    assert summary(tmp_path / "a")["evaluation"]["pictures"] == 5

    process = start(words[1])
    wait_for_step(tmp_path / "b", 1, process)
    (tmp_path / "b" / "stop").touch()
    process.wait(LIMIT)
    told = summary(tmp_path / "b")
    assert told["status"] == "interrupted" and told["exit_code"] == 75 and told["steps"] < 80
    assert not alive(tmp_path / "b")
    for _ in range(2):  # the second and third time in the same epochs
        before = len(numbers(tmp_path / "b"))
        process = start(words[1])
        wait_for_step(tmp_path / "b", before + 3, process)
        assert len(alive(tmp_path / "b")) >= 2  # torch may rename the launcher
        kill_all(tmp_path / "b", process)
    done = run(words[1])
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    names = [tmp_path / name / "encoder.safetensors" for name in "ab"]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert summary(tmp_path / "a")["bad_samples"] == summary(tmp_path / "b")["bad_samples"]


def test_two_nodes_of_one_process_equal_one_node_of_two(tmp_path):
    pattern = write_shards(tmp_path / "shards")
    options = {"data.workers": 1, "optim.lr": 0.5}
    one = launch("cpu_2.yaml", "sami/pretrain.py", *arguments(tmp_path / "one", pattern, **options))
    done = run(one)
    assert done.returncode == 0, done.stderr
    words = arguments(tmp_path / "two", pattern, **options)
    port = ("--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port")
    port += (free_port(), "--machine_rank")
    nodes = [
        start(launch("cpu_2.yaml", "sami/pretrain.py", *words, more=(*port, rank))) for rank in "01"
    ]
    assert [node.wait(LIMIT) for node in nodes] == [0, 0]
    losses = [[line["loss"] for line in numbers(tmp_path / name)] for name in ("one", "two")]
    assert len(losses[0]) == 12 and losses[0][-1] != losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("kind", ["bug", "user", "killed"])
def test_a_rank_that_fails_takes_the_run_down(tmp_path, kind):
    pattern = write_shards(tmp_path / "shards")
    words = arguments(tmp_path / "run", pattern, **{"train.steps": 100_000})
    words = launch("cpu_2.yaml", "tests/failing.py", kind, *words)
    done = run(words, PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    wait_until_gone(tmp_path / "run")
    told = summary(tmp_path / "run")
    assert told["status"] == "failed" and told["exit_code"] == (2 if kind == "user" else 1)
    if kind == "killed":
        assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
    else:
        assert "spoilt on purpose" in done.stderr and "spoilt on purpose" in told["error"]
        assert told["rank"] == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-4"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_its_launcher(tmp_path, how):
    """They notice, save at one step and leave as if asked to stop."""
    pattern = write_shards(tmp_path / "shards")
    options = {"train.steps": 100_000, "data.workers": 1, "run.save_every": 1000}
    words = arguments(tmp_path / "run", pattern, **options)
    words = launch("cpu_2.yaml", "sami/pretrain.py", *words)
    process = start(words, truly=how == signal.SIGKILL)
    wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(how)
    process.wait(LIMIT)
    wait_until_gone(tmp_path / "run")
    told = summary(tmp_path / "run")
    assert told["exit_code"] == 75 and told["status"] == "interrupted"
    saved = list((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in saved] == [f"step-{told['steps']}"]


@pytest.mark.parametrize("config", ["sami_ti", "sami_ti_cached"])
def test_shipped_configs_with_two_processes(tmp_path, config):
    """That no parameter of the others is without a gradient stands in tests/test_entrypoints.py."""
    options = {
        "run.dir": tmp_path / "run",
        "run.picture_every": 0,
        "data.shards": write_shards(tmp_path / "shards"),
        "data.val_shards": [],
        "data.workers": 0,
        "data.image_size": 64,
        "train.steps": 3,
        "train.batch_size": 4,
        "teacher.name": "custom",
        "teacher.checkpoint": "random",
        "teacher.image_size": 64,
    }
    if "cached" in config:
        options["data.shards"] = write_cache(options["data.shards"], tmp_path / "cached")
    words = ["--config", f"configs/pretrain/{config}.yaml"]
    words += [f"--{key}={value}" for key, value in options.items()]
    done = run(launch("cpu_2.yaml", "sami/pretrain.py", *words))
    assert done.returncode == 0, done.stderr
    assert (
        summary(tmp_path / "run")["steps"] == 3
        and "not trained, but kept as at the start: " in done.stdout
    )
