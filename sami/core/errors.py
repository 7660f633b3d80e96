"""The errors that are not bugs: what the user gave, one sample, and the machine."""

import errno
import os
import re
from collections.abc import Iterator


class UserError(ValueError):
    """Bad input: one sentence that names the thing and the remedy. The process leaves with 2."""


class MachineError(UserError):
    """The machine refused; nothing is known to be wrong with what was to be read or written."""


class BadSample(Exception):
    """A sample that cannot be used; the message is the reason that the summary counts it under."""


AGAIN = "run the same command again, it goes on from what is finished"
SHARE = f"see whether its disk or share is mounted (mount, df), mount it anew, and {AGAIN}"
FULL = f"make room and {AGAIN}: the last checkpoint, the last shard"
# What each refusal of the machine asks for. What is not here says something of what was read.
REMEDIES = {
    errno.EMFILE: f"raise the limit with ulimit -n 65536, or lower data.workers, and {AGAIN}",
    errno.ENFILE: f"the whole machine has reached its limit (sysctl fs.file-max); {AGAIN} later",
    errno.EACCES: "give this user the right to it (ls -l, chmod, chown; of its folders too)",
    errno.EPERM: "give this user the right to it (ls -l, lsattr, chmod, chown)",
    errno.EROFS: "it is mounted for reading only; name another folder, or mount it for writing",
    errno.EIO: f"its disk fails (dmesg tells more): copy it to a sound one, and {AGAIN}",
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "raise the limit with ulimit -f unlimited, or write to another file system",
    errno.ENOMEM: f"lower data.workers or what else runs on this machine, and {AGAIN}",
    errno.ENOLCK: f"its server gives no locks; {SHARE}",
}
REMEDIES |= dict.fromkeys(
    [
        *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN),
        *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENODEV, errno.ENXIO),
        getattr(errno, "EREMOTEIO", errno.ESTALE),  # not on every system
    ],
    SHARE,
)
SHARED_MEMORY = "/dev/shm"
# How a reader leaves that cannot hand over what it has read: the latter plus the error's number.
NO_SHARED_MEMORY, HANDING_OVER = 99, 100
WORDS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk is full for this user (quota)"}


def machine_error(
    error: BaseException, path: str | os.PathLike | None = None
) -> MachineError | None:
    """The sentence for an error of the machine; None for any other.

    Args:
        path: what was being read or written, where the error does not tell it.
    """
    for one in with_causes(error):
        if isinstance(one, MachineError):
            return one
        number = machine_number(one)
        in_memory = isinstance(one, RuntimeError) and re.search(r"</torch_\d+_", str(one))
        if in_memory and number in (None, errno.ENOSPC, errno.ENOMEM):  # torch's shared memory
            return MachineError(shared_memory_full())
        if number:
            message = WORDS.get(number, os.strerror(number))
            return MachineError(f"{_named(one, path)}{message}; {REMEDIES[number]}")
        if isinstance(one, MemoryError):
            return MachineError(f"{_named(one, path)}memory ran out; {REMEDIES[errno.ENOMEM]}")
    return None


def shared_memory_full() -> str:
    """The sentence for readers that find no room to hand over what they have read."""
    try:
        memory = os.statvfs(SHARED_MEMORY)
        size = f"{memory.f_frsize * memory.f_blocks / 1e6:.0f} MB"
    except (OSError, AttributeError):
        size = "of unknown size"
    return (
        f"{SHARED_MEMORY} ({size}) is too small for what the readers hand over; make it larger "
        "(docker run --shm-size 8g, or mount -o remount,size=8G /dev/shm), or lower --data.workers "
        "(0 needs none of it)"
    )


def reader_gone(error: BaseException) -> UserError | None:
    """Why a process that reads data is gone; None for an error that says nothing of one.

    Torch raises it wherever the main process happens to be when that process ends, mostly in the
    middle of a step.
    """
    message = " ".join(f"{error} {error.__cause__ or ''}".split())
    if not isinstance(error, RuntimeError) or "DataLoader worker" not in message:
        return None
    left = re.search(r"with exit code (\d+)", message)
    code = int(left[1]) if left else 0
    if "Bus error" in message or code == NO_SHARED_MEMORY:
        return MachineError(f"a process that reads data could not go on: {shared_memory_full()}")
    refused = machine_error(OSError(code - HANDING_OVER, ""))
    if refused is not None:
        return MachineError(f"a process that reads data could not go on: {refused}")
    return UserError(
        f"a process that reads data was killed ({message[:80]}); if memory ran out, which dmesg "
        "tells, lower --data.workers"
    )


def raise_if_machine(error: BaseException, path: str | os.PathLike | None = None) -> None:
    """To be called where an error is taken for damage of ``path``, or for nothing there.

    Raises:
        MachineError: it says nothing of the kind.
    """
    found = machine_error(error, path)
    if found is error:
        raise error
    if found is not None:
        raise found from error


def not_written(error: OSError, what: str, remedy: str) -> UserError:
    """The sentence for a place that was named for writing: another may do."""
    refused = machine_error(error)
    if refused is None or error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{what} cannot be written ({error.strerror}); {remedy}")
    return refused


def with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it was raised from, down to the first."""
    while error is not None:
        yield error
        error = error.__cause__


def _named(error: BaseException, path: str | os.PathLike | None) -> str:
    named = getattr(error, "filename", None) or path
    return f"{os.fsdecode(named)}: " if isinstance(named, (str, bytes, os.PathLike)) else ""


def machine_number(error: BaseException) -> int | None:
    """The number of an error of the machine; torch and safetensors have it in the text alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in REMEDIES else None
    if not isinstance(error, RuntimeError) and "Safetensor" not in type(error).__name__:
        return None
    return next((number for number in REMEDIES if os.strerror(number) in str(error)), None)
