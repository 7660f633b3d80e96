"""How a process leaves: exit codes, and one sentence for what the user can mend."""

import importlib.util
import sys
from collections.abc import Callable
from io import TextIOWrapper

import torch

from sami.core.errors import UserError, machine_error, reader_gone
from sami.core.launcher import is_said, say_last

FINISHED, USER_ERROR, ASKED_TO_STOP = 0, 2, 75


def run_entry(main: Callable[[], int]) -> int:
    """Run an entry and turn what the user can mend into one sentence and exit code 2."""
    if isinstance(sys.stdout, TextIOWrapper):  # what a terminal cannot show must not end a run
        sys.stdout.reconfigure(errors="replace")
    try:
        _require_locks()
        return main()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        sentence = user_error(error)
        if sentence is None and isinstance(error, RuntimeError) and is_said():
            return USER_ERROR  # its connection broke because another process failed
        if sentence is None:
            raise
        sys.stdout.flush()
        say_last(f"error: {' '.join(str(sentence).split())}")
        return USER_ERROR


def _require_locks() -> None:
    """Raise UserError if this is Windows."""
    if importlib.util.find_spec("fcntl") is None:
        raise UserError(
            "native Windows is not supported (it lacks the locks and signals that runs are kept "
            "safe with); use WSL: wsl --install"
        )


def user_error(error: BaseException) -> UserError | None:
    """The sentence for an error that the user can mend; None for a bug."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            "the GPU's memory is full; lower --train.micro_batch_size (the result stays the same), "
            "in stage 2 also --data.masks_per_image, or set --train.checkpointing true; in a tool "
            "lower --batch"
        )
    return reader_gone(error) or machine_error(error)
