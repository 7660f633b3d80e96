"""What a run starts from: weights by path, which may move, and by content, which may not change."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sami.core.checkpoint import Damaged, list_checkpoints, read_meta, sha256_of
from sami.core.errors import MachineError, UserError
from sami.core.run import Run
from sami.core.weights import Takes, check_weights, find_weights

RANDOM = "random"  # a path that asks for weights by name


@dataclass(frozen=True)
class Start:
    """An option that names weights.

    Attributes:
        takes: what it may name.
        needed: begin, by a run that begins and not by one that goes on from its checkpoint; always;
            or never: it is only compared with what is known of it.
    """

    takes: Takes
    needed: Literal["begin", "always", "never"] = "begin"


def find_starts(
    run: Run, config: Any, options: dict[str, Start]
) -> tuple[dict[str, str | None], dict[str, Any]]:
    """Find the weights that a run starts from, and compare them with those that it began from.

    Collective. What has gone of a run that goes on is not missed: ``config`` gets the path back
    that the run began from.

    Args:
        options: by name, such as encoder.checkpoint.

    Returns:
        By option the file to be opened, None for none; and a record for the summary: by option
        ``path`` as it was given, ``file``, ``sha256`` and ``step``.

    Raises:
        UserError: weights that are not there, or others than the run began from.
    """
    found: tuple[dict[str, str | None], dict[str, Any]] = ({}, {})
    if run.is_main:
        begun = _begun(run.dir / "checkpoints")
        for option, start in options.items():
            file, record = _settle(run, config, option, start, begun)
            found[0][option] = file
            if record is not None:
                found[1][option] = record
    return run.gather(found)[0]  # the same file on every rank, though another may be saved now


def _begun(checkpoints: Path) -> dict[str, Any] | None:
    """What the newest readable checkpoint says of its run; None where a run begins."""
    for checkpoint in reversed(list_checkpoints(checkpoints)):
        try:
            return read_meta(checkpoint)
        except Damaged:
            continue
    return None


def _settle(
    run: Run, config: Any, option: str, start: Start, begun: dict[str, Any] | None
) -> tuple[str | None, dict[str, Any] | None]:
    """File and record of one option."""
    group, name = option.split(".")
    path = getattr(getattr(config, group), name) or None
    gone, now, file = None, None, None
    if path is not None and path != RANDOM:
        try:
            found = find_weights(path, start.takes, option)
            file = str(found.file)
            now = {
                "path": path,
                "file": file,
                "sha256": sha256_of(found.file),
                "step": found.step,
            }
            if found.note:
                run.say(f"{option}: {found.note}")
        except UserError as error:
            if isinstance(error, MachineError) or start.needed == "always":
                raise
            if start.needed == "begin" and begun is None:
                raise
            gone = str(error).split(";")[0]
    elif path == RANDOM:
        now, file = {"path": RANDOM, "file": None, "sha256": None, "step": None}, RANDOM
    if begun is None:
        if gone:
            run.say(f"{gone}: it cannot be compared")
        return file, now
    before = _before(begun, option)
    if gone or (path is None and start.needed == "never"):
        if gone:
            run.say(f"{gone}: this run goes on without it; it began from {_words(before)}")
        setattr(getattr(config, group), name, before and before["path"])
        return None, before
    _refuse_another(run, option, start, before, now)
    if before is not None and before["sha256"] and now is not None:
        now = before | {"path": now["path"], "file": now["file"]}
    return file, now


def _before(begun: dict[str, Any], option: str) -> dict[str, Any] | None:
    """The record of a run's begin; of earlier versions no more than the path."""
    records = begun["facts"].get("started_from")
    if records is not None and option in records:
        return records[option]
    group, name = option.split(".")
    path = (begun["config"].get(group) or {}).get(name) or None
    return path and {"path": path, "file": None, "sha256": None, "step": None}


def _refuse_another(
    run: Run,
    option: str,
    start: Start,
    before: dict[str, Any] | None,
    now: dict[str, Any] | None,
) -> None:
    """
    Raises:
        UserError: the run began from other weights.
    """
    known = before is not None and (before["sha256"] or before["path"] == RANDOM)
    if before is None or now is None:
        same = before is now
    elif known and (now["sha256"] or now["path"] == RANDOM):
        same = before["sha256"] == now["sha256"]
    else:  # of an earlier version: a teacher's content is compared elsewhere
        same = start.needed != "begin" or before["path"] == now["path"]
    if same:
        return
    old = "null" if before is None else before["path"]
    raise UserError(
        f"{run.dir} was begun with {option} {_words(before)}, and now it is {_words(now)}; give "
        f"--{option} {old} or where the same file lies now, or name another folder with --run.dir"
    )


def _words(record: dict[str, Any] | None) -> str:
    """A record, for a sentence."""
    if record is None:
        return "null (random weights)"
    sha256 = f" (sha256 {record['sha256'][:12]})" if record["sha256"] else ""
    step = f", step {record['step']}" if record["step"] is not None else ""
    return f"{record['path']}{step}{sha256}"


def starts_missing(config: Any, options: dict[str, Start]) -> list[str | None]:
    """What is wrong with each path that a run needs, without loading anything; None if nothing is.

    A run that goes on from its checkpoint needs no more than what is needed always.
    """
    going_on = bool(list_checkpoints(Path(config.run.dir) / "checkpoints"))
    needed = {"always"} if going_on else {"always", "begin"}
    paths = {
        option: getattr(getattr(config, option.split(".")[0]), option.split(".")[1])
        for option, start in options.items()
        if start.needed in needed
    }
    return [
        check_weights(path, options[option].takes, option)
        for option, path in paths.items()
        if path != RANDOM
    ]
