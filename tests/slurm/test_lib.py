"""What the batch scripts share, without a SLURM."""

import os
import signal
import subprocess

import pytest

from tests.runs import LIMIT, ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "says"), [(signal.SIGUSR1, "the time limit"), (signal.SIGTERM, "taken away")]
)
def test_a_signal_before_the_run_has_started_is_not_lost(tmp_path, number, says):
    """It would end the batch script, and nobody would queue the job again."""
    site = tmp_path / "site.env"
    site.write_text("sami_setup() { true; }\n")
    script = (
        f"source slurm/lib.sh; folder={tmp_path}; kill -{number} $$\n"
        f"until [ -e {tmp_path}/stop ]; do sleep 0.1; done &\n"
        'ask_when_told $!; await $pid; echo "$asked"\n'
    )
    told = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1", "SAMI_SITE": str(site)}
    done = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | told,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(says)
