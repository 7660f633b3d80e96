"""finetune/classify.py: learns what is easy, resumes exactly, and is timm's where timm has it."""

import shutil

import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp
from timm.scheduler import CosineLRScheduler

from finetune.classification import (
    AugmentConfig,
    Classification,
    LabelDataConfig,
    LabelTransform,
    build_classifier,
    build_groups,
)
from finetune.classify import ClassifyConfig, main
from sami.core.checkpoint import write_weights
from sami.core.config import load_config
from sami.core.optim import OptimConfig
from sami.core.reading import read_range
from sami.encoder import EncoderConfig, build_encoder, export_header
from tests.runs import ROOT, numbers, opened, summary
from tests.test_probe import labelled


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    labelled(folder / "train.tar", per_class=16)
    labelled(folder / "val.tar", per_class=8, seed=1)
    return folder


def words(folder, shards, **more):
    options = {
        "run.dir": folder,
        "run.log_every": 2,
        "run.save_every": 4,
        "data.shards": shards / "train.tar",
        "data.val_shards": shards / "val.tar",
        "data.classes": 3,
        "data.workers": 0,
        "data.image_size": 32,
        "data.max_bad_fraction": 0.5,
        "encoder.name": "custom",
        "encoder.width": 32,
        "encoder.patch_size": 8,
        "augment.drop_path": 0.0,
        "optim.base_batch": 16,
        "optim.layer_decay": 1.0,
        "train.epochs": "null",
        "train.steps": 12,
        "train.batch_size": 16,
        **more,
    }
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.mark.slow
def test_colours_are_learnt_and_the_file_is_timms(shards, tmp_path, in_process):
    more = {"augment.auto": "", "augment.erase": 0, "optim.lr": 3e-3, "train.steps": 60}
    code, said = in_process(main, words(tmp_path / "run", shards, **more))
    assert code == 0, said
    told = summary(tmp_path / "run")
    assert told["evaluation"]["top1"] == 100 and told["evaluation"]["pictures"] == 24
    assert told["bad_samples"] == {
        "no cls member": told["bad_samples"]["no cls member"],
        "not an image": told["bad_samples"]["not an image"],
    }
    assert (tmp_path / "run" / "classifier.safetensors").exists()


@pytest.mark.slow
def test_any_even_cut_mixes_the_same_pairs(shards, tmp_path, in_process):
    """With mixup and cutmix; what torch draws for a whole micro-batch, drop path, is off."""
    lines = []
    for micro in (16, 4, 2):
        more = {"train.micro_batch_size": micro, "optim.lr": 3e-3, "augment.auto": ""}
        code, said = in_process(main, words(tmp_path / str(micro), shards, **more))
        assert code == 0, said
        lines.append(numbers(tmp_path / str(micro)))
    losses = [[line["loss"] for line in part] for part in lines]
    assert len(losses[0]) == 6 and abs(losses[0][-1] - losses[0][0]) > 1e-3
    for part in losses[1:]:
        assert part == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_stopped_it_goes_on_exactly(shards, tmp_path, in_process):
    assert in_process(main, words(tmp_path / "whole", shards))[0] == 0
    (tmp_path / "parts").mkdir()
    steps = {"run.save_every": 5}
    assert in_process(main, words(tmp_path / "parts", shards, **steps))[0] == 0
    last = tmp_path / "parts" / "checkpoints" / "step-12"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    (tmp_path / "parts" / "summary.json").unlink()
    assert in_process(main, words(tmp_path / "parts", shards, **steps))[0] == 0
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "parts")
    again = tmp_path / "again"
    assert in_process(main, words(again, shards, **{"run.seed": 1}))[0] == 0
    assert numbers(again) != numbers(tmp_path / "whole")


@pytest.mark.slow
def test_compiled_it_goes_on_too(shards, tmp_path, in_process, eager_compile):
    """Weights and moving average keep their names."""
    options = {"train.compile": "true", "optim.ema": 0.9, "run.save_every": 5}
    assert in_process(main, words(tmp_path / "run", shards, **options))[0] == 0
    whole = numbers(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "step-12"
    shutil.rmtree(last)
    (tmp_path / "run" / "summary.json").unlink()
    assert in_process(main, words(tmp_path / "run", shards, **options))[0] == 0
    assert numbers(tmp_path / "run") == whole and len(eager_compile) == 2
    assert in_process(main, words(tmp_path / "plain", shards, **{"optim.ema": 0.9}))[0] == 0
    for ours, plain in zip(whole, numbers(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_a_sample_is_a_function_of_seed_epoch_and_key(shards, tmp_path):
    samples = LabelTransform(LabelDataConfig(classes=3, image_size=32), AugmentConfig(), 0)
    (source,) = opened(str(shards / "train.tar"), tmp_path)
    (sample,) = read_range(source.shards, range(1), samples.fields)
    before = torch.get_rng_state()
    key, first, label = samples.decode(sample, 3, False)
    assert torch.equal(torch.get_rng_state(), before) and (key, label) == ("train/0000", 0)
    torch.manual_seed(5)
    assert torch.equal(samples.decode(sample, 3, False)[1], first)
    assert not torch.equal(samples.decode(sample, 4, False)[1], first)


def test_it_starts_from_the_pretrained_encoder(tmp_path):
    encoder = build_encoder(EncoderConfig("custom", width=32, patch_size=8), 32)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    header = export_header(encoder, weights="last", training={})
    write_weights(tmp_path / "encoder.safetensors", encoder.state_dict(), header)
    config = EncoderConfig("custom", width=32, patch_size=8, checkpoint=str(tmp_path))
    model = build_classifier(
        config, LabelDataConfig(classes=5, image_size=32), AugmentConfig()
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    patches = encoder.blocks(model.norm_pre(model._pos_embed(model.patch_embed(images))))
    expected = patches[:, 1:].mean(1)
    assert torch.allclose(model.forward_features(images)[:, 1:].mean(1), expected, atol=1e-5)


def test_the_first_update_counts_and_the_rate_is_timms(shards, tmp_path, in_process):
    """After the warm-up; in it ours is one update ahead, so that the first one has a rate."""
    options = {"train.steps": 12, "run.log_every": 1, "optim.warmup": 4, "run.save_every": 50}
    assert in_process(main, words(tmp_path / "run", shards, **options))[0] == 0
    told = [line["lr"] for line in numbers(tmp_path / "run")]
    config = load_config(ClassifyConfig, words(tmp_path / "run", shards, **options))
    peak = config.optim.lr * config.train.batch_size / config.optim.base_batch
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    timms = CosineLRScheduler(sgd, t_initial=8, warmup_t=4, warmup_prefix=True, t_in_epochs=False)
    expected = []
    for step in range(12):
        timms.step_update(step)
        expected.append(sgd.param_groups[0]["lr"])
    assert told[4:] == pytest.approx(expected[4:], rel=1e-9)
    assert told[:4] == pytest.approx([peak * part / 4 for part in (1, 2, 3, 4)])


@pytest.mark.parametrize("auto", ["rand-m10-inc1", "rand-m10", "original", "v0", "augmix-m10"])
def test_a_image_without_bits_is_black(auto):
    """timm asks Pillow for 0 bits; releases before 13 gave black, 13 raises."""
    found = []

    def look(transform):
        if isinstance(transform, AugmentOp) and transform.name.startswith("Posterize"):
            transform.prob = 1.0
            found.append(transform)
        parts = [
            getattr(transform, n) for n in ("transforms", "ops", "policy") if hasattr(transform, n)
        ]
        for part in transform if isinstance(transform, (list, tuple)) else parts:
            look(part)

    look(LabelTransform(LabelDataConfig(image_size=32), AugmentConfig(auto=auto), 0).augmented)
    assert found
    white = Image.new("RGB", (4, 4), "white")
    for operation in found:
        operation.level_fn = lambda magnitude, hparams: (0,)
        assert operation(white).getextrema() == ((0, 0),) * 3
        operation.level_fn = lambda magnitude, hparams: (2,)
        assert operation(white).getextrema() == ((192, 192),) * 3


def test_groups():
    optim = OptimConfig(lr=1e-3, base_batch=16, warmup=0.1, layer_decay=0.5)
    model = build_classifier(
        EncoderConfig("custom", width=32, depth=3), LabelDataConfig(classes=4), AugmentConfig()
    )
    assert build_groups(model, optim).param_groups[0]["lr_scale"] == 1.0
    scales = {
        name: group["lr_scale"]
        for group in build_groups(model, optim).param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is one for one in group["params"])
    }
    assert (
        scales["head.weight"] == 1.0
        and scales["blocks.0.attn.qkv.weight"] < scales["blocks.2.attn.qkv.weight"]
    )
    assert set(scales) == {name for name, _ in model.named_parameters()}


def test_without_mixup_the_loss_is_smoothed_cross_entropy():
    model = build_classifier(
        EncoderConfig("custom", width=32, patch_size=8),
        LabelDataConfig(classes=4, image_size=32),
        AugmentConfig(drop_path=0.0),
    ).eval()
    plain = Classification(model, AugmentConfig(mixup=0, cutmix=0), 4)
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0, 1])
    logs = model(images).log_softmax(1)
    wanted = -(0.9 * logs[torch.arange(6), labels] + 0.1 * logs.mean(1)).mean()
    assert plain(images, labels)["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("size", ["ti", "s", "b"])
def test_shipped_configs_are_the_papers(size):
    config = load_config(
        ClassifyConfig, ["--config", str(ROOT / f"configs/classify/sami_{size}.yaml")]
    )
    assert (config.optim.lr, config.optim.base_batch, config.train.batch_size) == (1e-3, 1024, 1024)
    assert (config.train.epochs, config.optim.warmup, config.optim.weight_decay) == (
        100,
        0.05,
        0.05,
    )
    assert config.optim.layer_decay == (1.0 if size == "ti" else 0.75)
    assert (config.augment.mixup, config.augment.smoothing) == (0.8, 0.1)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"data.classes": 1},
            "data.shards: train/0001 is of class 1, and data.classes 1 has 0 to 0",
        ),
        ({"augment.drop_path": 1}, "augment.drop_path 1.0 must be at least 0 and under 1"),
        ({"train.micro_batch_size": 1}, "augment.mixup needs an even micro-batch"),
        (
            {"encoder.name": "sam_vit_b", "encoder.width": "null"},
            "encoder.name sam_vit_b is no classifier",
        ),
        ({"encoder.checkpoint": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input(shards, tmp_path, in_process, more, says):
    code, said = in_process(main, words(tmp_path / "run", shards, **more))
    assert code == 2 and says in said and said.count("\n") == 1
