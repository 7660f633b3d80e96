"""Encoders in files: which shape they have, and their weights."""

import itertools
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from sami.core.errors import UserError
from sami.core.weights import Takes, Weights, find_weights, read_weights
from sami.encoders.protocol import MODEL_PREFIX, EncoderShape
from sami.encoders.registry import KINDS

# By the header's key: what the tensors' names begin with, and what a file without an encoder is.
FORMS = {
    "encoder": ("", "is not an encoder of stage 1"),
    "model": (MODEL_PREFIX, "holds no model that is known here"),
}
# Models that are known by their names alone: what these begin with, and what they are.
STRANGERS = ((("image_encoder.trunk.", "sam_mask_decoder."), "SAM 2"),)


def read_model(
    path: str | Path, takes: Takes, option: str = "", say: Callable[[str], None] = print
) -> tuple[Weights, Path]:
    """The tensors of whatever holds an encoder or a model, and its file.

    Args:
        option: that the path was given by, for messages.
        say: told where the weights are not those of a run's end.

    Raises:
        UserError: there is none that can be read.
        OSError: the machine cannot read it.
    """
    found = find_weights(path, takes, option)
    if found.note:
        say(found.note)
    return _renamed(read_weights(found.file, takes, option)), found.file


def _renamed(weights: Weights) -> Weights:
    """An encoder that others wrote, under the names that it has here."""
    if weights.kind is not None:
        return weights
    for prefix, kind in itertools.product(("", MODEL_PREFIX), KINDS.values()):
        tensors = kind.rename(weights.below(prefix))
        if tensors is not None:
            rest = {} if not prefix else weights.tensors
            rest = {name: t for name, t in rest.items() if not name.startswith(prefix)}
            own = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
            return replace(weights, tensors=rest | own)
    return weights


def read_shape(
    weights: Weights, form: str, what: str, remedy: str, heads: int | None = None
) -> EncoderShape:
    """What the encoder in a file is: by its header, or by its tensors where others wrote it.

    Args:
        form: encoder, stage 1's; model, the image encoder of one.
        what: the file, for a sentence; ``remedy``: the sentence's end.
        heads: their number where neither tells; None for the usual one.

    Raises:
        UserError: it is none that is known here.
    """
    prefix, is_none = FORMS[form]
    try:
        header = weights.header(form)
        if header is None:
            return _infer(weights, form, what, remedy, heads)
        shape = _from_header(header if form == "encoder" else header["encoder"], form)
        if shape.kind not in KINDS:
            raise ValueError(
                f"an image encoder '{shape.kind}', none of {', '.join(KINDS)}, written by "
                "another version"
            )
        sizes = (shape.width, shape.depth, shape.heads, shape.patch_size, shape.image_size)
        if form == "encoder" and (min(sizes) <= 0 or shape.width % shape.heads):
            raise ValueError(shape.describe())
        return shape
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        why = f"no {error.args[0]}" if isinstance(error, KeyError) else f"{error}"
        raise UserError(f"{what} {is_none} ({why}); {remedy}") from error


def _from_header(info: dict, form: str) -> EncoderShape:
    if form == "model":
        return EncoderShape(**{one.name: info[one.name] for one in fields(EncoderShape)})
    names = ("width", "depth", "heads", "patch_size", "image_size")
    return EncoderShape.stage_one(*(info[name] for name in names), info.get("kind", "vit"))


def _infer(weights: Weights, form: str, what: str, remedy: str, heads: int | None) -> EncoderShape:
    """By the tensors: of the first class of KINDS that takes them for its own."""
    prefix, _ = FORMS[form]
    tensors = weights.below(prefix)
    try:
        shapes = (kind.infer(tensors, heads) for kind in KINDS.values())
        shape = next((shape for shape in shapes if shape is not None), None)
        if shape is None:
            for marks, name in STRANGERS:
                if any(key.startswith(marks) for key in weights.tensors):
                    raise UserError(f"{what} is {name}, which is not opened here; {remedy}")
            name = "patch_embed.proj.weight"
            raise KeyError("pos_embed" if name in tensors else name)
        if form == "model" and shape.channels is None:
            raise KeyError("neck.0.weight")
    except KeyError as error:
        raise KeyError(f"{prefix}{error.args[0]}") from error
    if min(shape.depth, shape.heads, shape.grid) <= 0 or shape.width % shape.heads:
        raise ValueError(f"a width of {shape.width}" if form == "model" else shape.describe())
    return shape
