"""Runs of distillation: they learn, go on bit for bit, leave a model, and refuse bad input."""

import shutil

import pytest
import torch
from torch.nn import functional as F

from finetune.distill import main
from finetune.model import load_model
from finetune.train import main as finetune
from tests.distilling import (
    CHANNELS,
    FORMS,
    SIZE,
    WIDTH,
    write_sam,
    write_scenes,
)
from tests.runs import (
    ROOT,
    every_parameter_was_updated,
    kill,
    numbers,
    run,
    start,
    summary,
    write_cache,
)
from tests.runs import command as stage1
from tests.test_processes import launch, wait_for_step


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    return write_sam(tmp_path_factory.mktemp("sam"))


def arguments(folder, shards, sam, **more):
    options = {
        "run.dir": folder,
        "run.log_every": 1,
        "run.save_every": 3,
        "run.picture_every": 0,
        "data.shards": shards,
        "data.workers": 0,
        "data.image_size": SIZE,
        "data.masks_per_image": 2,
        "encoder.name": "tiny_vit_test",
        "teacher.name": "custom",
        "teacher.checkpoint": sam,
        "teacher.image_size": SIZE,
        "decoder.width": CHANNELS,
        "eval.samples": 3,
        "eval.prompts": 2,
        "optim.warmup": 1,
        "train.steps": 5,
        "train.batch_size": 4,
        **more,
    }
    return [f"--{key}={value}" for key, value in options.items()]


def command(words):
    first, _, *rest = stage1(words)
    return [first, str(ROOT / "finetune/distill.py"), *rest]


@pytest.fixture
def call(in_process):
    """Run the entry in this process; returns exit code and what stood on stderr."""
    return lambda words: in_process(main, words)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_run_goes_on_bit_for_bit_and_exports_a_model(shards, sam, tmp_path, call, form):
    options = {"distill.form": form, "data.val_shards": shards, "eval.every": 3}
    options |= {"data.allow_val_in_train": "true", "run.picture_every": 5, "optim.ema": 0.5}
    words = arguments(tmp_path / "run", shards, sam, **options)
    code, error = call(words)
    assert code == 0, error
    lines, told = numbers(tmp_path / "run"), summary(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert {"val_mse", "val_cosine", "val_r2", "val_miou_teacher_1_click"} <= lines[2].keys()
    assert told["status"] == "finished" and told["evaluation"]["pictures"] == 3
    assert told["teacher"]["name"] == "custom" and not told["teacher"]["random"]
    assert (tmp_path / "run/pictures/distillation-0000005.png").exists()
    file = tmp_path / "run/model.safetensors"
    whole = file.read_bytes()
    every_parameter_was_updated(tmp_path / "run", 5)

    # From the checkpoint in the middle on, without the decoder's file but for the teacher's.
    shutil.rmtree(tmp_path / "run/checkpoints/step-5")
    (tmp_path / "run/summary.json").unlink()
    assert call(words)[0] == 0
    assert numbers(tmp_path / "run") == lines and file.read_bytes() == whole

    # What is exported is the student under SAM's decoder.
    model, theirs = load_model(tmp_path / "run"), load_model(sam)
    assert model.shape.encoder.kind == "tiny_vit" and model.shape.single_mask
    for name in ("prompt_encoder", "mask_decoder"):
        ours, sams = (getattr(one, name).state_dict() for one in (model, theirs))
        equal = all(torch.equal(ours[key], sams[key]) for key in sams)
        assert equal == (form != "fully_coupled")
    if form != "fully_coupled":
        image = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)
        points, labels = torch.tensor([[[[30.0, 40.0]]]]), torch.tensor([[[1]]])
        found = model.predict_masks(
            model.get_image_embeddings(image), points, labels, True, 96, 128
        )
        embedding = model.image_encoder(F.pad(model.image_encoder.normalise(image), (0, 0, 0, 32)))
        expected = theirs.mask_decoder.predict(theirs.prompt_encoder, embedding, points, labels)
        torch.testing.assert_close(found[0], expected[0][:, :, 1:])


@pytest.mark.slow
def test_the_decoder_is_finetuned_afterwards(shards, sam, tmp_path, in_process):
    """Stage 2 with a frozen encoder, whose batch statistics stay too (docs/distill.md)."""
    assert in_process(main, arguments(tmp_path / "student", shards, sam))[0] == 0
    student = str(tmp_path / "student")
    options = {"run.dir": tmp_path / "run", "run.picture_every": 0, "data.shards": shards}
    options |= {"data.workers": 0, "data.image_size": SIZE, "data.resize": "longest"}
    options |= {"data.masks_per_image": 2, "train.steps": 2, "train.batch_size": 4}
    options |= {"encoder.name": "tiny_vit_test", "encoder.checkpoint": student}
    options |= {"decoder.kind": "sam", "decoder.checkpoint": student, "decoder.freeze": "encoder"}
    options |= {"decoder.width": CHANNELS, "loss.single_mask": "true", "optim.warmup": 1}
    code, error = in_process(finetune, [f"--{key}={value}" for key, value in options.items()])
    assert code == 0, error
    before, after = load_model(student).state_dict(), load_model(tmp_path / "run").state_dict()
    for name, tensor in before.items():
        if name.startswith("image_encoder."):
            assert torch.equal(after[name], tensor), name
    assert not torch.equal(
        before["mask_decoder.mask_tokens.weight"], after["mask_decoder.mask_tokens.weight"]
    )


@pytest.mark.slow
def test_it_goes_on_where_the_decoders_file_is_gone(shards, sam, tmp_path, call):
    """The run's own checkpoint has it; the teacher's has to be there."""
    shutil.copy(sam, tmp_path / "decoder.safetensors")
    options = {"decoder.checkpoint": tmp_path / "decoder.safetensors"}
    options |= {"distill.form": "fully_coupled", "train.steps": 4}
    words = arguments(tmp_path / "run", shards, sam, **options)
    assert call(words)[0] == 0
    lines = numbers(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-4")
    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "decoder.safetensors").unlink()
    code, error = call(words)
    assert code == 0, error
    assert numbers(tmp_path / "run") == lines


@pytest.mark.slow
def test_it_learns(shards, sam, tmp_path, call):
    options = {"train.steps": 40, "optim.lr": 2e-3, "optim.base_batch": 4}
    code, error = call(arguments(tmp_path, shards, sam, **options, **{"run.save_every": 100}))
    assert code == 0, error
    losses = [line["loss"] for line in numbers(tmp_path)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"distill.form": "coupled"}, "distill.form must be one of decoupled, semi_coupled"),
        ({"teacher.name": "none"}, "teacher.name none teaches nothing"),
        ({"teacher.checkpoint": ""}, "decoder.checkpoint is empty, and so is teacher.checkpoint"),
        ({"teacher.checkpoint": "nowhere.pth"}, "nowhere.pth does not exist"),
        ({"teacher.image_size": 64}, "teacher.image_size 64 differs from data.image_size 128"),
        ({"teacher.layer": "trunk"}, "teacher.layer trunk: SAM's decoder takes"),
        ({"teacher.cached": "true", "distill.form": "semi_coupled"}, "needs the teacher's masks"),
        ({"teacher.cached": "true", "data.hflip": "true"}, "data.hflip true: cached features"),
        ({"teacher.cached": "true"}, "manifest.json"),
        ({"decoder.kind": "efficientsam"}, "decoder.kind efficientsam: the student works under"),
        ({"decoder.freeze": "encoder"}, "distill.form says what is trained"),
        ({"decoder.width": 64}, "does not fit the configuration"),
        ({"data.resize": "square"}, "the teacher was made for data.resize longest"),
        ({"encoder.name": "custom", "encoder.patch_size": 8}, "8 x 8 cells and the student's 16"),
        ({"prompt.corrections": 1}, "prompt.corrections 1: student and teacher"),
        ({"eval.prompts": 0}, "eval.prompts 0 must be positive"),
        ({"loss.mask": "bce"}, "loss.mask is not a known option"),
    ],
)
def test_bad_input(words, says, shards, sam, tmp_path, call):
    code, error = call(arguments(tmp_path, shards, sam, **words))
    assert code == 2 and says in error and error.count("\n") == 1, error


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", sorted((ROOT / "configs/distill").glob("*.yaml")), ids=lambda p: p.stem
)
def test_each_config_trains_all_that_it_has(shards, tmp_path, call, config):
    code, error = call(["--config", str(config), *small(tmp_path, shards)])
    assert code == 0, error
    every_parameter_was_updated(tmp_path, 3)


def small(folder, shards):
    """Options of a short run of a shipped configuration."""
    options = {"run.dir": folder, "run.picture_every": 0, "data.shards": shards}
    options |= {"data.val_shards": shards, "data.allow_val_in_train": "true"}
    options |= {"data.workers": 0, "data.image_size": 64, "eval.samples": 1, "eval.prompts": 1}
    options |= {"data.masks_per_image": 2, "encoder.checkpoint": "null", "encoder.patch_size": 16}
    options |= {"teacher.name": "custom", "teacher.checkpoint": "random", "teacher.cached": "false"}
    options |= {"teacher.image_size": 64, "decoder.width": 256, "decoder.checkpoint": "null"}
    options |= {"train.steps": 3, "train.batch_size": 4, "optim.warmup": 1}
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.mark.slow
def test_cached_features_in_a_run(shards, tmp_path, call):
    """The losses of the live teacher, and its masks where it is there; else embeddings alone."""
    cached = write_cache(shards, tmp_path / "cache")
    options = {"data.image_size": 64, "teacher.image_size": 64, "decoder.width": 256}
    options |= {"train.steps": 4, "data.val_shards": shards, "data.allow_val_in_train": "true"}
    for name, more in {
        "live": {},
        "cached": {"data.shards": cached, "teacher.cached": "true"},
    }.items():
        words = arguments(tmp_path / name, shards, "random", **options, **more)
        code, error = call(words)
        assert code == 0, error
    live, other = (numbers(tmp_path / name) for name in ("live", "cached"))
    for one, two in zip(live, other, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-2)
    told = summary(tmp_path / "cached")
    assert told["teacher"]["cached"] and "miou_teacher_1_click" in told["evaluation"]
    shutil.copytree(tmp_path / "cache", tmp_path / "val")
    words = arguments(tmp_path / "run", cached, "", **options | {"teacher.cached": "true"})
    saved = str(tmp_path / "live")  # a model whose decoder is of the right width
    words += [f"--data.val_shards={tmp_path}/val/*.tar", f"--decoder.checkpoint={saved}"]
    words += ["--run.picture_every=4"]
    code, error = call(words)
    assert code == 0, error
    told = summary(tmp_path / "run")["evaluation"]
    assert told["mse"] is not None and "miou_teacher_1_click" not in told
    assert "masks will not be compared" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.slow
def test_killed_it_goes_on_bit_for_bit(shards, sam, tmp_path):
    options = {"distill.form": "fully_coupled", "data.workers": 1, "data.hflip": "true"}
    options |= {"train.steps": 9}
    whole = run(command(arguments(tmp_path / "whole", shards, sam, **options)))
    assert whole.returncode == 0, whole.stderr
    words = command(arguments(tmp_path / "cut", shards, sam, **options))
    process = start(words)
    wait_for_step(tmp_path / "cut", 4, process)
    kill(process)
    assert run(words).returncode == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    files = [tmp_path / name / "model.safetensors" for name in ("cut", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(shards, sam, tmp_path, call):
    options = {"distill.form": "fully_coupled", "encoder.name": "custom"}  # no batch statistics
    options |= {f"encoder.{name}": value for name, value in WIDTH.items()}
    done = run(
        launch(
            "cpu_2.yaml", "finetune/distill.py", *arguments(tmp_path / "2", shards, sam, **options)
        )
    )
    assert done.returncode == 0, done.stderr
    assert call(arguments(tmp_path / "1", shards, sam, **options))[0] == 0
    for one, two in zip(numbers(tmp_path / "1"), numbers(tmp_path / "2"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
