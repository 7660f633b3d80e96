"""Read the tensors of a YOLOv8-seg file of ultralytics, such as FastSAM-x.pt, without running it.

Such a file is the pickle of a whole model. Unpickling one calls whatever its author chose, and a
list of trusted classes does not help: ultralytics' own constructors evaluate text that they are
given (``activation`` in a model's YAML). So no object of the file is built. Every class or function
that it names stands as a :class:`Record`, which does nothing and keeps what it is given; tensors
are read from the records, and the model is built from the installed library's own definition.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

from sami.core.errors import UserError
from sami.core.weightfile import BROKEN, NotWeights, check_sums
from sami.core.weights import Takes, find_weights, read_weights

TAKES = Takes(
    (), "weights of YOLOv8-seg, such as FastSAM-x.pt, FastSAM-s.pt or what ultralytics trained"
)
SIDES = ("ema", "model")  # where a checkpoint keeps its model; the average where there is one
PLACES = ("_parameters", "_buffers")  # where a module of torch keeps tensors
DEEPEST = 20  # modules within modules; YOLOv8-seg has 6


class Record:
    """Whatever a pickle says about an object: arguments and state, never executed."""

    def __new__(cls, *given: Any, **named: Any) -> "Record":
        return super().__new__(cls)

    def __init__(self, *given: Any, **named: Any) -> None:
        self.given, self.state = given, {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


def is_yolo(file: Path) -> bool:
    """Whether a file is a pickle of ultralytics, by the classes that it names."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except BROKEN:  # not torch's format
        return False
    return any(name.startswith("ultralytics.") for name in named)


def read_yolo(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors by name, as YOLOv8-seg has them without the leading ``model.``; floating ones fp32.

    Also reads state dicts and safetensors with these names.

    Raises:
        UserError: no file of weights, damaged, or one that holds no module.
    """
    file = find_weights(path, TAKES).file
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except BROKEN:  # not torch's format: read_weights says what it is
        named = []
    if not named:
        return read_weights(file, TAKES).tensors
    try:
        with file.open("rb") as stream:
            check_sums(stream, str(file))
        with torch.serialization.safe_globals([(Record, name) for name in named]):
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except NotWeights as error:
        raise UserError(f"{error}; {TAKES.remedy('')}") from error
    except BROKEN as error:
        code = isinstance(error, pickle.UnpicklingError)
        why = "asks to run code that no model needs" if code else "is damaged"
        raise UserError(f"{file} {why} and is not read; {TAKES.remedy('')}") from error
    model = stored
    if isinstance(stored, dict):
        model = next((stored[side] for side in SIDES if stored.get(side) is not None), None)
    tensors: dict[str, torch.Tensor] = {}
    _collect(model, "", tensors)
    if not tensors:
        raise UserError(f"{file} holds no model of ultralytics; {TAKES.remedy('')}")
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _collect(module: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    """Add the tensors of a recorded module and of those in it."""
    if not isinstance(module, Record) or prefix.count(".") > DEEPEST:
        return
    for place in PLACES:
        for name, value in _items(module.state.get(place)):
            if isinstance(value, torch.Tensor):
                value = value.detach()
                tensors[f"{prefix}{name}"] = value.float() if value.is_floating_point() else value
    for name, inner in _items(module.state.get("_modules")):
        _collect(inner, f"{prefix}{name}.", tensors)


def _items(found: Any) -> list[tuple[Any, Any]]:
    return list(found.items()) if isinstance(found, dict) else []
