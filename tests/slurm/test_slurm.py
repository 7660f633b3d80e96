"""The batch scripts on a real SLURM: two nodes, requeues, lost nodes, arrays."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, arguments, command, numbers, run, summary, write_shards
from tests.slurm.cluster import Cluster, missing

pytestmark = [
    pytest.mark.skipif(
        bool(missing()) or os.environ.get("SAMI_SLURM") != "1",
        reason="needs Debian's slurm-wlm and munge: bash tools/test.sh --slurm installs them",
    ),
    pytest.mark.timeout(600),
]
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    one = Cluster(folder / "cluster")
    try:
        yield one
    finally:
        one.stop()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


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


def long_run(folder, shards, **more):
    """Options of a run of half a minute, with many checkpoints."""
    options = {"train.steps": 400, "run.save_every": 5, "run.log_every": 5, "run.device": "cpu"}
    return arguments(folder, shards, **{**options, **more})


def wait_for_step(cluster, folder, step):
    cluster.wait(
        lambda: any(
            int(path.name.rpartition("-")[2]) >= step
            for path in (folder / "checkpoints").glob("step-*")
        ),
        f"step {step} of {folder}",
        120,
    )


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory):
    """The numbers of the long run without SLURM."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    done = run(command(long_run(folder, shards)), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return folder


def test_two_nodes_give_one_nodes_losses(cluster, submit, shards, tmp_path):
    for nodes, each in ((2, 1), (1, 2)):
        words = arguments(tmp_path / f"of-{nodes}", shards, **{"train.steps": 6})
        options = [f"--nodes={nodes}", "--cpus-per-task=2"]
        job = submit(
            "slurm/pretrain.sbatch", *words, options=options, SAMI_PROCESSES_PER_NODE=str(each)
        )
        assert cluster.wait_for(job, *ENDED)["JobState"] == "COMPLETED"
    assert summary(tmp_path / "of-2")["hardware"]["processes"] == 2
    assert numbers(tmp_path / "of-1") == numbers(tmp_path / "of-2")
    assert list((tmp_path / "of-2" / "slurm").glob("*.log"))


def test_requeued_and_out_of_time_it_goes_on_exactly(cluster, submit, shards, reference, tmp_path):
    """First the signal that the time limit sends, then a requeue from outside."""
    folder = tmp_path / "run"
    job = submit("slurm/pretrain.sbatch", *long_run(folder, shards), options=["--nodes=1"])
    wait_for_step(cluster, folder, 20)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", "the requeue", 60)
    cluster.wait_for(job, "RUNNING")
    cluster.wait(lambda: summary(folder)["status"] == "running", "the second start")
    wait_for_step(cluster, folder, 150)
    cluster.call("scontrol", "requeue", job)
    assert cluster.wait_for(job, *ENDED)["JobState"] == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "2"
    assert numbers(folder) == numbers(reference)
    log = next((folder / "slurm").glob("*.log")).read_text()
    assert "asked to stop: requeued, it will go on where it is" in log and "restart 2" in log


def test_a_real_time_limit(cluster, submit, shards, reference, tmp_path):
    """One minute, with the signal 40 seconds before: the job comes back until it is finished."""
    folder = tmp_path / "run"
    words = long_run(folder, shards, **{"train.steps": 1_000_000})
    options = ["--nodes=1", "--time=1", "--signal=B:USR1@40"]
    job = submit("slurm/pretrain.sbatch", *words, options=options)
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", "the requeue", 150)
    assert summary(folder)["status"] in ("interrupted", "running")
    cluster.call("scancel", job)


def test_killed_it_failed_and_starts_again_by_hand(cluster, submit, shards, reference, tmp_path):
    folder = tmp_path / "run"
    words = long_run(folder, shards)
    job = submit("slurm/pretrain.sbatch", *words, options=["--nodes=1"])
    wait_for_step(cluster, folder, 20)
    cluster.call("scancel", "--full", "--signal=KILL", job)
    assert cluster.wait_for(job, *ENDED)["JobState"] in ("FAILED", "CANCELLED")
    job = submit("slurm/pretrain.sbatch", *words, options=["--nodes=1"])
    assert cluster.wait_for(job, *ENDED)["JobState"] == "COMPLETED"
    assert numbers(folder) == numbers(reference)


def test_a_node_that_dies(cluster, submit, shards, reference, tmp_path):
    """SLURM requeues the job on the other node, and it goes on from its last checkpoint."""
    folder = tmp_path / "run"
    job = submit("slurm/pretrain.sbatch", *long_run(folder, shards), options=["--nodes=1"])
    wait_for_step(cluster, folder, 20)
    node = cluster.job(job)["NodeList"]
    cluster.kill_node(node)
    try:
        cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", "the requeue", 120)
        assert cluster.wait_for(job, *ENDED)["JobState"] == "COMPLETED"
        assert cluster.job(job)["NodeList"] != node
        assert numbers(folder) == numbers(reference)
    finally:
        cluster.start_node(node)
        cluster.wait(lambda: cluster.nodes()[node] == "IDLE", f"{node} again")


def test_what_fails_for_good_is_not_requeued(cluster, submit, shards, tmp_path):
    words = arguments(tmp_path / "run", shards, **{"train.batch_size": 4096})
    job = submit("slurm/pretrain.sbatch", *words, options=["--nodes=1"])
    told = cluster.wait_for(job, *ENDED)
    assert (told["JobState"], told["ExitCode"], told["Restarts"]) == ("FAILED", "2:0", "0")
    log = next((tmp_path / "run" / "slurm").glob("*.log")).read_text()
    assert "less than one train.batch_size of 4096" in log and "failed for good" in log


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
    log = (tmp_path / "out" / "slurm" / f"slurm-{job}_1.log").read_text()
    assert "s-001.tar is not a readable tar" in log
    assert "again: SAMI_SLICES=3 sbatch --array=1" in log
    bad.write_bytes(good)
    job = submit("slurm/cache_teacher.sbatch", *words, options=["--array=1"], SAMI_SLICES="3")
    assert cluster.wait_for(f"{job}_1", *ENDED)["JobState"] == "COMPLETED"
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())["shards"]
    assert {name: one["samples"] for name, one in told.items()} == dict.fromkeys(
        (f"s-00{number}.tar" for number in range(3)), 6
    )
