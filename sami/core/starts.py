"""What a run starts from: weights by path, which may move, and by content, which may not change."""

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from sami.core.checkpoint import Damaged, list_checkpoints, read_meta, sha256_of
from sami.core.errors import MachineError, UserError
from sami.core.run import Run
from sami.core.weights import Takes, check_weights, find_weights

RANDOM = "random"  # a path that asks for weights by name
Record = dict[str, Any]  # of weights: path as given, file, sha256, step of their checkpoint


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
    files: dict[str, str | None] = {}
    records: dict[str, Record] = {}
    if run.is_main:
        begun = _begun(run.dir / "checkpoints")
        for option, start in options.items():
            files[option], record = _settle(run, config, option, start, begun)
            if record is not None:
                records[option] = record
    # The same file on every rank, though another may be saved now.
    return run.gather((files, records))[0]


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
) -> tuple[str | None, Record | None]:
    """File and record of one option."""
    group, name = option.split(".")
    path = attrgetter(option)(config) or None
    gone, now, file = None, None, None
    if path == RANDOM:
        now, file = _record(RANDOM), RANDOM
    elif path is not None:
        try:
            found = find_weights(path, start.takes, option)
            file = str(found.file)
            now = _record(path, file, sha256_of(found.file), found.step)
            if found.note:
                run.say(f"{option}: {found.note}")
        except UserError as error:
            needed = start.needed == "always" or start.needed == "begin" and begun is None
            if needed or isinstance(error, MachineError):
                raise
            gone = str(error).split(";")[0]
    if begun is None:
        if gone:
            run.say(f"{gone}: it cannot be compared")
        return file, now
    before = _before(begun, option)
    if gone or (path is None and start.needed == "never"):
        if gone:
            run.say(f"{gone}: this run goes on without it; it began from {_describe(before)}")
        setattr(getattr(config, group), name, before and before["path"])
        return None, before
    _refuse_another(run, option, start, before, now)
    if before is not None and before["sha256"] and now is not None:
        now = before | {"path": now["path"], "file": now["file"]}
    return file, now


def _before(begun: dict[str, Any], option: str) -> Record | None:
    """The record of a run's begin; of earlier versions no more than the path."""
    records = begun["facts"].get("started_from")
    if records is not None and option in records:
        return records[option]
    group, name = option.split(".")
    path = (begun["config"].get(group) or {}).get(name) or None
    return path and _record(path)


def _record(
    path: str, file: str | None = None, sha256: str | None = None, step: int | None = None
) -> Record:
    return {"path": path, "file": file, "sha256": sha256, "step": step}


def _refuse_another(
    run: Run, option: str, start: Start, before: Record | None, now: Record | None
) -> None:
    """Raise UserError if the run began from other weights."""
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
        f"{run.dir} was begun with {option} {_describe(before)}, and now it is {_describe(now)}; "
        f"give --{option} {old} or where the same file lies now, or name another folder with "
        "--run.dir"
    )


def _describe(record: Record | None) -> str:
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
    paths = {option: attrgetter(option)(config) for option in options}
    return [
        check_weights(paths[option], start.takes, option)
        for option, start in options.items()
        if start.needed in needed and paths[option] != RANDOM
    ]
