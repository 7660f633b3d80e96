"""Distillation as MobileSAM has it: losses, what is trained, and what is measured."""

import json

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
from finetune.data import cells_inside
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
from finetune.model import load_model, model_header
from finetune.objective import Objective
from finetune.prompting import PromptConfig
from sami.core.checkpoint import write_weights
from sami.core.processes import exact
from sami.core.run import Run, RunConfig
from sami.core.scanning import TEACHER
from sami.features import Cache, pack, quantise, to_bytes
from sami.targets import CachedTeacher
from tests.distilling import (
    DATA,
    FORMS,
    GRID,
    SIZE,
    batch_of,
    samples,
    small_model,
    student_of,
    teacher_of,
    write_sam,
    write_scenes,
)
from tests.runs import (
    opened,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    return write_sam(tmp_path_factory.mktemp("sam"))


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
    for number in range(6):
        one, part = MapSums(3, 2, torch.device("cpu")), slice(number, number + 1)
        one.add(prediction[part], target[part] / 3, cells[part])
        assert one.measures()["r2"] is None  # a single image is its own mean
    assert sums.count.dtype == exact(torch.device("cpu"))


@pytest.mark.slow
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
