"""The soak test's tool, for a few kills."""

import subprocess

import pytest

from sami.core.errors import UserError
from tests.preloaded import Popen
from tests.runs import LIMIT
from tools.soak import main


def test_a_few_kills(tmp_path, capsys, monkeypatch):
    """What is killed is started as ever, what runs to its end without its start."""

    def run(words, check=False, **more):
        return subprocess.CompletedProcess(words, Popen(words, **more).wait(LIMIT))

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["--folder", str(tmp_path / "soak"), "--kills", "2", "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 kills (" in said and "equal to the run without kills" in said
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is there already"):
        main(["--folder", str(tmp_path / "there")])
