"""Distillation as MobileSAM has it: losses, what is trained, what is measured, and whole runs."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from finetune.agreement import (
    AgreementConfig,
    MapSums,
    draw_clicks,
    masks_of_both,
    measure,
    run_ends,
)
from finetune.data import MaskDataConfig, PromptTransform, cells_inside
from finetune.distill import main
from finetune.distillation import (
    Distillation,
    DistillationConfig,
    embedding_error,
    mask_losses,
    teacher_maps,
)
from finetune.evaluation import paint
from finetune.image_data import ImageTransform
from finetune.losses import MaskLossConfig
from finetune.model import MaskDecoderConfig, build_model, load_model, model_header
from finetune.objective import Objective
from finetune.prompting import PromptConfig
from finetune.train import main as finetune
from sami.core.checkpoint import write_weights
from sami.core.processes import exact
from sami.core.run import Run, RunConfig
from sami.core.scanning import TEACHER
from sami.encoder import EncoderConfig
from sami.features import Cache, pack, quantise, to_bytes
from sami.targets import CachedTeacher, LiveTeacher
from sami.teacher import TeacherConfig, load_teacher
from tests.runs import (
    ROOT,
    every_parameter_was_updated,
    kill,
    numbers,
    opened,
    run,
    start,
    summary,
    write_cache,
)
from tests.runs import command as stage1
from tests.test_data_stage2 import raw
from tests.test_processes import launch, wait_for_step
from tools.make_toy_shards import write_shard

FORMS = ("decoupled", "semi_coupled", "fully_coupled")
SIZE, GRID, CHANNELS = 128, 8, 32
DATA = MaskDataConfig(image_size=SIZE, resize="longest", masks_per_image=3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """22 drawn scenes in two shards, with padding on the right."""
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(2):
        write_shard(folder, 0, 96, 72, number, range(11 * number, 11 * number + 11))
    return f"{folder}/*.tar"


def small_model(name="custom", checkpoint=None, decoder=None, freeze="none"):
    encoder = EncoderConfig(name, checkpoint=checkpoint, **({} if name != "custom" else WIDTH))
    head = MaskDecoderConfig("sam", decoder, freeze, width=CHANNELS)
    return build_model(encoder, head, SIZE, "longest", False, single_mask=True)


WIDTH = {"width": 32, "depth": 2, "heads": 2}


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """A small SAM whose masks depend on image and prompt; its file is teacher and decoder."""
    torch.manual_seed(1)
    model = small_model()
    for name, parameter in model.named_parameters():
        if "pos_embed" in name or parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("sam") / "model.safetensors"
    write_weights(path, model.state_dict(), model_header(model))
    return str(path)


def teacher_of(sam):
    teacher = load_teacher(TeacherConfig("custom", sam, SIZE))
    return LiveTeacher(teacher, GRID, "area", lambda: torch.autocast("cpu", enabled=False))


def student_of(sam, form="decoupled", name="tiny_vit_test", **more):
    torch.manual_seed(0)
    config = DistillationConfig(form, **more)
    return Distillation(small_model(name, decoder=sam, freeze=config.freeze), config)


def samples(count=2):
    found = []
    for number in range(count):
        size = height, width = 90 + 30 * number, 120
        y, x = np.mgrid[:height, :width]
        masks = [(x - 30 * i) ** 2 + (y - 25 * i) ** 2 < 20**2 for i in (1, 2, 3)]
        found.append(raw(masks, f"k{number}", size=size))
    return found


def batch_of(form="decoupled", count=2):
    if form == "decoupled":
        views = ImageTransform(DATA, 0)
    else:
        views = PromptTransform(DATA, PromptConfig(), 4 * GRID, 0)
    return views.collate([views.decode(sample, 0, False) for sample in samples(count)])


# ---- Losses


def test_the_embedding_error_is_the_formula():
    """Against loops; and what stands in the padding changes nothing."""
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    frames = torch.tensor([[64, 40], [17, 64]])
    cells = cells_inside(frames, 4, 64, whole=False)
    assert cells.sum((1, 2)).tolist() == [4 * 3, 2 * 4]
    expected = []
    for number, (height, width) in enumerate(frames.tolist()):
        total = count = 0
        for y in range(4):
            for x in range(4):
                if 16 * y < height and 16 * x < width:
                    for channel in range(5):
                        where = (number, channel, y, x)
                        total += float(prediction[where] - target[where]) ** 2
                        count += 1
        expected.append(total / count)
    found = embedding_error(prediction, target, cells)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    other = torch.where(cells.unsqueeze(1), target, torch.inf)
    assert torch.equal(embedding_error(prediction, other, cells), found)
    assert not torch.equal(embedding_error(prediction, target + cells.unsqueeze(1), cells), found)


def test_the_mask_losses_are_the_formula():
    torch.manual_seed(0)
    logits, taught = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 3, 4, 8, 8)
    iou, taught_iou = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    wanted = torch.rand(2, 3, 4) > 0.4
    pixels = cells_inside(torch.tensor([[8, 5], [4, 8]]), 8, 8, whole=True)
    found = mask_losses(logits, iou, taught, taught_iou, wanted, pixels, "bce")
    images = []
    for b in range(2):
        losses = []
        seen = pixels[b].numpy()
        for k, m in zip(*np.nonzero(wanted[b].numpy()), strict=True):
            p = 1 / (1 + np.exp(-logits[b, k, m].double().numpy()[seen]))
            t = taught[b, k, m].numpy()[seen] > 0
            pixel = -np.mean(np.where(t, np.log(p), np.log(1 - p)))
            dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
            losses.append(pixel + dice + float(iou[b, k, m] - taught_iou[b, k, m]) ** 2)
        images.append(np.mean(losses))
    assert found["loss"].item() == pytest.approx(np.mean(images), rel=1e-5)
    other = torch.where(pixels[:, None, None], taught, -taught)
    again = mask_losses(logits, iou, other, taught_iou, wanted, pixels, "bce")
    assert torch.equal(again["loss"], found["loss"])
    same = mask_losses(100 * taught, taught_iou, taught, taught_iou, wanted, pixels, "focal")
    assert same["iou"] == 1 and same["loss"] < 0.02


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_what_is_trained_and_nothing_else(sam, form):
    student, batch = student_of(sam, form), batch_of(form)
    student(batch, teacher_maps(teacher_of(sam), batch))["loss"].backward()
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    parts = {name.split(".")[1] for name in trained}
    both = {"image_encoder", "prompt_encoder", "mask_decoder"}
    assert parts == (both if form == "fully_coupled" else {"image_encoder"})
    assert not any("mask_downscaling" in name or "teachers" in name for name in trained)
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
    reached = [p.grad.abs().max() > 0 for _, p in student.model.image_encoder.named_parameters()]
    assert sum(reached) > 0.9 * len(reached)


def test_the_padding_of_images_is_not_seen(sam):
    """Neither by the loss nor by the encoders: SAM has zeros there after the normalisation."""
    target, batch = teacher_of(sam), batch_of()
    alone = target.teacher(batch.images[:1, :, : batch.frames[0, 0], : batch.frames[0, 1]])
    maps = teacher_maps(target, batch)
    torch.testing.assert_close(maps[:1], alone, rtol=1e-5, atol=1e-5)
    student = student_of(sam).eval()
    loss = student(batch, maps)["loss"]
    noise = torch.randint_like(batch.images, 256)
    seen = cells_inside(batch.frames, SIZE, SIZE, whole=True).unsqueeze(1)
    assert not seen.all()
    batch.images = torch.where(seen, batch.images, noise)
    cells = cells_inside(batch.frames, GRID, SIZE, whole=False).unsqueeze(1)
    assert torch.equal(student(batch, torch.where(cells, maps, 9.0))["loss"], loss)
    model = student.model
    image = batch.images[:1, :, : batch.frames[0, 0], : batch.frames[0, 1]]
    torch.testing.assert_close(student.embed(batch)[:1], model.get_image_embeddings(image))


def test_finetuning_sees_the_same_padding(sam):
    """Also where only the decoder is finetuned, on what a distilled encoder gives."""
    batch, model = batch_of("semi_coupled"), load_model(sam).train()
    objective = Objective(model, MaskLossConfig(single_mask=True), PromptConfig())
    losses = objective(batch)
    batch.images = torch.where(
        cells_inside(batch.frames, SIZE, SIZE, whole=True).unsqueeze(1), batch.images, 200
    )
    assert torch.equal(objective(batch)["loss"], losses["loss"])


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_cached_features_are_the_live_ones(sam, dtype):
    """Within half a step of what is stored, in all cells that hold any of the image."""
    live = teacher_of(sam)
    info = {"name": "custom", "sha256": "", "random": False}
    cache = Cache.of(live.teacher, info, GRID, dtype)
    plain = ImageTransform(DATA, 0)
    given = samples()
    batch = plain.collate([plain.decode(sample, 0, False) for sample in given])
    maps = teacher_maps(live, batch)
    steps = []
    for sample, features in zip(given, maps, strict=True):
        width, height = 120, json.loads(sample.parts["json"])["image"]["height"]
        stored = pack(quantise(features, cache, (width, height)))
        sample.parts[TEACHER] = to_bytes(stored)
        limit = 0.51 * stored.scale if dtype == "int8" else 1e-3 * features.abs().amax((1, 2))
        steps.append(torch.as_tensor(limit))
    views = ImageTransform(DATA, 0, cache)
    read = views.collate([views.decode_held_out(sample) for sample in given])
    found = teacher_maps(CachedTeacher(cache), read)
    cells = cells_inside(batch.frames, GRID, SIZE, whole=False).unsqueeze(1)
    assert ((found - maps).abs() <= torch.stack(steps)[:, :, None, None])[
        cells.expand_as(maps)
    ].all()
    assert (found.masked_select(~cells) == 0).all() and not cells.all()
    student = student_of(sam).eval()
    losses = [student(one, taught)["loss"].item() for one, taught in ((batch, maps), (read, found))]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_the_teacher_keeps_its_decoder(sam):
    """While the student's is trained in the fully coupled form; as it is in the file."""
    student, batch = student_of(sam, "fully_coupled"), batch_of("fully_coupled")
    taught = teacher_maps(teacher_of(sam), batch)
    before = student.teacher_masks(taught, batch.points, batch.labels)
    for one, other in zip(
        before,
        load_model(sam).predict_low_resolution(taught, batch.points, batch.labels),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    for parameter in student.model.mask_decoder.parameters():
        parameter.data += 0.1
    after = student.teacher_masks(taught, batch.points, batch.labels)
    moved = student.student_masks(taught, batch.points, batch.labels)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[0], moved[0])


@pytest.mark.parametrize("form", FORMS)
def test_statistics_of_batches(sam, form, tmp_path):
    """Batch statistics move while embeddings are compared; coupled, a start's stay as they are."""
    model = small_model("tiny_vit_test")
    path = tmp_path / "model.safetensors"
    write_weights(path, model.state_dict(), model_header(model))
    started = small_model("tiny_vit_test", str(path), sam)
    student = Distillation(started, DistillationConfig(form))
    before = started.image_encoder.patch_embed.conv1.bn.running_mean.clone()
    student.eval(), student.train()
    student.embed(batch_of(form))
    moved = not torch.equal(before, started.image_encoder.patch_embed.conv1.bn.running_mean)
    assert moved == (form == "decoupled")


# ---- Held-out measures


def test_clicks_lie_in_the_image_so_far_apart():
    rng = np.random.default_rng(0)
    for frame, distance in (((90, 128), 60), ((128, 20), 64), ((60, 128), 0)):
        clicks = draw_clicks(frame, 500, distance, rng)
        assert clicks.shape == (500, 1 + (distance > 0), 2)
        assert (clicks >= 0).all() and (clicks < frame[::-1]).all()
        assert (clicks == np.floor(clicks)).all()
        if distance:
            away = np.linalg.norm(clicks[:, 0] - clicks[:, 1], axis=1)
            assert abs(away - distance).max() < 1.5
        assert (clicks[:, 0].max(0) > 0.9 * np.array(frame[::-1])).all()


def test_run_ends_are_the_inverse_of_painting():
    rng = np.random.default_rng(0)
    masks = [rng.random((7, 5)) > 0.5, np.zeros((7, 5), bool), np.ones((7, 5), bool)]
    for mask in masks:
        ends = run_ends(mask)
        assert ends[-1] == 35 and np.array_equal(paint(ends, 7, 5), mask)


def test_measures_of_embeddings_are_the_formula():
    torch.manual_seed(0)
    prediction, target = torch.randn(6, 3, 2, 2), torch.randn(6, 3, 2, 2)
    cells = torch.rand(6, 2, 2) > 0.3
    cells[0] = True
    sums = MapSums(3, 2, torch.device("cpu"))
    for part in (slice(0, 4), slice(4, 6)):
        sums.add(prediction[part], target[part], cells[part])
    error = constant = cosine = 0.0
    for y in range(2):
        for x in range(2):
            there = cells[:, y, x]
            p, t = (one[there, :, y, x].double() for one in (prediction, target))
            error += ((p - t) ** 2).sum().item()
            constant += ((t - t.mean(0)) ** 2).sum().item()
            cosine += F.cosine_similarity(p, t).sum().item()
    told, count = sums.measures(), cells.sum().item()
    assert told["mse"] == pytest.approx(error / 3 / count)
    assert told["r2"] == pytest.approx(1 - error / constant)
    assert told["cosine"] == pytest.approx(cosine / count) and told["pictures"] == 6
    one = MapSums(3, 2, torch.device("cpu"))
    one.add(prediction[:1], target[:1], cells[:1])
    assert one.measures()["r2"] is None  # a single image is its own mean
    assert sums.count.dtype == exact(torch.device("cpu"))


def test_a_student_that_is_the_teacher_agrees_with_it(sam, shards, tmp_path):
    """And another does not."""
    (source,) = opened(shards, tmp_path)
    views, config = ImageTransform(DATA, 0), AgreementConfig(samples=6, prompts=3)
    torch.manual_seed(0)
    same = Distillation(small_model(checkpoint=sam, decoder=sam), DistillationConfig())
    with Run(RunConfig(dir=str(tmp_path / "run"), device="cpu"), "fp32", None) as going:
        target = teacher_of(sam)
        target.autocast = going.accelerator.autocast
        told = measure(going, same, target, source.shards, views, config, 0)
        other = measure(going, student_of(sam), target, source.shards, views, config, 0)
        part = measure(going, same, target, source.shards, views, config, 0)
    names = ["1_click", *(f"pair_{n}" for n in (100, 200, 300, 400, 500))]
    assert told["pictures"] == 6 and told["mse"] < 1e-9 and told["r2"] == pytest.approx(1)
    assert told["cosine"] == pytest.approx(1) and part == told
    for name in names:
        assert told[f"miou_teacher_{name}"] > 0.999
        assert other[f"miou_teacher_{name}"] < 0.9
        assert 0 < told[f"trivial_teacher_{name}"] < 0.9
    assert other["r2"] < 0.5 and same.training  # as it was before


def test_pairs_are_asked_for_the_mask_that_sam_gives_them(sam):
    """Two points leave no doubt: mask 0; one click the best of the three others."""
    student, batch = student_of(sam).eval(), batch_of(count=1)
    with torch.no_grad():
        embedding = student.embed(batch)
    frame = tuple(batch.frames[0].tolist())
    for clicks, label in ((np.array([[[9, 9]]]), [1]), (np.array([[[9, 9], [60, 50]]]), [1, 0])):
        ours, theirs = masks_of_both(student, embedding, embedding, np.float32(clicks), frame)
        assert torch.equal(ours, theirs) and ours.shape == (1, *frame)
        points, labels = torch.tensor(clicks)[None].float(), torch.tensor(label)[None, None]
        logits, iou = student.model.predict_low_resolution(embedding, points, labels)
        best = 0 if len(label) == 2 else 1 + iou[0, 0, 1:].argmax().item()
        full = F.interpolate(logits[0, :, best : best + 1], (SIZE, SIZE), mode="bilinear")
        assert torch.equal(ours[0], full[0, 0, : frame[0], : frame[1]] > 0)


# ---- Runs


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
