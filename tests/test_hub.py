"""ViTs of other people as a start: timm's by name and by file, MAE's."""

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

import sami.core.hub as hub
from finetune.model import MaskDecoderConfig, build_model
from sami.core.errors import UserError
from sami.encoder import EncoderConfig, load_encoder

NAME = "timm:vit_tiny_patch16_224.augreg_in21k"


@pytest.fixture(scope="module")
def theirs():
    """timm's ViT-Ti, with its classifier, as its file has it."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224.augreg_in21k").state_dict()


def started(checkpoint, name="vit_ti"):
    config = EncoderConfig(name, checkpoint=str(checkpoint))
    return build_model(config, MaskDecoderConfig(), 128, "square", False).image_encoder


def test_a_start_by_name(theirs, tmp_path, monkeypatch):
    """Fetched once: what lies in Hugging Face's cache is asked for first."""
    asked = []

    def download(repository, file, local_files_only):
        asked.append((repository, file, local_files_only))
        if local_files_only and len(asked) == 1:
            raise LocalEntryNotFoundError("not in the cache")
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    save_file(theirs, tmp_path / "model.safetensors")
    encoder = started(NAME)
    repository = "timm/vit_tiny_patch16_224.augreg_in21k"
    assert asked == [(repository, "model.safetensors", here) for here in (True, False)]
    own = encoder.state_dict()
    for name, tensor in theirs.items():
        if not name.startswith(("head.", "norm.", "cls_token")):
            assert torch.equal(own[name], tensor), name
    started(NAME)
    assert len(asked) == 3
    images = torch.randn(1, 3, 224, 224)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    model.load_state_dict({n: t for n, t in theirs.items() if not n.startswith("head.")})
    with torch.no_grad():
        tokens = load_encoder(tmp_path / "model.safetensors").eval().tokens(images)
        torch.testing.assert_close(tokens, model.forward_features(images))


@pytest.mark.slow
def test_mae_files(theirs, tmp_path):
    """MAE's pretraining file holds a decoder, its finetuned one a classifier behind fc_norm."""
    bare = {n: t for n, t in theirs.items() if not n.startswith("head.")}
    more = {"mask_token": torch.ones(1, 1, 512), "decoder_embed.weight": torch.ones(512, 192)}
    more |= {"decoder_blocks.0.norm1.weight": torch.ones(512)}
    tuned = {"fc_norm.weight": torch.ones(192), "head.weight": torch.ones(9, 192)}
    for number, extra in enumerate((more, tuned)):
        torch.save({"model": bare | extra}, tmp_path / f"{number}.pth")
        own = started(tmp_path / f"{number}.pth").state_dict()
        assert torch.equal(own["blocks.11.mlp.fc2.weight"], bare["blocks.11.mlp.fc2.weight"])
    torch.save({"model": bare | {"adapter.weight": torch.ones(3)}}, tmp_path / "strange.pth")
    with pytest.raises(UserError, match=r"adapter\.weight is not part of it"):
        started(tmp_path / "strange.pth")
    with pytest.raises(UserError, match="does not fit the configuration"):
        started(tmp_path / "0.pth", "vit_s")


def test_names_that_cannot_be_had(monkeypatch):
    with pytest.raises(UserError, match=r"no weights of this name; the nearest are .*in21k"):
        started(NAME[:-1])
    with pytest.raises(UserError, match="no weights of this name"):
        started("timm:")

    def refuse(*arguments, **options):
        raise LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(UserError) as caught:
        started(NAME)
    assert str(caught.value) == (
        f"encoder.checkpoint {NAME} cannot be downloaded (no network); fetch https://huggingface.co/"
        "timm/vit_tiny_patch16_224.augreg_in21k/resolve/main/model.safetensors on a machine with a "
        "network, and give the file's path instead"
    )
