"""Set-up for all tests."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from sami.core.exits import run_entry

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for tools.* and tests.*
torch.set_num_threads(2)


@pytest.fixture
def in_process(capsys):
    """Run an entry's main in this process: exit code, and what stood on stderr."""
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }

    def called(main: Callable[[list[str]], int], words: list[str]) -> tuple[int, str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        code = run_entry(lambda: main(words))
        return code, capsys.readouterr().err

    yield called
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def eager_compile(monkeypatch) -> list[torch.nn.Module]:
    """Modules are compiled by the backend that is quick; they are listed."""
    compile_, compiled = torch.nn.Module.compile, []

    def eager(module: torch.nn.Module) -> None:
        compiled.append(module)
        compile_(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    return compiled


@pytest.fixture(scope="session")
def photos() -> str:
    """Pattern of the real photographs beside the project; skips where they are not."""
    folder = ROOT.parent / "shared" / "data" / "photos"
    if not folder.exists():
        pytest.skip("the photographs (../shared/data/photos) are not here")
    return str(folder / "photos-{000000..000007}.tar")
