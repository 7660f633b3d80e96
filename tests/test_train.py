"""Stage 2 as it is run: it learns, is killed and goes on, with one process and with two."""

import io
import re
import shutil
import tarfile

import pytest
import torch

from finetune.data import NO_PIXEL
from finetune.model import load_model
from finetune.train import main
from sami.core.scanning import IMAGE
from sami.encoder import load_encoder
from tests.runs import ROOT, every_parameter_was_updated, kill, numbers, run, start, summary
from tests.runs import command as stage1
from tests.test_data_stage2 import raw, specks
from tests.test_processes import launch, wait_for_step
from tests.test_toy_shards import draw


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    done = draw(tmp_path_factory.mktemp("scenes"), "--shards", "3", "--images", "22")
    assert done.returncode == 0, done.stderr
    return done.stdout.split(": ")[-1].strip()


def arguments(folder, shards, **more):
    options = {
        "run.dir": folder,
        "run.log_every": 1,
        "run.save_every": 3,
        "run.picture_every": 0,
        "data.shards": shards,
        "data.workers": 0,
        "data.image_size": 64,
        "data.masks_per_image": 4,
        "encoder.name": "custom",
        "encoder.width": 32,
        "encoder.patch_size": 8,
        "eval.samples": 3,
        "optim.warmup": 2,
        "train.steps": 8,
        "train.batch_size": 4,
        **more,
    }
    return [f"--{key}={value}" for key, value in options.items()]


def command(words):
    first, _, *rest = stage1(words)
    return [first, str(ROOT / "finetune/train.py"), *rest]


@pytest.fixture
def call(in_process):
    """Run the entry in this process; returns exit code and what stood on stderr."""
    return lambda words: in_process(main, words)


@pytest.mark.parametrize("kind", ["efficientsam", "sam"])
def test_run_folder(shards, tmp_path, call, kind):
    options = {"data.val_shards": shards, "data.allow_val_in_train": "true", "eval.every": 4}
    options |= {"run.picture_every": 8, "optim.ema": 0.5}
    options |= {"decoder.kind": kind, "prompt.corrections": 2, "decoder.width": 64}
    code, error = call(arguments(tmp_path, shards, **options))
    assert code == 0, error
    lines = numbers(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    names = {"loss", "lr", "iou", "loss_pixel", "loss_dice", "loss_iou", "grad_norm"}
    assert names <= lines[0].keys()
    assert {"val_miou_box", "val_miou_1_click", "val_miou_3_clicks"} <= lines[3].keys()
    told = summary(tmp_path)
    assert told["status"] == "finished" and told["evaluation"]["pictures"] == 3
    assert told["weights"] == "ema"
    told = (tmp_path / "log.txt").read_text()
    assert re.search(
        r"not trained, but kept as at the start: .*\d+ of the mask decoder \(\d+ tensors in all\)",
        told,
    )
    assert (tmp_path / "pictures" / "masks-0000008.png").exists()
    model = load_model(tmp_path)
    assert model.shape.image_size == 64 and not model.training
    assert model.shape.decoder == kind and model.shape.encoder.channels == 64


@pytest.mark.slow
def test_objects_without_a_pixel_of_loss_are_told(tmp_path, call):
    """In the summary, and once each, also where a run goes on."""
    seen, *unseen = specks(140, 200)  # a loss of 16 x 16
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for number in range(4):
            parts = raw([seen, *unseen[:2]], size=(140, 200)).parts
            for kind, data in (("png", parts[IMAGE]), ("json", parts["json"])):
                member = tarfile.TarInfo(f"p{number}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    options = {"encoder.patch_size": 16, "run.save_every": 2, "train.steps": 4}
    words = arguments(tmp_path / "run", tmp_path / "s.tar", **options)
    for _ in range(2):
        code, error = call(words)
        assert code == 0, error
        told = summary(tmp_path / "run")
        assert told["objects_left_out"] == {NO_PIXEL: 4 * 4 * 2} and not told["bad_samples"]
        assert sorted(told["left_out_of"][NO_PIXEL]) == [f"s/p{n}" for n in range(4)]
        shutil.rmtree(tmp_path / "run/checkpoints/step-4")


def test_masks_larger_than_the_decoders(shards, tmp_path, call):
    options = {"loss.size": 64, "loss.iou": "l1", "loss.iou_masks": "chosen", "train.steps": 2}
    options |= {"loss.single_mask": "true", "prompt.corrections": 1, "data.resize": "longest"}
    code, error = call(arguments(tmp_path, shards, **options))
    assert code == 0, error
    assert load_model(tmp_path).shape.single_mask
    assert "not trained" not in (tmp_path / "log.txt").read_text()


def test_killed_and_stopped_it_goes_on_bit_for_bit(shards, tmp_path):
    """With correction clicks, dropout and prefetching workers."""
    options = {"prompt.corrections": 1, "decoder.dropout": 0.1, "data.workers": 1}
    options |= {"train.steps": 14, "data.hflip": "true"}
    whole = run(command(arguments(tmp_path / "whole", shards, **options)))
    assert whole.returncode == 0, whole.stderr
    words = command(arguments(tmp_path / "cut", shards, **options))
    for step in (4, 8):
        process = start(words)
        wait_for_step(tmp_path / "cut", step, process)
        kill(process)
    assert run(words).returncode == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    files = [tmp_path / name / "model.safetensors" for name in ("cut", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_compiled_it_goes_on_too(shards, tmp_path, call, eager_compile):
    """Weights and moving average keep their names, in checkpoints and in the exported file."""
    options = {"train.compile": "true", "optim.ema": 0.9, "train.steps": 4}
    assert call(arguments(tmp_path / "run", shards, **options))[0] == 0
    whole = numbers(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    (tmp_path / "run" / "summary.json").unlink()
    assert call(arguments(tmp_path / "run", shards, **options))[0] == 0
    assert numbers(tmp_path / "run") == whole and len(eager_compile) == 2
    plain = options | {"train.compile": "false"}
    assert call(arguments(tmp_path / "plain", shards, **plain))[0] == 0
    for ours, other in zip(whole, numbers(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(other["loss"], rel=1e-4)
    states = [load_model(tmp_path / name).state_dict() for name in ("run", "plain")]
    assert states[0].keys() == states[1].keys()


def test_accumulation_gives_the_losses_of_one_large_batch(shards, tmp_path, call):
    for name, micro in (("one", 4), ("four", 1)):
        words = arguments(tmp_path / name, shards, **{"train.micro_batch_size": micro})
        assert call(words)[0] == 0
    one, four = (numbers(tmp_path / name) for name in ("one", "four"))
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_the_encoder_of_stage_one(shards, tmp_path, call):
    options = {"run.dir": tmp_path / "sami", "data.shards": shards, "data.image_size": 64}
    options |= {"data.workers": 0, "encoder.name": "custom", "encoder.width": 32}
    options |= {"encoder.patch_size": 8, "target.kind": "pixels", "teacher.name": "none"}
    options |= {"decoder.width": 32, "decoder.depth": 1, "decoder.heads": 2}
    options |= {"train.steps": 2, "train.batch_size": 4, "run.picture_every": 0}
    done = run(stage1([f"--{key}={value}" for key, value in options.items()]))
    assert done.returncode == 0, done.stderr
    more = {"encoder.checkpoint": tmp_path / "sami", "decoder.freeze": "encoder"}
    code, error = call(arguments(tmp_path / "run", shards, **more, **{"train.steps": 1}))
    assert code == 0, error
    encoder, model = load_encoder(tmp_path / "sami"), load_model(tmp_path / "run")
    assert torch.equal(
        model.image_encoder.blocks[0].attn.qkv.weight, encoder.blocks[0].attn.qkv.weight
    )
    # Gone, they are not missed: the checkpoint tells the grid of positions.
    (tmp_path / "sami").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "summary.json").unlink()
    code, error = call(arguments(tmp_path / "run", shards, **more, **{"train.steps": 1}))
    assert code == 0, error
    start = summary(tmp_path / "run")["started_from"]["encoder.checkpoint"]
    assert start["path"] == str(tmp_path / "sami") and len(start["sha256"]) == 64
    (tmp_path / "elsewhere").rename(tmp_path / "sami")
    code, error = call(arguments(tmp_path / "b", shards, **more, **{"encoder.width": 64}))
    assert code == 2 and "does not fit the configuration" in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"prompt.boxes": 2}, "prompt.boxes 2.0 must be within 0..1"),
        ({"prompt.clicks": 7}, "prompt.clicks 7 must be within 1..6"),
        ({"prompt.corrections": 6}, "prompt.corrections 6 must be under 6"),
        ({"decoder.kind": "sam", "decoder.dropout": 0.1}, "mask decoder has no dropout"),
        ({"decoder.width": 100}, "decoder.width 100 must be a positive multiple of 16"),
        ({"loss.size": 0}, "loss.size 0 must be positive"),
        ({"data.masks_per_image": 0}, "data.masks_per_image 0"),
        ({"data.image_size": 60}, "not divisible by encoder.patch_size 8"),
        ({"encoder.checkpoint": "nowhere"}, "nowhere"),
        ({"decoder.checkpoint": "nowhere.pth"}, "nowhere.pth"),
        ({"loss.mask": "dice"}, "loss.mask must be one of focal, bce"),
        ({"data.max_area": 0.00001}, "samples in a row are unusable"),
    ],
)
def test_bad_input(words, says, shards, tmp_path, call):
    code, error = call(arguments(tmp_path, shards, **words))
    assert code == 2 and says in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "config", sorted((ROOT / "configs/finetune").glob("*.yaml")), ids=lambda p: p.stem
)
def test_each_config_trains_all_that_it_has(shards, tmp_path, call, config):
    code, error = call(["--config", str(config), *small(tmp_path, shards)])
    assert code == 0, error
    every_parameter_was_updated(tmp_path, 3)


def small(folder, shards):
    """Options of a short run of a shipped configuration."""
    options = {"run.dir": folder, "run.picture_every": 0, "data.shards": shards}
    options |= {"data.val_shards": shards, "data.workers": 0, "data.image_size": 64}
    options |= {"data.allow_val_in_train": "true"}
    options |= {"encoder.checkpoint": "null", "train.steps": 3, "train.batch_size": 4}
    options |= {"decoder.checkpoint": "null"}
    options |= {"eval.samples": 3, "optim.warmup": 1}
    return [f"--{key}={value}" for key, value in options.items()]


def test_a_shipped_config_with_two_processes(shards, tmp_path):
    words = ["--config", "configs/finetune/efficient_sam_ti.yaml", *small(tmp_path, shards)]
    done = run(launch("cpu_2.yaml", "finetune/train.py", *words))
    assert done.returncode == 0, done.stderr
    told = summary(tmp_path)
    assert told["steps"] == 3 and told["evaluation"]["pictures"] == 3


def test_it_learns(shards, tmp_path, call):
    """The mask loss of a few scenes falls."""
    options = {"train.steps": 40, "loss.mask": "bce", "optim.lr": 2e-3, "optim.base_batch": 4}
    options |= {"optim.clip": 1, "run.save_every": 100}
    code, error = call(arguments(tmp_path, shards, **options))
    assert code == 0, error
    losses = [line["loss"] for line in numbers(tmp_path)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_shorter_of_steps_and_epochs_is_said(shards, tmp_path, call):
    code, error = call(arguments(tmp_path, shards, **{"train.epochs": 1, "train.steps": 500}))
    assert code == 0, error
    steps = len(numbers(tmp_path))
    assert 0 < steps < 500
    told = (tmp_path / "log.txt").read_text()
    assert "train.epochs 1 end it before train.steps 500" in told
