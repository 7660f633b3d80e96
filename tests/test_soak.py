"""A run that is killed a few times; ``python -m tests.soak`` does it a hundred times."""

import pytest

from tests import soak as soaking
from tests.soak import soak


def test_a_few_kills(tmp_path, capsys, monkeypatch):
    """Of this seed one comes after some steps, and one while a checkpoint is written."""
    monkeypatch.setattr(soaking, "STEPS_PER_KILL", 20)
    assert soak(tmp_path / "soak", kills=2, workers=2, seed=11)
    said = capsys.readouterr().out
    assert "2 kills (" in said and "equal to the run without kills" in said
    assert "'damaged image'" in said
    (tmp_path / "there").mkdir()
    with pytest.raises(AssertionError):
        soak(tmp_path / "there", kills=2)
