"""Set-up for all tests."""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from accelerate.state import AcceleratorState

from sami.core import remote
from sami.core.exits import run_entry

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for tools.* and tests.*
# Threads that wait for each other are slower than one where tests run side by side: here, and in
# what the tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
PROGRAMS = re.compile(
    "python|bash|sh$|accelerate|sami-|wandb|[gc][+][+]"
)  # not git, which is quick
hypothesis.settings.register_profile("tests", deadline=None)  # a limit would judge the machine
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser):
    told = "leave out the tests that start a program or are marked slow"
    parser.addoption("--quick", action="store_true", help=told)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """One limit for every test, in tests/runs.py; --timeout gives another."""
    from tests.runs import TEST_LIMIT

    if config.getoption("timeout") is None:
        config.option.timeout = TEST_LIMIT
    config.addinivalue_line("markers", "slow: takes seconds, and --quick does without")
    if config.getoption("quick"):
        sys.addaudithook(_skip_programs)


def pytest_collection_modifyitems(config, items):
    if config.getoption("quick"):
        items[:] = [item for item in items if item.get_closest_marker("slow") is None]


def _skip_programs(event: str, given: tuple) -> None:
    """A test that comes to start a program of PROGRAMS ends there; no list of tests has to be kept.

    What ``pipe:`` runs, git and the like are quick.
    """
    if event != "subprocess.Popen" or "PYTEST_CURRENT_TEST" not in os.environ:  # pytest's own
        return
    name = Path(os.fsdecode(given[0])).name
    if PROGRAMS.match(name) and ("-c" not in given[1] or name.startswith("python")):
        pytest.skip("starts a program, and --quick does without")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Shards that are fetched whole lie with what else the tests write; nothing is waited for."""
    remote.DEFAULT_FOLDER = tmp_path_factory.mktemp("shards")
    remote.DEFAULT_PATIENCE = remote.Patience(stall=5, pauses=(0.01, 0.02))


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
