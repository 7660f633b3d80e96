"""What stands last under a launcher."""

import subprocess
import sys

import psutil
import pytest

from sami.core import launcher
from tests.runs import LIMIT, ROOT, arguments, run

SENTENCE = "error: data.shards: 'nowhere.tar' matches no file"


@pytest.mark.parametrize("config", ["cpu", "cpu_2"])
def test_the_sentence_stands_last_and_once(config, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--config_file"]
    words = [sys.executable, *launch, str(ROOT / f"configs/accelerate/{config}.yaml")]
    options = arguments(tmp_path / "run", "nowhere.tar", **{"run.device": "cpu"})
    done = subprocess.run(
        [*words, str(ROOT / "sami/pretrain.py"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        timeout=LIMIT,
    )
    assert done.returncode == 1 and "Traceback" in done.stdout  # the launcher's own
    assert done.stdout.splitlines()[-1].startswith(SENTENCE), done.stdout
    assert done.stdout.count(SENTENCE) == 1, done.stdout


def test_in_a_job_it_is_said_at_once(monkeypatch, capsys):
    """A process that is left behind would end with the job's step."""
    monkeypatch.setattr(launcher, "find_launcher", psutil.Process)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("RANK", "3")
    launcher.say_last("error: so it is")
    assert capsys.readouterr().err == "rank 3: error: so it is\n"


def test_a_shell_that_mentions_a_launcher_is_none():
    """What is started by hand does not wait for its shell to end."""
    assert launcher.find_launcher() is None
    look = "from sami.core.launcher import find_launcher; print(find_launcher())"
    script = f"true accelerate launch; {sys.executable} -c '{look}'; true"
    assert run(["bash", "-c", script]).stdout == "None\n"
