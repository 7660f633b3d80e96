"""Weights by their name in timm, which keeps them at Hugging Face."""

import difflib
from pathlib import Path

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from sami.core.errors import UserError

FILE = "model.safetensors"


def fetch_timm(name: str, what: str) -> Path:
    """The file of a model of timm's: from Hugging Face's cache here, or else from the network.

    Args:
        name: such as vit_tiny_patch16_224.augreg_in21k.
        what: option and value, for a sentence.

    Raises:
        UserError: timm has no weights under this name, or they cannot be fetched.
    """
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown name, or an unknown tag behind the point
        config = None
    if config is None or not config.hf_hub_id:
        near = difflib.get_close_matches(name, timm.list_pretrained(), 3, cutoff=0.5)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise UserError(
            f"{what}: timm has no weights of this name{hint} (timm.list_pretrained() lists all)"
        )
    for here in (True, False):
        try:
            return Path(hf_hub_download(config.hf_hub_id, FILE, local_files_only=here))
        except (OSError, HfHubHTTPError) as error:
            failure = error
    address = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{FILE}"
    raise UserError(
        f"{what} cannot be downloaded ({' '.join(str(failure).split())[:80]}); fetch {address} on "
        "a machine with a network, and give the file's path instead"
    ) from failure
