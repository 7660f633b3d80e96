"""A run that is killed or asked to stop goes on as if nothing had happened, bit for bit."""

import json
import os
import random
import signal
import time

import pytest

from sami.pretrain import main as pretrain
from tests.runs import (
    LIMIT,
    arguments,
    command,
    kill,
    numbers,
    run,
    start,
    summary,
    wait_for,
    write_shards,
)

STEPS = 60


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    shards = write_shards(folder / "shards", corrupt=2)
    options = {"train.steps": STEPS, "run.save_every": 1, "run.log_every": 3, "optim.ema": 0.9}
    done = run(command(arguments(folder / "run", shards, **options)))
    assert done.returncode == 0, done.stderr
    return folder, shards, options


def check_equal(folder, other):
    assert numbers(folder) == numbers(other)  # every float to its last bit
    name = "encoder.safetensors"
    assert (folder / name).read_bytes() == (other / name).read_bytes()
    keys = ("status", "exit_code", "steps", "loss", "bad_samples")
    assert {k: summary(folder)[k] for k in keys} == {k: summary(other)[k] for k in keys}


def test_kill_at_random_times_and_during_a_save(uninterrupted, tmp_path):
    folder, shards, options = uninterrupted
    words = command(arguments(tmp_path / "run", shards, **options))
    metrics, checkpoints = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoints"
    rng = random.Random(0)
    killed = torn = 0
    for turn in range(4):
        process = start(words)
        seen = metrics.read_text().count("\n") if metrics.exists() else 0
        assert wait_for(
            lambda s=seen: metrics.exists() and metrics.read_text().count("\n") > s, process
        )
        if turn % 2:  # in the middle of writing a checkpoint
            wait_for(
                lambda: any(p.name.startswith(".writing") for p in checkpoints.iterdir()), process
            )
        else:
            time.sleep(rng.uniform(0, 0.15))
        alive = process.poll() is None
        kill(process)
        killed += alive
        torn += any(path.name.startswith(".writing") for path in checkpoints.iterdir())
    assert killed >= 2 and torn >= 1
    assert summary(tmp_path / "run")["status"] == "running"
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    check_equal(tmp_path / "run", folder / "run")
    assert summary(tmp_path / "run")["bad_samples"]["damaged image"] > 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1, "stop file"])
def test_asked_to_stop(uninterrupted, tmp_path, how):
    folder, shards, options = uninterrupted
    words = command(arguments(tmp_path / "run", shards, **options))
    process = start(words)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert wait_for(metrics.exists, process)
    if how == "stop file":
        (tmp_path / "run" / "stop").touch()
    else:
        process.send_signal(how)
    code = process.wait(LIMIT)
    if code == 0 and how == "stop file":
        pytest.skip("the run was over before it looked for the stop file")
    assert code == 75
    assert summary(tmp_path / "run")["status"] == "interrupted"
    assert summary(tmp_path / "run")["exit_code"] == 75
    assert "bad_samples" in summary(tmp_path / "run")
    assert not (tmp_path / "run" / "stop").exists()
    assert run(words).returncode == 0
    check_equal(tmp_path / "run", folder / "run")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_whole_process_group_is_asked_to_stop(tmp_path, how):
    """As SLURM and Ctrl-C do it: the processes that read data outlive the signal."""
    shards = write_shards(tmp_path / "shards")
    options = {"data.workers": 2, "train.steps": 100_000, "run.save_every": 100_000}
    process = start(command(arguments(tmp_path / "run", shards, **options)))
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert wait_for(metrics.exists, process)
    os.killpg(process.pid, how)
    assert process.wait(LIMIT) == 75
    told = summary(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        f"step-{told['steps']}"
    ]


def test_three_kills_in_one_epoch_with_prefetched_batches_in_flight(tmp_path):
    shards = write_shards(tmp_path / "shards", (161, 80, 159), corrupt=3)  # 50 steps an epoch
    options = {"data.workers": 2, "train.steps": 55, "run.save_every": 7, "data.window": 1}
    whole = run(command(arguments(tmp_path / "whole", shards, **options)))
    assert whole.returncode == 0, whole.stderr
    words = command(arguments(tmp_path / "cut", shards, **options))
    checkpoints = tmp_path / "cut" / "checkpoints"
    for step in (7, 14, 28):
        process = start(words)
        assert wait_for(lambda s=step: (checkpoints / f"step-{s}").exists(), process)
        kill(process)
    assert len(numbers(tmp_path / "cut")) < 50
    assert run(words).returncode == 0
    check_equal(tmp_path / "cut", tmp_path / "whole")


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    shards = write_shards(tmp_path / "shards")
    words = command(arguments(tmp_path / "run", shards))
    assert run(words).returncode == 0
    before, encoder = numbers(tmp_path / "run"), (tmp_path / "run" / "encoder.safetensors")
    bytes_before = encoder.read_bytes()
    (tmp_path / "run" / "summary.json").unlink()
    state = tmp_path / "run" / "checkpoints" / "step-12" / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert "step-12 is damaged" in done.stdout and "step-8" in done.stdout
    assert numbers(tmp_path / "run") == before and encoder.read_bytes() == bytes_before
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        (checkpoint / "meta.json").write_text("{")
    (tmp_path / "run" / "summary.json").unlink()
    done = run(words)
    assert done.returncode == 2
    assert "none of the 2 checkpoints" in done.stderr and "Traceback" not in done.stderr


def test_a_run_of_before_is_told_apart(tmp_path, in_process):
    """Its samples came in another order: one sentence, and nothing of it is changed."""
    words = arguments(tmp_path / "run", write_shards(tmp_path / "shards"))
    assert in_process(pretrain, words)[0] == 0
    meta = tmp_path / "run" / "checkpoints" / "step-12" / "meta.json"
    told = json.loads(meta.read_text())
    told["data"] = {"legs": [{"first_step": 0, "layout": {}}], "readers": []}
    told["config"]["data"]["shuffle_mb"] = 128
    meta.write_text(json.dumps(told))
    before = numbers(tmp_path / "run")
    code, said = in_process(pretrain, words)
    assert code == 2 and said.count("\n") == 1
    assert "begun by an earlier version, whose samples came in another order" in said
    assert numbers(tmp_path / "run") == before
    code, said = in_process(pretrain, [*words, "--data.shuffle_mb=128"])
    assert code == 2 and "data.shuffle_mb is not a known option any more" in said
    assert "data.window" in said and said.count("\n") == 1
    old = tmp_path / "old.yaml"
    old.write_text("data: {shuffle_mb: 128}\n")
    code, said = in_process(pretrain, [*words, f"--config={old}"])
    assert code == 2 and "data.shuffle_mb is not a known key any more" in said
