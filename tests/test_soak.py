"""The soak test's tool, for a few kills."""

import sys

from tests.runs import ROOT, run


def test_a_few_kills(tmp_path):
    words = [sys.executable, str(ROOT / "tools/soak.py"), "--folder", str(tmp_path / "soak")]
    done = run([*words, "--kills", "3", "--workers", "2"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills (" in done.stdout and "equal to the run without kills" in done.stdout
    tmp_path.joinpath("there").mkdir()
    done = run([*words[:-1], str(tmp_path / "there")])
    assert done.returncode == 2 and "is there already" in done.stderr
