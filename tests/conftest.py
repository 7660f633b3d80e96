"""Set-up for all tests."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for tools.* and tests.*
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def photos() -> str:
    """Pattern of the real photographs beside the project; skips where they are not."""
    folder = ROOT.parent / "shared" / "data" / "photos"
    if not folder.exists():
        pytest.skip("the photographs (../shared/data/photos) are not here")
    return str(folder / "photos-{000000..000007}.tar")
