"""Stage 2's model: the released one's function, name for name, and SAM's interface."""

import copy
import importlib.util
import io
import json

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry

from finetune.model import MaskDecoderConfig, build_model, load_model, model_header
from finetune.sam import ModelShape, Sam
from sami.core.checkpoint import write_weights
from sami.core.errors import UserError
from sami.core.images import resize_array
from sami.core.optim import parameter_groups
from sami.encoder import EncoderConfig, build_encoder
from sami.encoder import export_header as export_encoder
from sami.encoders.protocol import EncoderShape
from tests.runs import ROOT

PARITY = ROOT.parent / "shared" / "parity"
TINY = EncoderShape(width=64, depth=2, heads=2, image_size=128)
SMALL = ModelShape(TINY)
NARROW = EncoderShape(width=32, depth=1, heads=2, image_size=128, channels=64)


@pytest.fixture(scope="module")
def parity():
    """The fixtures' recipe for weights and images; skips where it is not."""
    if not PARITY.exists():
        pytest.skip("the parity fixtures (../shared/parity) are not here")
    spec = importlib.util.spec_from_file_location("parity_weights", PARITY / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def released(parity, tmp_path_factory):
    """The fixtures' weights as the authors publish theirs."""
    shapes = json.loads((PARITY / "efficient_sam_ti_shapes.json").read_text())
    path = tmp_path_factory.mktemp("released") / "efficient_sam_vitt.pt"
    torch.save({"model": parity.parity_state_dict(shapes)}, path)
    return path


def distance(ours, reference):
    reference = torch.as_tensor(reference)
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.mark.slow
@torch.no_grad()
def test_the_released_models_function(parity, released):
    model = load_model(released)
    told = np.load(PARITY / "efficient_sam_ti.npz")
    height, width = told["image_hw"].tolist()
    image = parity.parity_image(height, width)[None]
    points, labels = torch.as_tensor(told["points"]), torch.as_tensor(told["labels"])
    embedding = model.get_image_embeddings(image)
    assert embedding.shape == (1, 256, 64, 64)
    assert distance(embedding[:, ::8, ::4, ::4], told["embedding"]) < 1e-4
    logits, iou = model.predict_masks(embedding, points, labels, True, height, width)
    assert distance(logits[..., ::2, ::2], told["low_res_masks"]) < 1e-4
    assert distance(iou, told["iou"]) < 1e-4
    single, iou = model.predict_masks(embedding, points, labels, False, height, width)
    assert distance(single[..., ::2, ::2], told["low_res_mask_single"]) < 1e-4
    assert distance(iou, told["iou_single"]) < 1e-4
    full, iou = model(image, points, labels)
    assert full.shape == (1, points.shape[1], 3, height, width)
    assert distance(full[..., ::5, ::5], told["full_masks"]) < 1e-4
    assert distance(iou, told["iou"]) < 1e-4


def test_names_and_shapes_are_the_released_ones(released):
    shapes = json.loads((PARITY / "efficient_sam_ti_shapes.json").read_text())
    ours = Sam(ModelShape()).state_dict()
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == {
        name: list(shape) for name, shape in shapes.items()
    }
    small = Sam(ModelShape(EncoderShape(width=384, heads=6)))
    assert sum(p.numel() for p in small.parameters()) == 26_413_028
    assert sum(p.numel() for p in Sam(ModelShape()).parameters()) == 10_223_204


@torch.no_grad()
def test_round_trip(tmp_path):
    torch.manual_seed(0)
    model = Sam(SMALL).eval()
    write_weights(tmp_path / "model.safetensors", model.state_dict(), model_header(model, steps=3))
    again = load_model(tmp_path)
    images = torch.rand(2, 3, 50, 70)
    points, labels = torch.tensor([[[[30.0, 20.0]]]] * 2), torch.ones(2, 1, 1)
    for a, b in zip(model(images, points, labels), again(images, points, labels), strict=True):
        assert torch.equal(a, b)


def build(encoder=None, decoder=None, width=64, **more):
    shape = EncoderConfig("custom", width=width, checkpoint=encoder and str(encoder))
    settings = MaskDecoderConfig(checkpoint=decoder and str(decoder), **more)
    return build_model(shape, settings, 128, "square", False)


def test_starts_from_stage_one(tmp_path):
    encoder = build_encoder(EncoderConfig("custom"), 128)
    path = tmp_path / "encoder.safetensors"
    write_weights(path, encoder.state_dict(), export_encoder(encoder))
    for start in (path, tmp_path):
        model = build(start)
        assert model.shape.encoder.grid == 8
        assert torch.equal(model.image_encoder.pos_embed, encoder.pos_embed)
        assert model.image_encoder.pos_embed.requires_grad
        theirs = encoder.blocks[1].mlp.fc1.weight
        assert torch.equal(model.image_encoder.blocks[1].mlp.fc1.weight, theirs)
    with pytest.raises(UserError, match="encoder.checkpoint .* should be"):
        build(path, width=32)
    # a random start has the released grid, or that of what it is compared with
    assert build().shape.encoder.grid == 14
    small = EncoderConfig("custom", grid=8)
    random = build_model(small, MaskDecoderConfig(width=64), 128, "square", False)
    assert random.image_encoder.pos_embed.shape == encoder.pos_embed.shape
    assert torch.equal(random.image_encoder.pos_embed[:, 1:], encoder.pos_embed[:, 1:])
    with pytest.raises(UserError, match="encoder.grid 7 is not the 8"):
        encoder = EncoderConfig("custom", checkpoint=str(path), grid=7)
        build_model(encoder, MaskDecoderConfig(), 128, "square", False)
    with pytest.raises(UserError, match="encoder.grid 7 is not the 8"):
        build_encoder(EncoderConfig("custom", grid=7), 128)


def test_starts_from_a_model(tmp_path):
    model = Sam(SMALL)
    path = tmp_path / "model.safetensors"
    write_weights(path, model.state_dict(), model_header(model))
    whole = build(path, path).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    assert not any(p.requires_grad for p in build(freeze="encoder").image_encoder.parameters())
    assert not any(p.requires_grad for p in build(freeze="decoder").mask_decoder.parameters())
    unused = build().mask_decoder.output_hypernetworks_mlps
    assert [n.fc.weight.requires_grad for n in unused] == [False, True, True, True]


@pytest.mark.slow
def test_starts_from_sams_decoder(tmp_path):
    """Every tensor of SAM's that has a place finds it."""
    sam = sam_model_registry["vit_b"]()
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    model = build(decoder=tmp_path / "sam.pth").state_dict()
    pairs = {
        "prompt_encoder.not_a_point_embed.weight": "prompt_encoder.invalid_points.weight",
        "prompt_encoder.point_embeddings.3.weight": (
            "prompt_encoder.bbox_bottom_right_embeddings.weight"
        ),
        "mask_decoder.transformer.layers.1.mlp.lin2.weight": (
            "mask_decoder.transformer.layers.1.mlp.fc.weight"
        ),
        "mask_decoder.output_upscaling.3.weight": (
            "mask_decoder.final_output_upscaling_layers.1.0.weight"
        ),
        "mask_decoder.iou_prediction_head.layers.1.bias": (
            "mask_decoder.iou_prediction_head.layers.1.0.bias"
        ),
        "mask_decoder.output_hypernetworks_mlps.2.layers.2.weight": (
            "mask_decoder.output_hypernetworks_mlps.2.fc.weight"
        ),
    }
    theirs = sam.state_dict()
    for name, ours in pairs.items():
        assert torch.equal(theirs[name], model[ours]), name


def test_layer_ids_for_the_layer_decay():
    model = Sam(SMALL)
    layer_id = model.image_encoder.layer_id
    ids = {name: layer_id(name) for name, _ in model.named_parameters()}
    assert ids["image_encoder.pos_embed"] == ids["image_encoder.patch_embed.proj.bias"] == 0
    assert ids["image_encoder.blocks.0.norm1.bias"] == 1
    assert ids["image_encoder.blocks.1.attn.qkv.weight"] == 2
    assert ids["image_encoder.neck.0.weight"] == 3 == ids["mask_decoder.iou_token.weight"]
    assert layer_id("model.image_encoder.blocks.0.norm1.bias") == 1
    scales = {group["lr_scale"] for group in parameter_groups(model, 0.1, 0.5, layer_id)}
    assert scales == {1, 0.5, 0.25, 0.125}


@pytest.mark.parametrize("spoilt", ["missing", "text", "other tensors", "sam", "other safetensors"])
def test_what_is_no_model(spoilt, tmp_path):
    path = tmp_path / "model.pt"
    if spoilt == "text":
        path.write_text("no weights")
    elif spoilt == "other tensors":
        torch.save({"a": torch.zeros(3)}, path)
    elif spoilt == "sam":
        names = Sam(SMALL).state_dict()
        torch.save({"model": {n: t for n, t in names.items() if "iou_token" not in n}}, path)
    elif spoilt == "other safetensors":
        path = tmp_path / "x.safetensors"
        write_weights(path, {"a": torch.zeros(3)}, {})
    with pytest.raises(UserError, match=str(path)):
        load_model(path)


@torch.no_grad()
def test_prompts_and_images_are_independent():
    """Batched prompts give what each gives alone; unequal numbers are padded."""
    torch.manual_seed(0)
    model = Sam(SMALL).eval()
    embeddings = model.get_image_embeddings(torch.rand(2, 3, 128, 128))
    points = torch.rand(2, 3, 4, 2) * 120
    labels = torch.tensor([[1, 1, 1, 1], [2, 3, -1, -1], [1, -1, -1, -1]]).expand(2, 3, 4)
    logits, iou = model.predict_masks(embeddings, points, labels, True, 128, 128)
    for image in range(2):
        for prompt in range(3):
            used = int((labels[image, prompt] >= 0).sum())
            alone, alone_iou = model.predict_masks(
                embeddings[image : image + 1],
                points[image : image + 1, prompt : prompt + 1, :used],
                labels[image : image + 1, prompt : prompt + 1, :used],
                True,
                128,
                128,
            )
            if used == 4:  # a slot not used keeps its position: where -1 stands matters
                torch.testing.assert_close(alone[0, 0], logits[image, prompt])
                torch.testing.assert_close(alone_iou[0, 0], iou[image, prompt])


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    model = Sam(SMALL).eval()
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    return SamPredictor(model)


@torch.no_grad()
@pytest.mark.parametrize("resize", ["square", "longest"])
def test_sam_predictor(resize):
    torch.manual_seed(0)
    model = Sam(ModelShape(TINY, resize=resize)).eval()
    predictor = SamPredictor(model)
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    predictor.set_image(image)
    clicks, box = np.array([[20.0, 30.0], [50.0, 10.0]]), np.array([5.0, 6.0, 70.0, 50.0])
    masks, iou, low = predictor.predict(clicks, np.ones(2), box, return_logits=True)
    assert masks.shape == (3, 60, 90) and low.shape == (3, 32, 32)
    points = torch.tensor([[[*clicks.tolist(), box[:2].tolist(), box[2:].tolist()]]])
    labels = torch.tensor([[[1, 1, 2, 3]]])
    told, told_iou = model.predict_masks(
        predictor.features, points.float(), labels, True, 60, 90, 60, 90
    )
    np.testing.assert_allclose(masks, told[0, 0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(iou, told_iou[0, 0], rtol=1e-3, atol=1e-5)
    best, best_iou, best_low = predictor.predict(
        clicks, np.ones(2), box, multimask_output=False, return_logits=True
    )
    assert best_iou[0] == iou.max() and np.array_equal(best_low[0], low[iou.argmax()])
    # One mask and three are resized by other loops: up to 2 roundings (1.2e-7) of the largest logit
    # were seen, which at a logit near 0 are many of its own.
    most = 1e-6 * np.abs(low).max()
    np.testing.assert_allclose(best[0], masks[iou.argmax()], rtol=0, atol=most)
    boxes = torch.tensor([[5.0, 6, 70, 50], [0, 0, 20, 20]])
    batch, _, _ = predictor.predict_torch(None, None, boxes)
    assert batch.shape == (2, 3, 60, 90)


def test_what_sam_can_and_this_model_cannot_is_refused_by_name(predictor):
    predictor.set_image(np.zeros((60, 90, 3), np.uint8))
    click = np.array([[20.0, 30.0]])
    with pytest.raises(ValueError, match="label 0"):
        predictor.predict(click, np.zeros(1))
    with pytest.raises(ValueError, match="mask_input"):
        predictor.predict(click, np.ones(1), mask_input=np.zeros((1, 32, 32)))
    with pytest.raises(ValueError, match="7 points in a prompt"):
        predictor.predict(click.repeat(7, 0), np.ones(7))
    model = predictor.model
    with pytest.raises(ValueError, match="label 0"):
        model.predict_masks(
            predictor.features, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1), True, 9, 9
        )


KINDS = pytest.mark.parametrize("kind", ["efficientsam", "sam"])
RESIZES = pytest.mark.parametrize("resize", ["square", "longest"])
IMAGE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
WIDE = np.random.default_rng(1).integers(0, 256, (40, 110, 3), dtype=np.uint8)


def lively(kind="efficientsam", resize="square"):
    """A model whose prompts matter."""
    torch.manual_seed(0)
    model = Sam(ModelShape(NARROW, kind, resize)).eval()
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    return model


def looking_at(model, image):
    predictor = SamPredictor(model)
    predictor.set_image(image)
    return predictor


@torch.no_grad()
@KINDS
@RESIZES
def test_any_type_of_number_is_the_same_prompt(kind, resize):
    """Through every entrance; a scale in the points' own type would be 0 or 1."""
    model = lively(kind, resize)
    predictor = looking_at(model, IMAGE)
    image = torch.from_numpy(IMAGE).permute(2, 0, 1)[None]
    embeddings = model.get_image_embeddings(image)
    points = torch.tensor([[[[50, 30], [5, 6], [70, 50]], [[20, 11], [8, 41], [-1, -1]]]])
    labels = torch.tensor([[[1, 2, 3], [1, 1, -1]]])
    clicks, kinds, boxes = points[0, :, :1], labels[0, :, :1], torch.tensor([[5, 6, 70, 50]] * 2)

    def everywhere(number, label):
        p, at = points.to(number), labels.to(label)
        q, what, box = clicks.to(number), kinds.to(label), boxes.to(number)
        yield model(image, p, at)
        yield model.predict_masks(embeddings, p, at, True, 60, 90, 60, 90)
        yield model.predict_all(embeddings, p, at, 60, 90)
        yield model.predict_low_resolution(embeddings, p, at)
        yield predictor.predict_torch(q, what, box, return_logits=True)
        yield predictor.predict_torch(q, what, return_logits=True)
        yield predictor.predict_torch(None, None, box, return_logits=True)
        yield predictor.predict(q[0].numpy(), what[0].numpy(), box[0].numpy(), return_logits=True)
        yield model.prompt_encoder((q, what), box, None)
        if kind == "efficientsam":
            yield (model.prompt_encoder.embed(p, at),)

    expected = list(everywhere(torch.float32, torch.int64))
    assert (expected[2][0][0, 0] - expected[2][0][0, 1]).abs().max() > 1e-2  # prompts matter
    for number in (torch.int64, torch.float64, torch.float16):
        for found, wanted in zip(everywhere(number, torch.int64), expected, strict=True):
            for one, other in zip(found, wanted, strict=True):
                assert np.array_equal(np.asarray(one), np.asarray(other)), number
    for label in (torch.int8, torch.float32):
        for found, wanted in zip(everywhere(torch.int64, label), expected, strict=True):
            for one, other in zip(found, wanted, strict=True):
                assert np.array_equal(np.asarray(one), np.asarray(other)), label
    for label in (torch.bool, torch.uint8):  # no -1: only the slots that are filled up
        found = model.predict_masks(
            embeddings, points[:, :, :1], kinds[None].to(label), True, 60, 90
        )
        wanted = model.predict_masks(embeddings, points[:, :, :1], kinds[None], True, 60, 90)
        assert torch.equal(found[0], wanted[0])


@torch.no_grad()
@KINDS
def test_any_type_of_number_is_the_same_image(kind):
    model = lively(kind)
    image = torch.from_numpy(IMAGE).permute(2, 0, 1)[None]
    wanted = model.get_image_embeddings(image)
    for found in (image.int(), image.long(), image.float() / 255, image.double() / 255):
        torch.testing.assert_close(model.get_image_embeddings(found), wanted, rtol=1e-4, atol=1e-5)
    half = model.get_image_embeddings((image.float() / 255).half())
    assert distance(half, wanted) < 5e-3


@torch.no_grad()
@KINDS
@RESIZES
def test_a_image_as_it_is_and_a_prepared_one_give_the_same_masks(kind, resize):
    """Up to the prepared one's rounding to whole numbers: 1 %; without antialiasing it is 50 %."""
    model = lively(kind, resize)
    raw = np.random.default_rng(0).integers(0, 256, (300, 470, 3), dtype=np.uint8)
    prepared = resize_array(raw, *model.shape.frame(300, 470))
    prompt = torch.tensor([[[[200, 100]]]]), torch.ones(1, 1, 1)
    embeddings, masks = [], []
    for image in (raw, prepared):
        image = torch.from_numpy(image).permute(2, 0, 1)[None]
        embeddings.append(model.get_image_embeddings(image))
        told = model.predict_masks(embeddings[-1], *prompt, True, 300, 470, 300, 470)
        masks.append(told[0])
    assert distance(*embeddings) < 0.02 and distance(*masks) < 0.04
    assert ((masks[0] > 0) != (masks[1] > 0)).float().mean() < 0.01


@torch.no_grad()
@KINDS
@RESIZES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_model_places_prompts_as_exactly(kind, resize, dtype):
    """In bf16 a click at 1001 of 1024 would be one at 1000 or 1004."""
    whole, model = lively(kind, resize), lively(kind, resize).to(dtype)
    frequencies = model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    assert frequencies.dtype == torch.float32
    points, labels = torch.tensor([[[101, 77], [3, 120]]]), torch.ones(1, 2)
    tokens = [m.prompt_encoder((points, labels), None, None)[0] for m in (whole, model)]
    assert tokens[1].dtype == dtype
    # apart by the rounding of the result, not of a coordinate
    assert (tokens[0] - tokens[1].float()).abs().max() < (
        2**-6 if dtype == torch.bfloat16 else 2**-9
    )
    found, wanted = (
        looking_at(m, IMAGE).predict_torch(points, labels, return_logits=True)[0]
        for m in (model, whole)
    )
    assert found.isfinite().all() and distance(found.float(), wanted) < 0.05


@torch.no_grad()
@KINDS
@RESIZES
def test_predictors_on_one_model_do_not_know_of_each_other(kind, resize):
    """Each answers as alone, in any order, beside a mask generator, and after a restart."""
    click, label = np.array([[30, 20]]), np.ones(1)

    def answer(predictor):
        return predictor.predict(click, label, np.array([5, 6, 70, 38]), return_logits=True)[0]

    alone = [answer(looking_at(lively(kind, resize), image)) for image in (IMAGE, WIDE)]
    model = lively(kind, resize)
    generator = SamAutomaticMaskGenerator(
        model, points_per_side=2, pred_iou_thresh=-1e9, stability_score_thresh=-1, crop_n_layers=1
    )
    masks = generator.generate(WIDE)
    first, second = looking_at(model, IMAGE), looking_at(model, WIDE)
    for predictor, wanted in ((first, 0), (second, 1), (first, 0), (first, 0), (second, 1)):
        assert np.array_equal(answer(predictor), alone[wanted])
    again = generator.generate(WIDE)
    assert len(masks) == len(again)
    assert all(
        np.array_equal(a["segmentation"], b["segmentation"])
        for a, b in zip(masks, again, strict=True)
    )
    assert np.array_equal(answer(first), alone[0])
    buffer = io.BytesIO()
    torch.save((first.features, first.original_size, first.input_size), buffer)
    buffer.seek(0)
    for stored in (torch.load(buffer), copy.deepcopy((first.features, (60, 90), (85, 128)))):
        fresh = SamPredictor(lively(kind, resize))
        fresh.features, fresh.original_size, fresh.input_size = stored
        fresh.is_image_set = True
        assert np.array_equal(answer(fresh), alone[0])
    through_numpy = torch.from_numpy(first.features.numpy().copy())
    for lost in (through_numpy, first.features.clone(), first.features.double().float()):
        fresh.features = lost
        if resize == "square":
            with pytest.raises(ValueError, match="with_size"):
                answer(fresh)
            fresh.features = fresh.model.with_size(lost, fresh.original_size)
        assert np.array_equal(answer(fresh), alone[0])


@torch.no_grad()
def test_prompts_that_were_computed_on_are_not_placed():
    predictor = looking_at(lively(), IMAGE)
    model, points = predictor.model, (torch.tensor([[[30, 20]]]), torch.ones(1, 1))
    sparse, dense = model.prompt_encoder(points, None, None)
    given = (predictor.features, model.prompt_encoder.get_dense_pe())
    model.mask_decoder(*given, sparse, dense, True)
    with pytest.raises(ValueError, match="were computed on"):
        model.mask_decoder(*given, sparse.clone(), dense, True)


@torch.no_grad()
@KINDS
@RESIZES
def test_nothing_asked_is_nothing_answered(kind, resize):
    model = lively(kind, resize)
    predictor, images = looking_at(model, IMAGE), torch.rand(2, 3, 60, 90)
    for count, prompts in ((2, 0), (0, 3), (0, 0)):
        points, labels = torch.zeros(count, prompts, 1, 2), torch.ones(count, prompts, 1)
        masks, iou = model(images[:count], points, labels)
        assert masks.shape == (count, prompts, 3, 60, 90) and iou.shape == masks.shape[:3]
        embeddings = model.get_image_embeddings(images[:count])
        masks, iou = model.predict_masks(embeddings, points, labels, False, 60, 90)
        assert masks.shape == (count, prompts, 1, 32, 32) and iou.shape == masks.shape[:3]
    none, unlabelled = torch.zeros(0, 2, 2), torch.zeros(0, 2)
    for multimask, count in ((True, 3), (False, 1)):
        for given in ((none, unlabelled), (None, None, none[:, 0].repeat(1, 2))):
            masks, iou, low = predictor.predict_torch(*given, multimask_output=multimask)
            assert masks.shape == (0, count, 60, 90) and iou.shape == (0, count)
            assert low.shape == (0, count, 32, 32)
    # one prompt of no points is what every slot of it unused is
    embeddings = model.get_image_embeddings(images)
    empty = model.predict_all(embeddings, torch.zeros(2, 1, 0, 2), torch.zeros(2, 1, 0), 60, 90)
    unused = model.predict_all(embeddings, -torch.ones(2, 1, 3, 2), -torch.ones(2, 1, 3), 60, 90)
    assert torch.equal(empty[0], unused[0])


@torch.no_grad()
@KINDS
@RESIZES
def test_what_does_not_fit_together_is_said_in_one_sentence(kind, resize):
    model = lively(kind, resize)
    predictor, images = looking_at(model, IMAGE), torch.rand(1, 3, 60, 90)
    embeddings = model.get_image_embeddings(images)
    points, labels, box = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1), np.zeros((3, 4))
    for what, call in {
        "images": lambda: model(torch.zeros(1, 3, 0, 5), points, labels),
        "images ": lambda: model.get_image_embeddings(torch.zeros(3, 9, 9)),
        "image of 0 x 9": lambda: model.predict_all(embeddings, points, labels, 0, 9),
        "has no pixels": lambda: model.preprocess(torch.zeros(1, 3, 0, 128)),
        "points": lambda: model.predict_masks(embeddings, points[0], labels[0], True, 9, 9),
        "points for 1 im": lambda: model.predict_masks(embeddings[:0], points, labels, True, 9, 9),
        "boxes": lambda: predictor.predict(box=box),
        "boxes ": lambda: predictor.predict(box=box[:0]),
        "boxes  ": lambda: predictor.predict_torch(None, None, torch.zeros(0)),
        "points of 2 prompts": lambda: predictor.predict_torch(
            points[0].repeat(2, 1, 1), labels[0].repeat(2, 1), torch.zeros(3, 4)
        ),
        "points ": lambda: predictor.predict_torch(points[0], labels[0].repeat(1, 2)),
    }.items():
        with pytest.raises(ValueError, match=what.strip()):
            call()
    if kind == "efficientsam":
        with pytest.raises(ValueError, match="without points"):
            predictor.predict(np.zeros((0, 2)), np.zeros(0))
        with pytest.raises(ValueError, match="give points or boxes"):
            predictor.predict()


def test_automatic_mask_generator(predictor):
    generator = SamAutomaticMaskGenerator(
        predictor.model, points_per_side=4, pred_iou_thresh=-1e9, stability_score_thresh=-1
    )
    masks = generator.generate(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    for mask in masks:
        assert mask["segmentation"].shape == (60, 90)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Sam(SMALL, checkpointing)
        images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
        model.get_image_embeddings(images).square().mean().backward()
        gradients.append([p.grad for p in model.image_encoder.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_where_a_prompt_is_does_not_depend_on_autocast():
    """In bf16 a coordinate would be off by pixels."""
    for kind in ("efficientsam", "sam"):
        torch.manual_seed(0)
        encoder = Sam(ModelShape(TINY, kind)).prompt_encoder
        points = torch.rand(2, 3, 2) * 128
        expected = encoder((points, torch.ones(2, 3)), None, None)[0]
        with torch.autocast("cpu", torch.bfloat16):
            found = encoder((points, torch.ones(2, 3)), None, None)[0]
        assert torch.equal(found, expected)
