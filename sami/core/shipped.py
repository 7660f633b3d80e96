"""Where the files are that come with the project: in a checkout, or in the installed package.

A wheel has configs/, tools/ and slurm/ in ``sami/share/``; sami/ and finetune/ stand beside each
other in both.
"""

from pathlib import Path

from sami.core.paths import exists, is_file

_PACKAGES = Path(__file__).parents[2]  # holds sami/ and finetune/
_SHARED = ("configs", "tools", "slurm")
IS_CHECKOUT = is_file(_PACKAGES / "pyproject.toml")
# What the relative paths of a sweep file, such as its `out`, are below.
HOME = _PACKAGES if IS_CHECKOUT else Path()


def shipped(name: str) -> Path:
    """The file or folder of a name such as ``configs/pretrain/toy.yaml`` or ``sami/pretrain.py``.

    In an installed project the working directory's own comes first, so that copied and changed
    configurations count. Whether it is there is for the caller to see.
    """
    if IS_CHECKOUT or Path(name).is_absolute():
        return _PACKAGES / name
    if Path(name).parts[0] not in _SHARED:
        return _PACKAGES / name
    return Path(name) if exists(name) else _PACKAGES / "sami" / "share" / name


def find(path: str | Path) -> Path:
    """A file that a user named: theirs, or, where they have none, the project's of that name."""
    theirs, ours = Path(path), shipped(str(path))
    return ours if not exists(theirs) and is_file(ours) else theirs


def short(text: str) -> str:
    """A command line's word without the folder that :func:`shipped` put before a name."""
    for folder in (_PACKAGES / "sami" / "share", _PACKAGES):
        text = text.replace(f"{folder}/", "")
    return text
