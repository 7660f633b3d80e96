"""A run that is killed a few times; ``python -m tests.soak`` does it a hundred times."""

import pytest

from tests.soak import soak


def test_a_few_kills(tmp_path, capsys):
    assert soak(tmp_path / "soak", kills=2, workers=2)
    said = capsys.readouterr().out
    assert "2 kills (" in said and "equal to the run without kills" in said
    assert "'damaged picture'" in said
    (tmp_path / "there").mkdir()
    with pytest.raises(AssertionError):
        soak(tmp_path / "there", kills=2)
