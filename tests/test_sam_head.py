"""SAM's own head and encoder: the package's function, whatever the batch looks like."""

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling import Sam as TheirSam

from finetune.data import PromptBatch
from finetune.losses import MaskLossConfig
from finetune.model import MaskDecoderConfig, build_model, load_model, model_header
from finetune.objective import Objective
from finetune.prompting import PromptConfig
from sami.core.checkpoint import write_weights
from sami.core.errors import UserError
from sami.encoder import EncoderConfig
from sami.encoders.sam import SamEncoder, sam_shape
from sami.teacher import TeacherConfig, load_teacher

SIZE = 128
SHAPE = {"width": 32, "depth": 4, "heads": 2}


@pytest.fixture(scope="module")
def theirs():
    """segment-anything's model, small, with every tensor random."""
    torch.manual_seed(0)
    encoder = SamEncoder(sam_shape(32, 4, 2, SIZE))
    grid = SIZE // 16
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    model = TheirSam(
        encoder,
        PromptEncoder(256, (grid, grid), (SIZE, SIZE), 16),
        MaskDecoder(transformer_dim=256, transformer=transformer),
    )
    for name, parameter in model.named_parameters():
        if "pos" in name or parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def official(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "sam.pth"
    torch.save(theirs.state_dict(), path)
    return path


def close(ours, reference):
    difference = np.linalg.norm(np.asarray(ours) - np.asarray(reference))
    assert difference < 1e-4 * np.linalg.norm(np.asarray(reference))


PROMPTS = {
    "click": dict(point_coords=[[40, 30]], point_labels=[1]),
    "background": dict(point_coords=[[40, 30], [80, 50]], point_labels=[1, 0]),
    "box": dict(box=[10, 12, 80, 60]),
    "box and click": dict(point_coords=[[40, 30]], point_labels=[0], box=[10, 12, 80, 60]),
    "eight clicks": dict(point_coords=[[9 * i, 7 * i] for i in range(8)], point_labels=[1] * 8),
}


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_official_models_function(theirs, official, prompt, multimask):
    """As SamPredictor, and as predict_masks."""
    given = {name: np.array(value) for name, value in PROMPTS[prompt].items()}
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    answers = []
    for model in (theirs, load_model(official)):
        predictor = SamPredictor(model)
        predictor.set_image(image)
        _, _, low = predictor.predict(**given, multimask_output=True)
        answers.append(
            predictor.predict(
                **given, multimask_output=multimask, return_logits=True, mask_input=low[:1]
            )
        )
        again = predictor.predict(**given, multimask_output=multimask, return_logits=True)
        answers[-1] += again
    for reference, ours in zip(*answers, strict=True):
        close(ours, reference)
    points = given.get("point_coords", np.zeros((0, 2)))
    labels = given.get("point_labels", np.zeros(0))
    if "box" in given:
        points = np.concatenate([given["box"].reshape(2, 2), points])
        labels = np.concatenate([[2, 3], labels])
    points, labels = (torch.tensor(x, dtype=torch.float)[None, None] for x in (points, labels))
    masks, iou = predictor.model.predict_masks(
        predictor.features, points, labels, multimask, 60, 90, 60, 90
    )
    close(masks[0, 0], answers[0][3])
    close(iou[0, 0], answers[0][4])


@torch.no_grad()
def test_prompts_of_unequal_length_are_each_as_alone(official):
    model = load_model(official)
    embeddings = model.get_image_embeddings(torch.rand(2, 3, 100, SIZE))
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(2, 6, 5, 2, generator=generator) * 100
    kinds = [[1, 1, 1, 0, 1], [2, 3], [1], [2, 3, 1], [1, 0], []]
    labels = torch.full((2, 6, 5), -1)
    for row, kind in enumerate(kinds):
        labels[:, row, : len(kind)] = torch.tensor(kind, dtype=torch.long)
    labels[1] = labels[1].flip(0)
    masks = torch.randn(2, 6, 32, 32, generator=generator)
    for earlier in (None, masks):
        logits, iou = model.predict_low_resolution(embeddings, points, labels, earlier)
        assert logits.shape == (2, 6, 4, 32, 32) and iou.shape == (2, 6, 4)
        for image in range(2):
            for row in range(6):
                used = int((labels[image, row] >= 0).sum())
                alone = model.predict_low_resolution(
                    embeddings[image : image + 1],
                    points[image : image + 1, row : row + 1, :used],
                    labels[image : image + 1, row : row + 1, :used],
                    None if earlier is None else earlier[image : image + 1, row : row + 1],
                )
                close(logits[image, row], alone[0][0, 0])
                close(iou[image, row], alone[1][0, 0])


@torch.no_grad()
def test_square_counts_in_the_images_pixels(tmp_path):
    torch.manual_seed(0)
    model = small("square").eval()
    write_weights(tmp_path / "model.safetensors", model.state_dict(), model_header(model))
    model = load_model(tmp_path)
    predictor = SamPredictor(model)
    predictor.set_image(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    masks, iou, _ = predictor.predict(
        np.array([[20, 30]]), np.array([0]), np.array([5, 6, 70, 50]), return_logits=True
    )
    points = torch.tensor([[[[20.0, 30], [5, 6], [70, 50]]]])
    told, told_iou = model.predict_masks(
        predictor.features, points, torch.tensor([[[0, 2, 3]]]), True, 60, 90, 60, 90
    )
    close(masks, told[0, 0])
    # mask 0 was not trained: the best of three stands in for it
    _, single_iou, _ = predictor.predict(
        np.array([[20, 30]]), np.array([0]), np.array([5, 6, 70, 50]), multimask_output=False
    )
    assert single_iou[0] == pytest.approx(told_iou.max().item(), rel=1e-4)


def small(resize="longest", single_mask=False, **decoder):
    encoder = EncoderConfig("sam_vit_b", **SHAPE)
    settings = MaskDecoderConfig("sam", **decoder)
    return build_model(encoder, settings, SIZE, resize, False, single_mask)


def batch():
    points = torch.full((2, 3, 6, 2), -1.0)
    labels = torch.full((2, 3, 6), -1)
    points[:, 0, 0], labels[:, 0, 0] = torch.tensor([60.0, 60.0]), 1
    points[:, 1, :2], labels[:, 1, :2] = torch.tensor([[40.0, 40], [90, 90]]), torch.tensor([2, 3])
    points[0, 2, :2], labels[0, 2, :2] = torch.tensor([[50.0, 50], [70, 80]]), 1
    there = torch.tensor([[True, True, True], [True, True, False]])
    masks = torch.zeros(2, 3, 32, 32, dtype=torch.bool)
    masks[:, :, 10:24, 10:24] = True
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    inside = torch.ones(2, 32, 32, dtype=torch.bool)
    return PromptBatch(
        images, masks, there, inside, points, labels, torch.arange(0, 128, 4.0).repeat(2, 2, 1)
    )


@pytest.mark.parametrize("single_mask", [False, True])
def test_everything_that_should_be_trained_is(single_mask):
    torch.manual_seed(0)
    model = small(single_mask=single_mask).train()
    loss = MaskLossConfig(single_mask=single_mask)
    losses = Objective(model, loss, PromptConfig(corrections=3))(batch())
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()
    network = model.mask_decoder.output_hypernetworks_mlps[0].layers[0].weight
    assert (network.grad is not None and network.grad.abs().sum() > 0) == single_mask
    background = model.prompt_encoder.point_embeddings[0].weight.grad
    assert background.abs().sum() > 0  # wrongly taken pixels were clicked
    assert model.image_encoder.blocks[0].attn.rel_pos_h.grad is not None


def test_starts_from_sam(official, theirs):
    encoder = EncoderConfig("sam_vit_b", **SHAPE, checkpoint=str(official))
    model = build_model(
        encoder, MaskDecoderConfig("sam", str(official)), SIZE, "longest", True, True
    )
    stored = theirs.state_dict()
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, stored[n]) for n, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="decoder.width"):
        build_model(
            encoder, MaskDecoderConfig("sam", str(official), width=64), SIZE, "longest", False
        )
    with pytest.raises(UserError, match="no dropout"):
        MaskDecoderConfig("sam", dropout=0.1).check()


@torch.no_grad()
@pytest.mark.parametrize("name", ["custom", "sam_vit_b"])
def test_a_run_folder_is_a_teacher(tmp_path, name):
    torch.manual_seed(0)
    encoder = EncoderConfig(name, **SHAPE)
    model = build_model(encoder, MaskDecoderConfig(width=64), SIZE, "square", False).eval()
    write_weights(tmp_path / "model.safetensors", model.state_dict(), model_header(model))
    teacher = load_teacher(TeacherConfig("custom", str(tmp_path), SIZE))
    assert teacher.channels == 64
    images = torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(teacher(images), model.get_image_embeddings(images))
    trunk = load_teacher(TeacherConfig("custom", str(tmp_path), SIZE, layer="trunk"))
    assert trunk.channels == 32 == trunk(images).shape[1]
    flex = TeacherConfig("custom", str(tmp_path), SIZE, attention="flex")
    if name == "custom":
        with pytest.raises(UserError, match="attention flex is for SAM's own encoder"):
            load_teacher(flex)
    else:
        assert load_teacher(flex).encoder.flex
    with pytest.raises(UserError, match="teacher.width 48 differs from the 32"):
        load_teacher(TeacherConfig("custom", str(tmp_path), SIZE, width=48))
    with pytest.raises(UserError, match="is no sam_vit_l"):
        load_teacher(TeacherConfig("sam_vit_l", str(tmp_path), SIZE))
