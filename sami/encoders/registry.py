"""Which encoders and teachers there are, by the names that configurations and files know.

A file of this package adds its own at its end:

- ``KINDS["mine"] = MyEncoder``: a class as :class:`sami.encoders.protocol.ImageEncoder` describes
  it, under the name that stands in the header of its files;
- ``ENCODERS["mine_ti"] = Architecture("mine", 192, 12, 3)``: a choice of ``encoder.name``;
- ``TEACHERS["mine"] = TeacherSource(build_mine, stride=14)``: a choice of ``teacher.name``. The
  tensors of its checkpoint are those whose names begin with its encoder's ``prefix``, without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sami.core.weights import Weights
from sami.encoders.protocol import EncoderShape, ImageEncoder


@dataclass(frozen=True)
class Architecture:
    """What a name of an encoder stands for: a class of KINDS, and its usual sizes."""

    kind: str
    width: int
    depth: int
    heads: int


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher comes from.

    Attributes:
        build: from a :class:`sami.teacher.TeacherConfig`, the weights of its checkpoint or None
            for random ones, and how a sentence about them begins and ends, to an encoder, whose
            weights are loaded afterwards.
        stride: that ``teacher.image_size`` has to be a multiple of, in pixels.
        sizes: width, depth and heads, where the configuration may look at them.
        takes: what its checkpoint may be, for a sentence.
        shape_in_file: whether its checkpoint tells what it is.
    """

    build: Callable[[Any, Weights | None, str, str], ImageEncoder]
    stride: int
    sizes: tuple[int, int, int] | None = None
    takes: str = "the file of its weights"
    shape_in_file: bool = False


KINDS: dict[str, type] = {}
ENCODERS: dict[str, Architecture] = {}
TEACHERS: dict[str, TeacherSource] = {}


def build(shape: EncoderShape) -> ImageEncoder:
    """An encoder with random weights."""
    return KINDS[shape.kind](shape)


def names_of_encoders(pretrains: bool | None = None) -> list[str]:
    """Choices of ``encoder.name``, those that stage 1 can train first, or only them."""
    students = [name for name, one in ENCODERS.items() if KINDS[one.kind].pretrains]
    return students if pretrains else students + [name for name in ENCODERS if name not in students]
