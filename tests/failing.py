"""Stage 1 whose last rank fails in its fifth update; started by a launcher.

failing.py {bug,user,killed} [options of sami/pretrain.py]
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from sami.core.errors import UserError
from sami.core.state import State


def fail(kind: str) -> None:
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise UserError("spoilt on purpose") if kind == "user" else RuntimeError("spoilt on purpose")


def main() -> None:
    kind = sys.argv.pop(1)
    update, calls = State.update, []

    def spoilt(state: State, step: int) -> None:
        calls.append(1)
        if len(calls) == 5:
            fail(kind)
        update(state, step)

    if os.environ["RANK"] != "0":
        State.update = spoilt
    runpy.run_path(str(Path(__file__).parents[1] / "sami" / "pretrain.py"), run_name="__main__")


if __name__ == "__main__":
    main()
