"""What a run costs: counts against the flop counter on real tensors, and by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finetune.model import build_model
from sami.core.config import load_config
from sami.encoder import build_encoder
from sami.model import MaskedReconstruction, TokenLossConfig
from sami.pretrain import PretrainConfig
from sami.teacher import TeacherConfig, load_teacher
from tests.runs import ROOT
from tools.cost import BATCH, find_parts, main, resolve


def config(**changes):
    groups = {
        "data": {"image_size": 64, "shards": "x.tar"},
        "encoder": {"name": "custom", "width": 32, "depth": 2, "heads": 2},
        "teacher": {"name": "custom", "image_size": 128, "width": 32, "depth": 2},
        "decoder": {"width": 48, "depth": 3, "heads": 4},
        "mask": {"ratio": 0.75},
    }
    groups = {name: group | changes.get(name, {}) for name, group in groups.items()}
    told = {f"{name}.{key}": one for name, group in groups.items() for key, one in group.items()}
    words = [f"--{key}={'null' if value is None else value}" for key, value in told.items()]
    return load_config(PretrainConfig, [*words, "--teacher.checkpoint=random"])


def counted(call):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize(
    "decoder", [{}, {"memory": "visible"}, {"kind": "self"}, {"predict_fraction": 0.5}]
)
def test_the_counts_are_the_flop_counters(decoder):
    told = {
        part.name.split()[0]: part
        for part in find_parts("sami/pretrain.py", config(decoder=decoder))
    }
    wanted = config(decoder=decoder)
    encoder = build_encoder(wanted.encoder, 64)
    model = MaskedReconstruction(
        encoder,
        wanted.decoder,
        TokenLossConfig(),
        256,
        0.75,
    )
    order, images = torch.rand(BATCH, 16).argsort(1), torch.rand(BATCH, 3, 64, 64)
    masked = order[:, 4 : 4 + (6 if "predict_fraction" in decoder else 12)]
    forward = counted(lambda: model.predict(images, order[:, :4], masked))
    own = ("student", "decoder", "head")
    assert sum(2 * told[name].macs for name in own) == forward / BATCH
    assert all(told[name].macs > 0 for name in own)
    # Backward and forward together are what "3 passes" says, but for the pixels' own gradient.
    target = torch.rand(BATCH, 16, 256)
    whole = counted(lambda: model(images, order[:, :4], masked, target)["loss"].backward())
    assert whole / BATCH == pytest.approx(sum(6 * told[name].macs for name in own), rel=0.08)
    teacher = load_teacher(TeacherConfig("custom", "random", 128, width=32, depth=2))
    seen = counted(lambda: teacher(torch.rand(1, 3, 128, 128)))
    assert (2 * told["teacher"].macs, told["teacher"].passes) == (seen, 1)
    trained = sum(p.numel() for p in model.parameters())
    assert sum(told[name].parameters for name in own) == trained


@pytest.mark.slow
def test_by_hand():
    """A ViT-Ti that sees 49 of 196 patches, and SAM's ViT-H at 1024 px as published (2973 G)."""
    wide = {"encoder": {"name": "vit_ti", "width": None, "depth": None, "heads": None}}
    parts = find_parts(
        "sami/pretrain.py",
        config(
            **wide,
            data={"image_size": 224},
            teacher={"name": "sam_vit_h", "image_size": 1024, "width": None, "depth": None},
        ),
    )
    told = {part.name.split()[0]: part for part in parts}
    tokens, width = 50, 192
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    assert told["student"].macs == 49 * 768 * width + 12 * block
    assert told["head"].macs == 196 * 48 * 256
    # Published is 2973 G, with the tokens that fill the windows up: they cost 2 x 4 D^2 less here.
    assert told["teacher"].macs == pytest.approx(2973e9 - 28 * 804 * 4 * 1280**2, rel=0.005)
    assert told["teacher"].parameters == pytest.approx(637e6, rel=0.001)


@pytest.mark.slow
def test_what_it_prints(capsys):
    path = ROOT / "configs/pretrain/sami_ti_cached.yaml"
    words = [str(path), "--images", "1000000", "--card", "H100", "--share", "0.5"]
    assert main([*words, "--data.epoch_samples", "8192", "--train.epochs", "10"]) == 0
    said = capsys.readouterr().out
    assert "20 steps of 4096 images" in said
    # 8192 images x 2 x 2833.01e9 / (0.5 x 989e12) / 3600, once and not ten times
    told = " ".join(said.split())
    assert "sam_vit_h, 1024 px" in told and "0.0261" in said and "(once" in said
    assert max(map(len, said.splitlines())) <= 80
    # 24 x 32 cells of 256 bytes and 256 scales of 4: 197,632 bytes
    assert "32 x 32 int8       198 kB an image,      1.6 GB" in said
    assert main([str(ROOT / "configs/finetune/efficient_sam_s.yaml"), "--images", "1000"]) == 0
    assert "mask decoder, 64 prompts" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_distillation(capsys):
    """TinyViT-5M has 38.8 G multiply-adds at 1024 px by another count; and against real tensors."""
    config = str(ROOT / "configs/distill/decoupled_tiny_vit.yaml")
    assert main([config, "--images", "110000"]) == 0
    said = capsys.readouterr().out
    assert "110000 steps of 8 images" in said and "a feature cache" in said
    entry, told = resolve(Path(config), [])
    teacher, encoder = find_parts(entry, told)
    assert teacher.once and teacher.passes == 1 and encoder.passes == 3
    assert encoder.macs == pytest.approx(38.8e9, rel=0.01)
    words = ["--encoder.name=tiny_vit_test", "--data.image_size=128", "--teacher.name=custom"]
    words += ["--teacher.checkpoint=random", "--teacher.image_size=128", "--decoder.checkpoint="]
    passes = {"semi_coupled": 3, "fully_coupled": 4}
    for form, number in passes.items():
        entry, told = resolve(ROOT / f"configs/distill/{form}.yaml", words)
        teacher, encoder, decoder = find_parts(entry, told)
        assert not teacher.once and (encoder.passes, decoder.passes) == (3, number)
    groups = replace(told.encoder, checkpoint=None), replace(told.decoder, checkpoint=None)
    model = build_model(*groups, 128, "longest", False).eval()
    points, labels = torch.rand(1, 16, 2, 2), torch.ones(1, 16, 2)
    maps = model.image_encoder(torch.rand(1, 3, 128, 128))
    seen = counted(lambda: model.image_encoder(torch.rand(1, 3, 128, 128)))
    assert 2 * encoder.macs == seen
    seen = counted(lambda: model.predict_low_resolution(maps, points, labels))
    assert 2 * decoder.macs == pytest.approx(seen, rel=1e-3)
    assert main([str(ROOT / "configs/finetune/sam_decoder_ti.yaml"), "--images", "1000"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere.yaml"], "nowhere.yaml does not exist"),
        (["configs/pretrain/sami_ti.yaml", "--share", "2"], "--share 2.0 must be over 0"),
        (["configs/pretrain/sami_ti.yaml", "--mask.ratioo", "2"], "mask.ratioo"),
        (
            ["configs/sweeps/mask_ratio.yaml"],
            "is a sweep; name the configuration of one stage: configs/pretrain/sami_b_cached.yaml "
            "or configs/classify/sami_b.yaml",
        ),
        (["configs/accelerate/cpu.yaml"], "is the launcher's"),
        (["README.md"], "README.md is no YAML"),
    ],
)
def test_bad_words(in_process, words, says):
    code, said = in_process(main, [str(ROOT / words[0]), *words[1:]])
    assert code == 2 and says in said and said.count("\n") == 1


def test_classification(capsys):
    """A ViT-Ti over all 197 tokens, by hand; and its 1000 classes."""
    config = str(ROOT / "configs/classify/sami_ti.yaml")
    assert main([config, "--images", "1024", "--train.epochs", "10"]) == 0
    said = capsys.readouterr().out
    assert "10 steps of 1024 images" in said and "1000 classes" in said
    entry, told = resolve(Path(config), [])
    encoder, head = find_parts(entry, told)
    tokens, width = 197, 192
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    assert encoder.macs == 196 * 768 * width + 12 * block
    assert (head.macs, head.parameters) == (1000 * width, 1001 * width - width + 1000)
    assert encoder.parameters + head.parameters == pytest.approx(5.72e6, rel=1e-3)  # published
