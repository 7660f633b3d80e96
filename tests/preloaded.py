"""Processes of ``python SCRIPT ...`` that need not import the libraries: forked from one that has.

Importing torch, torchvision and timm takes some four seconds of a core, which the tests would spend
a hundred times. The standard library's fork server does it once; what it forks is a process of its
own, in its own session, that reads the project's files anew and can be killed like any other. A
launcher (``python -m accelerate.commands.launch``) is forked too, and forks its ranks.
"""

import atexit
import hashlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LAUNCHER = "accelerate.commands.launch"
LIBRARIES = [
    "torch._dynamo",
    "torch.distributed.run",
    "torchvision",
    "timm",
    LAUNCHER,
    "segment_anything",
    "webdataset",
    "jsonargparse",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pycocotools.mask",
    "rich.progress",
    "scipy.ndimage",
]
LATER = ("OMP_NUM_THREADS", "PYTHONPATH")  # what can be set in a process that runs
ENVIRONMENT = dict(os.environ)  # of the fork server; some of it works only from the very start
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


class Popen(subprocess.Popen):
    """The usual one, and a quick one for a script that wants nothing but our own environment."""

    _process: Any = None

    def _execute_child(self, args: Any, *more: Any) -> None:
        # The standard library's order; the names are its own.
        _, preexec_fn, _, pass_fds, cwd, env, _, _, shell, *more_of_it = more
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = more_of_it[:6]
        pipes = (p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        environment = dict(os.environ if env is None else env)
        if (
            preexec_fn
            or pass_fds
            or shell
            or p2cread != -1
            or not _is_quick(args)
            or _told(environment) != _told(ENVIRONMENT)
        ):
            return super()._execute_child(args, *more)
        sys.audit("subprocess.Popen", args[0], args, cwd, env)  # as the usual one says
        files = [number if file == -1 else file for number, file in ((1, c2pwrite), (2, errwrite))]
        script = _Script([*map(str, args[1:])], files, os.fspath(cwd or os.getcwd()), environment)
        self._process = _context.Process(target=script)
        self._process.start()
        self.pid, self._child_created = self._process.pid, True
        self._close_pipe_fds(*pipes)

    def _internal_poll(self, *more: Any, **named: Any) -> int | None:
        if self._process is None:
            return super()._internal_poll(*more, **named)
        self._process.join(0)
        self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._process is None:
            return super()._wait(timeout)
        self._process.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def _is_quick(words: Any) -> bool:
    if isinstance(words, str) or len(words) < 2 or words[0] != sys.executable:
        return False
    return str(words[1]).endswith(".py") or list(words[1:3]) == ["-m", LAUNCHER]


def _told(environment: dict[str, str]) -> dict[str, str]:
    """Without what pytest and torch write there about themselves, and what can be set later too."""
    return {
        key: value
        for key, value in environment.items()
        if not key.startswith(("PYTEST_", "TORCHINDUCTOR_", *LATER))
    }


def title_of(words: list[str]) -> str:
    """What a forked process is called in /proc/PID/comm, its command line being the server's.

    The runs of one folder bear one name.
    """
    told = next((word for word in words if str(word).startswith("--run.dir=")), " ".join(words))
    return "t-" + hashlib.sha256(told.encode()).hexdigest()[:12]


class _Script:
    """What the forked process does; it is pickled to the fork server."""

    def __init__(
        self, words: list[str], files: list[int], cwd: str, environment: dict[str, str]
    ) -> None:
        self.words, self.files, self.cwd, self.environment = words, files, cwd, environment

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"files": [DupFd(file) for file in self.files]}

    def __call__(self) -> None:
        os.setsid()
        for number, file in enumerate(self.files, 1):
            os.dup2(file.detach(), number)
        multiprocessing.process._parent_process = None
        multiprocessing.set_start_method(None, force=True)
        _become(self.words, self.cwd, self.environment)


class _Rank(subprocess.Popen):
    """A process of a forked launcher's, ``python [-u] SCRIPT ...``: its child, as it has to be."""

    def _execute_child(self, args: Any, *more: Any) -> None:
        words = [str(word) for word in args if word != "-u"]
        if not _is_quick(words) or any(pipe != -1 for pipe in more[9:15]):
            return super()._execute_child(args, *more)
        cwd, environment, own_session = more[4] or os.getcwd(), more[5] or os.environ, more[20]
        environment = dict(environment)
        self.pid, self._child_created = os.fork(), True
        if self.pid == 0:
            if own_session:
                os.setsid()
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _become(words[1:], os.fspath(cwd), environment)


def _become(words: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Be the program for the rest of this process."""
    Path("/proc/self/comm").write_text(title_of(words))
    out, err = sys.stdout, sys.stderr  # what they were opened on is another file by now
    sys.stdout = open(1, "w", encoding=out.encoding, errors=out.errors, closefd=False)
    sys.stderr = open(2, "w", 1, encoding=err.encoding, errors=err.errors, closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    # The path of a script, without what pytest and tests/conftest.py have put there.
    named = [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]
    ours = {str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/slurm"), *named}
    first = cwd if words[0] == "-m" else str(Path(words[0]).absolute().parent)
    sys.path[:] = [first, *named, *(place for place in sys.path if place not in ours)]
    sys.argv = words[words[0] == "-m" :]
    os._exit(_ended(_launch if words[0] == "-m" else _run_script))


def _run_script() -> None:
    runpy.run_path(str(Path(sys.argv[0]).absolute()), run_name="__main__")


def _launch() -> None:
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess.Popen = subprocess_handler.Popen = _Rank
    launch.main()


def _ended(program: Callable[[], None]) -> int:
    """Run it; what the interpreter would leave with."""
    code: Any = 0
    try:
        program()
    except SystemExit as left:
        code = left.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)
