"""What is looked at before a run: its inputs and, with --check, whether it can begin."""

import dataclasses
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sami.core.config import load_config, needs_of, require
from sami.core.dataset import Transform
from sami.core.entries import entry_of_groups
from sami.core.errors import BadSample, MachineError, UserError
from sami.core.exits import FINISHED
from sami.core.index import Shard
from sami.core.order import Order
from sami.core.patterns import expand
from sami.core.processes import is_launched
from sami.core.reading import read_range
from sami.core.run import Run, refuse_other_run
from sami.core.starts import Start, starts_missing

BATCH = 32  # images of the batch that --check reads
NOT_CHECKED = (
    "the other images, the held-out ones and the checksums of cached features; whether the "
    "device's memory is enough; several processes; whether {folder} can be written and, if it is "
    "begun, goes on under this configuration"
)


def start_entry(
    config_class: type,
    argv: Sequence[str] | None,
    starts_of: Callable[[Any], dict[str, Start]],
    train: Callable[[Any, Run, bool], int],
) -> int:
    """An entry's start: read the configuration, look for what it names, train; or ``--check``.

    With --check all of it happens in a temporary folder, up to a first batch; ``--check=values``
    only reads the configuration.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.
        starts_of: from a configuration to its options that name weights.
        train: called with the configuration, the run, and whether it only checks.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    only_check = "--check" in words
    config = load_config(config_class, [word for word in words if word != "--check"])
    entry = entry_of_groups(vars(config))
    script = entry and entry.script
    missing, needs = partial(find_missing, config, starts_of(config)), needs_of(words)
    if not only_check:
        with Run(config.run, config.train.precision, script) as run:
            require_inputs(missing(), needs)
            return train(config, run, False)
    require(
        not is_launched() or os.environ.get("WORLD_SIZE", "1") == "1",
        "--check is done by one process; start it with plain python, without a launcher",
    )
    print("the configuration: every field is valid", flush=True)
    own = Path(config.run.dir)
    refuse_other_run(own, script)
    with tempfile.TemporaryDirectory() as folder:
        if (own / "index").is_dir():  # what was read of the shards before
            shutil.copytree(own / "index", Path(folder) / "index")
        elsewhere = dataclasses.replace(config.run, dir=folder, wandb="disabled")
        config = dataclasses.replace(config, run=elsewhere)
        with Run(config.run, config.train.precision, script) as run:
            require_inputs(missing(), needs)
            code = train(config, run, True)
    print(f"not checked: {NOT_CHECKED.format(folder=own)}")
    return code


def require_inputs(found: list[str | None], needs: str = "") -> None:
    """
    Args:
        found: a sentence for each input of a run that is missing.
        needs: what the configuration needs, of :func:`sami.core.config.needs_of`.

    Raises:
        UserError: what is missing, all of it in one sentence.
    """
    missing = [words for words in found if words]
    numbered = "; ".join(f"({number}) {words}" for number, words in enumerate(missing, 1))
    many = f"{len(missing)} inputs are missing: {numbered}"
    lacking = "".join(missing) if len(missing) < 2 else many
    require(not missing, f"{lacking}; {needs}" if needs else lacking)


def find_missing(config: Any, starts: dict[str, Start]) -> list[str | None]:
    """What is wrong with each input of a run, if anything."""
    found: list[str | None] = []
    for key in ("shards", "val_shards"):
        patterns = getattr(config.data, key)
        try:
            if patterns or key == "shards":
                expand(patterns, f"data.{key}")
        except UserError as error:
            if isinstance(error, MachineError):
                raise
            found.append(str(error))
    return found + starts_missing(config, starts)


def tell_checked(
    order: Order,
    held_out: list[Shard],
    transform: Transform,
    batch_size: int,
    made: dict[str, str],
) -> int:
    """List what was found, and read a first batch; the exit code of ``--check``.

    Args:
        held_out: its shards.
        transform: how the batch is decoded.
        batch_size: train.batch_size.
        made: what else was made, and of what.

    Raises:
        UserError: the first images cannot be used.
    """
    train = f"{len(order.shards)} shard(s), {order.samples} images"
    steps = f"{order.steps_per_epoch} steps of {batch_size} an epoch"
    other = f"{len(held_out)} shard(s), {sum(shard.count for shard in held_out)} images"
    about = {
        "data.shards": f"{train}, {steps}",
        "data.val_shards": other if held_out else "none given",
    }
    for name, text in (about | made).items():
        print(f"{name}: {text}", flush=True)
    items, bad = [], Counter()
    positions = range(min(BATCH, batch_size, order.samples))
    for sample in read_range(order.shards, positions, transform.fields):
        try:
            items.append(transform.decode(sample, 0, False))
        except BadSample as error:
            bad[str(error)] += 1
    reasons = ", ".join(f"{number} {reason}" for reason, number in bad.items())
    require(
        bool(items),
        f"none of the first {len(positions)} images of data.shards can be used ({reasons}); does "
        "it hold what this run reads?",
    )
    transform.collate(items)
    left_out = f"; left out: {reasons}" if bad else ""
    print(f"a first batch: {len(items)} images read and decoded{left_out}")
    return FINISHED
