"""The batch scripts on a real SLURM: two nodes, time limits, requeues, kills, arrays."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml

from tests.runs import ROOT, arguments, command, numbers, run, summary, write_shards
from tests.slurm.cluster import Cluster, missing
from tests.test_toy_shards import draw
from tests.test_train import arguments as stage2_arguments
from tests.test_train import command as stage2_command
from tools.sweep import main as sweep

pytestmark = pytest.mark.skipif(
    bool(missing()) or os.environ.get("SAMI_SLURM") != "1",
    reason="needs Debian's slurm-wlm and munge: bash tools/test.sh --slurm installs them",
)
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
STEPS = {"pretrain": 300, "finetune": 160}  # some seconds, also on a fast machine


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    one = Cluster(folder / "cluster")
    try:
        yield one
    finally:
        one.stop()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Shards with masks."""
    done = draw(tmp_path_factory.mktemp("scenes"), "--shards", "2", "--images", "16")
    assert done.returncode == 0, done.stderr
    return done.stdout.split(": ")[-1].strip()


@pytest.fixture
def submit(cluster, tmp_path):
    """sbatch from the project's folder with a site file; the job's number."""
    site = tmp_path / "site.env"
    python = Path(sys.executable).parent
    site.write_text(
        f"export SBATCH_PARTITION=main\nsami_setup() {{ export PATH={python}:$PATH; }}\n"
        f"export PYTHONPATH={ROOT}\nexport OMP_NUM_THREADS=1\n"
    )

    def call(script, *words, options=(), **environment):
        environment = {"SAMI_SITE": str(site), "SBATCH_PARTITION": "main", **environment}
        words = ["sbatch", "--parsable", f"--output={tmp_path}/%j.out", *options, script, *words]
        return cluster.call(*map(str, words), **environment)

    return call


def long_run(stage, folder, data):
    """Options of a run of some seconds, with many checkpoints."""
    options = {
        "train.steps": STEPS[stage],
        "run.save_every": 5,
        "run.log_every": 5,
        "run.device": "cpu",
    }
    options |= {"train.epochs": "null"}
    return {"pretrain": arguments, "finetune": stage2_arguments}[stage](folder, data, **options)


@pytest.fixture(scope="session")
def references(shards, scenes, tmp_path_factory):
    """What the long runs say without SLURM."""
    found = {}
    for stage, data, call in (
        ("pretrain", shards, command),
        ("finetune", scenes, stage2_command),
    ):
        folder = tmp_path_factory.mktemp("reference") / stage
        done = run(call(long_run(stage, folder, data)), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        found[stage] = folder
    return found


def wait_for_step(cluster, folder, step):
    cluster.wait(
        lambda: any(
            int(path.name.rpartition("-")[2]) >= step
            for path in (folder / "checkpoints").glob("step-*")
        ),
        f"step {step} of {folder}",
    )


def log_of(folder, job):
    return (folder / "slurm" / f"slurm-{job}.log").read_text()


def test_two_nodes_give_one_nodes_losses(cluster, submit, shards, tmp_path):
    jobs = {}
    for nodes, each in ((2, 1), (1, 2)):
        words = arguments(tmp_path / f"of-{nodes}", shards, **{"train.steps": 6})
        jobs[nodes] = submit(
            "slurm/pretrain.sbatch",
            *words,
            options=[f"--nodes={nodes}", "--cpus-per-task=2"],
            SAMI_PROCESSES_PER_NODE=str(each),
        )
    for job in jobs.values():
        assert cluster.wait_for(job, *ENDED)["JobState"] == "COMPLETED"
    assert cluster.job(jobs[2])["NumNodes"] == "2"
    assert summary(tmp_path / "of-2")["hardware"]["processes"] == 2
    assert numbers(tmp_path / "of-1") == numbers(tmp_path / "of-2")


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_asked_and_requeued_it_goes_on_exactly(
    cluster, submit, shards, scenes, references, tmp_path, stage
):
    """The signal of the time limit in the middle, then a requeue from outside."""
    folder = tmp_path / "run"
    words = long_run(stage, folder, {"pretrain": shards, "finetune": scenes}[stage])
    job = submit(f"slurm/{stage}.sbatch", *words)
    wait_for_step(cluster, folder, 20)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for_restart(job, 1)
    stopped = int(sorted((folder / "checkpoints").glob("step-*"))[-1].name.rpartition("-")[2])
    assert stopped < STEPS[stage]
    wait_for_step(cluster, folder, stopped + 20)
    cluster.call("scontrol", "requeue", job)
    assert cluster.wait_for(job, *ENDED)["JobState"] == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "2"
    assert numbers(folder) == numbers(references[stage])
    log = log_of(folder, job)
    assert "the time limit comes near: requeued, it will go on where it is" in log
    assert "taken away, by a requeue" in log or "the start before was cut off" in log


def test_real_time_limits(cluster, submit, shards, tmp_path):
    """Of two minutes: SLURM sends the signal, perhaps while the run still starts.

    What does not answer is requeued as it is before the limit; not if it has finished nothing, for
    it would not end.
    """
    folder = tmp_path / "run"
    words = [*long_run("pretrain", folder, shards), "--train.steps=1000000"]
    options = ["--time=2", "--signal=B:USR1@100"]
    job = submit("slurm/pretrain.sbatch", *words, options=options)
    deaf = tmp_path / "deaf.sbatch"
    deaf.write_text(
        "#!/usr/bin/env bash\n#SBATCH --requeue\n#SBATCH --open-mode=append\n"
        'source "$SLURM_SUBMIT_DIR/slurm/lib.sh"\nlog_to "$1"\nsleep 600 &\nask_when_told $!\n'
        'sleep 1\n[ -z "$2" ] || mkdir -p "$1/checkpoints/$2-$SLURM_RESTART_COUNT"\nawait $pid\n'
    )
    options = ["--time=1", "--signal=B:USR1@50"]
    jobs = {
        name: submit(deaf, tmp_path / name, step, options=options)
        for name, step in (("some", "step"), ("none", ""))
    }
    cluster.wait_for_restart(job, 1)
    cluster.call("scancel", job)
    assert "summary.json: interrupted, exit code 75" in log_of(folder, job)
    cluster.wait(lambda: cluster.job(jobs["some"])["Restarts"] != "0", "the requeue")
    assert "it has not stopped in time" in log_of(tmp_path / "some", jobs["some"])
    words = "nothing was finished since this start"
    cluster.wait(lambda: words in log_of(tmp_path / "none", jobs["none"]), words)
    assert cluster.job(jobs["none"])["Restarts"] == "0"
    cluster.call("scancel", *jobs.values())


def test_killed_it_is_told_and_submitted_again(cluster, submit, shards, references, tmp_path):
    """Not requeued: what was killed, as for its memory, might be killed for ever."""
    folder = tmp_path / "run"
    words = long_run("pretrain", folder, shards)
    job = submit("slurm/pretrain.sbatch", *words)
    wait_for_step(cluster, folder, 10)
    os.kill(int((folder / "lock").read_text().rpartition("pid ")[2]), signal.SIGKILL)
    told = cluster.wait_for(job, *ENDED)
    assert (told["JobState"], told["ExitCode"], told["Restarts"]) == ("FAILED", "1:0", "0")
    assert "ended without a word, as by a kill" in log_of(folder, job)
    job = submit("slurm/pretrain.sbatch", *words)
    wait_for_step(cluster, folder, 60)
    assert "the start before was cut off: killed" in log_of(folder, job)
    cluster.call("scancel", "--full", "--signal=KILL", job)
    assert cluster.wait_for(job, *ENDED)["JobState"] == "CANCELLED"
    job = submit("slurm/pretrain.sbatch", *words)
    assert cluster.wait_for(job, *ENDED)["JobState"] == "COMPLETED"
    assert numbers(folder) == numbers(references["pretrain"])


def test_a_node_that_dies(cluster, submit, shards, references, tmp_path):
    """SLURM requeues the job on the other node, and it goes on from its last checkpoint."""
    folder = tmp_path / "run"
    job = submit("slurm/pretrain.sbatch", *long_run("pretrain", folder, shards))
    wait_for_step(cluster, folder, 20)
    node = cluster.job(job)["NodeList"]
    cluster.kill_node(node)
    try:
        cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", "the requeue")
        told = cluster.wait_for(job, *ENDED)
        assert (told["JobState"], told["NodeList"] != node) == ("COMPLETED", True)
        assert numbers(folder) == numbers(references["pretrain"])
    finally:
        cluster.start_node(node)
        cluster.wait(lambda: cluster.nodes()[node] == "IDLE", f"{node} again")


def test_preempted_it_saves_and_comes_back(cluster, submit, shards, references, tmp_path):
    """A job of a partition above takes both nodes for some seconds; then this one goes on."""
    folder = tmp_path / "run"
    job = submit("slurm/pretrain.sbatch", *long_run("pretrain", folder, shards))
    wait_for_step(cluster, folder, 20)
    words = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    cluster.call("sbatch", *words, "--wrap=sleep 1")
    assert cluster.wait_for(job, *ENDED)["JobState"] == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "1"
    assert numbers(folder) == numbers(references["pretrain"])
    assert "preempted: requeued, it will go on where it is" in log_of(folder, job)


def test_what_fails_for_good_is_not_requeued(cluster, submit, shards, references, tmp_path):
    """Before the run can write a word, too; and what is finished already stays finished."""
    folder = references["pretrain"]
    before = (folder / "summary.json").stat().st_mtime_ns
    jobs = {
        "less than one train.batch_size of 4096": arguments(
            tmp_path / "run", shards, **{"train.batch_size": 4096}
        ),
        "holds a run of another configuration: mask.ratio": [
            *long_run("pretrain", folder, shards),
            "--mask.ratio=0.5",
        ],
    }
    jobs = {sentence: submit("slurm/pretrain.sbatch", *words) for sentence, words in jobs.items()}
    for sentence, job in jobs.items():
        told = cluster.wait_for(job, *ENDED)
        assert (told["JobState"], told["ExitCode"], told["Restarts"]) == ("FAILED", "2:0", "0")
        (log,) = {*tmp_path.glob(f"*/slurm/slurm-{job}.log"), *folder.glob(f"slurm/*-{job}.log")}
        assert (
            f"failed for good: {sentence}"[:16] in log.read_text() and sentence in log.read_text()
        )
    done = submit("slurm/pretrain.sbatch", *long_run("pretrain", folder, shards))
    ended = cluster.wait_for(done, *ENDED)["JobState"]  # alone: two jobs in a folder are refused
    assert ended == "COMPLETED", log_of(folder, done)
    assert (folder / "summary.json").stat().st_mtime_ns == before


def test_an_evaluation(cluster, submit, scenes, references, tmp_path):
    words = [references["finetune"], "--shards", scenes, "--prompts", "box", "--masks", "2"]
    job = submit("slurm/evaluate.sbatch", *words, "--out", tmp_path / "out", "--workers", "0")
    assert cluster.wait_for(job, *ENDED)["JobState"] == "COMPLETED"
    assert (tmp_path / "out" / "evaluation.json").exists() and "box" in log_of(
        tmp_path / "out", job
    )


def test_an_array_of_slices_with_one_that_fails(cluster, submit, tmp_path):
    """The task is named, and run again alone once its shard is mended."""
    write_shards(tmp_path / "shards", counts=(6, 6, 6))
    bad = tmp_path / "shards" / "s-001.tar"
    good = bad.read_bytes()
    bad.write_bytes(b"no tar at all")
    teacher = ("--teacher", "custom", "--checkpoint", "random", "--image-size", "128")
    words = [*sorted((tmp_path / "shards").glob("*.tar")), "--out", tmp_path / "out", *teacher]
    job = submit("slurm/cache_teacher.sbatch", *words, options=["--array=0-2"])
    states = [cluster.wait_for(f"{job}_{task}", *ENDED)["JobState"] for task in range(3)]
    assert states == ["COMPLETED", "FAILED", "COMPLETED"]
    log = log_of(tmp_path / "out", f"{job}_1")
    assert "s-001.tar is not a readable tar" in log
    assert "again: SAMI_SLICES=3 sbatch --array=1" in log
    bad.write_bytes(good)
    job = submit("slurm/cache_teacher.sbatch", *words, options=["--array=1"], SAMI_SLICES="3")
    assert cluster.wait_for(f"{job}_1", *ENDED)["JobState"] == "COMPLETED"
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())["shards"]
    assert {name: one["samples"] for name, one in told.items()} == dict.fromkeys(
        (f"s-00{number}.tar" for number in range(3)), 6
    )


def test_a_sweep_from_its_file_to_its_table(cluster, submit, scenes, tmp_path, capsys):
    """Mask ratios through both stages and the evaluation; one task is asked to stop on its way."""

    def small(words):
        told = dict(word.removeprefix("--").split("=", 1) for word in words)
        return {
            key: value if "{" in value else yaml.safe_load(value)
            for key, value in told.items()
            if key != "run.dir"
        }

    file = ROOT / "configs/sweeps/mask_ratio_toy.yaml"
    content = yaml.safe_load(file.read_text()) | {"seeds": [0]}
    content["vary"]["pretrain.mask.ratio"] = [0.5, 0.75]
    stages, data = content["stages"], {"data.val_shards": scenes, "run.device": "cpu"}
    data["data.allow_val_in_train"] = "true"
    stages["pretrain"]["set"] = small(arguments("", scenes, **data))
    more = {"encoder.checkpoint": "{pretrain}", "train.steps": 3}
    stages["finetune"]["set"] = small(stage2_arguments("", scenes, **data, **more))
    stages["evaluate"]["set"] |= {"shards": scenes, "masks": 2, "seeds": 1}
    ours = tmp_path / "mask_ratio_small.yaml"
    ours.write_text(yaml.safe_dump(content, sort_keys=False))
    out = ["--out", str(tmp_path / "out")]
    job = submit("slurm/sweep.sbatch", ours, *out, options=["--array=0-1"])
    folder = tmp_path / "out" / "mask.ratio-0.75_seed-0"
    cluster.wait(lambda: list(folder.glob("slurm/*.log")), "the second task")
    cluster.call("scancel", "--batch", "--signal=USR1", f"{job}_1")
    for task in range(2):
        assert cluster.wait_for(f"{job}_{task}", *ENDED)["JobState"] == "COMPLETED"
    assert "the time limit comes near: requeued" in log_of(folder, f"{job}_1")
    assert sweep(["table", str(ours), *out]) == 0
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["setting"] for row in rows] == [f"mask.ratio {ratio}" for ratio in (0.5, 0.75)]
    assert all(told["mean"] is not None for row in rows for told in row["measures"].values())
    assert sweep(["status", str(ours), *out]) == 0
    assert "2 finished" in capsys.readouterr().out
    job = submit("slurm/sweep.sbatch", ours, *out, options=["--array=9"])
    told = cluster.wait_for(f"{job}_9", *ENDED)
    assert (told["JobState"], told["ExitCode"]) == ("FAILED", "2:0")
    assert (
        "has runs 0 to 1, and no 9"
        in next(tmp_path.glob("*.out")).parent.joinpath(f"{told['JobId']}.out").read_text()
    )
