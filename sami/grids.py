"""For which grid of patches an encoder stores its positions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sami.core.configfile import merge, read_layers

IMAGE_SIZE, PATCH_SIZE = 224, 16  # stage 1's, where nothing else is said
GRID = IMAGE_SIZE // PATCH_SIZE  # the released model's


def grid_of_config(file: Path, overrides: Mapping[str, Any]) -> int | None:
    """Side of the grid of positions that a stage 1 leaves behind; None if that makes no sense.

    For a start from random weights that is compared with it (``encoder.grid``): positions stored
    for another grid would be another start.

    Args:
        file: its configuration.
        overrides: values by dotted key.
    """
    config = merge(read_layers(str(file), ""))

    def value(group: str, name: str, default: Any) -> Any:
        return overrides.get(f"{group}.{name}", (config.get(group) or {}).get(name, default))

    size = value("data", "image_size", IMAGE_SIZE)
    patch = value("encoder", "patch_size", PATCH_SIZE)
    if type(size) is int and type(patch) is int and 0 < patch <= size:
        return size // patch
    return None
