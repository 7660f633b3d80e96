"""Both mask decoders against slow and obvious ones, whatever prompts share."""

import copy

import pytest
import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer

from finetune.mask_decoder import HEADS, Attention
from finetune.sam import ModelShape, Sam
from sami.encoders.protocol import EncoderShape

# 36 image tokens; of 256 channels, as the released ones
WIDE = EncoderShape(width=32, depth=1, heads=2, image_size=96)
KINDS = pytest.mark.parametrize("kind", ["efficientsam", "sam"])


def lively(kind):
    """A model with every tensor of its head random, biases and norms too."""
    torch.manual_seed(0)
    model = Sam(ModelShape(WIDE, kind)).eval()
    for part in (model.prompt_encoder, model.mask_decoder):
        for name, parameter in part.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


def distance(ours, reference):
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


def plain_attention(layer, q, k, v):
    """Queries [T, D] over keys and values [S, D], one head after the other."""
    q, k, v = (
        projection(x).chunk(HEADS, dim=1)
        for projection, x in ((layer.q_proj, q), (layer.k_proj, k), (layer.v_proj, v))
    )
    heads = []
    for number in range(HEADS):
        scores = q[number] @ k[number].T / q[number].shape[1] ** 0.5
        heads.append(scores.softmax(1) @ v[number])
    return layer.out_proj(torch.cat(heads, dim=1))


def plain_efficientsam(decoder, embedding, encoding, prompts):
    """Four masks [4, 4h, 4w] and predicted IoU [4] of one prompt [P, D] in one image [D, h, w]."""
    size, attend = embedding.shape[1:], plain_attention
    image, places = (x.flatten(1).T for x in (embedding, encoding))
    given = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight, prompts])
    tokens = given
    for number, block in enumerate(decoder.transformer.layers):
        tokens = tokens + given if number else tokens
        tokens = block.norm1(tokens + attend(block.self_attn, tokens, tokens, tokens))
        q, k = tokens + given, image + places
        tokens = block.norm2(tokens + attend(block.cross_attn_token_to_image, q, k, image))
        tokens = block.norm3(tokens + block.mlp(tokens))
        q = tokens + given
        image = block.norm4(image + attend(block.cross_attn_image_to_token, k, q, tokens))
    last = decoder.transformer.final_attn_token_to_image
    tokens = tokens + attend(last, tokens + given, image + places, image)
    tokens = decoder.transformer.norm_final_attn(tokens)
    fine = image.T.unflatten(1, size)[None]
    for layer in decoder.final_output_upscaling_layers:
        fine = layer(fine)
    masks = [
        (network(tokens[1 + number])[:, None, None] * fine[0]).sum(0)
        for number, network in enumerate(decoder.output_hypernetworks_mlps)
    ]
    return torch.stack(masks), decoder.iou_prediction_head(tokens[0])


def plain(model, embeddings, points, labels, masks):
    """Each prompt of each image by itself, in fp64."""
    prompts, found = model.prompt_encoder, []
    if model.shape.decoder == "sam":
        transformer = TwoWayTransformer(2, 256, 8, 2048)
        decoder = MaskDecoder(transformer_dim=256, transformer=transformer).double().eval()
        decoder.load_state_dict(model.mask_decoder.state_dict())
    else:
        decoder = copy.deepcopy(model.mask_decoder).double()
    encoding = prompts.get_dense_pe().double()
    for image, embedding in enumerate(embeddings.double()):
        for row in range(points.shape[1]):
            asked = points[image, row][None], labels[image, row][None]
            earlier = None if masks is None else masks[image, row][None, None]
            sparse, dense = prompts.embed_prompts(asked, None, earlier)
            sparse, dense = sparse.double(), dense.double()
            if model.shape.decoder == "sam":
                logits, iou = decoder.predict_masks(embedding[None], encoding, sparse, dense)
                found.append((logits[0], iou[0]))
            else:
                found.append(plain_efficientsam(decoder, embedding, encoding[0], sparse[0]))
    count = points.shape[:2]
    return [torch.stack(parts).unflatten(0, count) for parts in zip(*found, strict=True)]


@torch.no_grad()
@KINDS
@pytest.mark.parametrize("clicks", [1, 3, 6])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 1), (3, 4)], ids=str)
def test_masks_are_the_plain_decoders(kind, clicks, shape):
    model = lively(kind)
    embeddings = torch.randn(shape[0], 256, 6, 6)
    points, labels = torch.rand(*shape, clicks, 2) * 96, torch.ones(*shape, clicks)
    earlier = [None] if kind == "efficientsam" else [None, torch.randn(*shape, 24, 24)]
    for masks in earlier:
        logits, iou = model.predict_low_resolution(embeddings, points, labels, masks)
        wanted, wanted_iou = plain(model, embeddings, points, labels, masks)
        assert logits.shape == (*shape, 4, 24, 24) and iou.shape == (*shape, 4)
        assert distance(logits, wanted) < 1e-5 and distance(iou, wanted_iou) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            low, low_iou = model.predict_low_resolution(embeddings, points, labels, masks)
        assert low.dtype == torch.bfloat16
        assert distance(low, wanted) < 0.03 and distance(low_iou, wanted_iou) < 0.1


@torch.no_grad()
@KINDS
def test_promising_masks_are_those_of_the_whole_decoder(kind):
    model = lively(kind)
    embedding = model.with_size(torch.randn(1, 256, 6, 6), (96, 96))
    clicks = torch.rand(9, 1, 2) * 96, torch.ones(9, 1)
    given = (
        embedding,
        model.prompt_encoder.get_dense_pe(),
        *model.prompt_encoder(clicks, None, None),
    )
    logits, iou = model.mask_decoder(*given, True)
    least = float(iou.amax(1).median())
    which, some, some_iou = model.mask_decoder.predict_promising(*given, least)
    assert which.tolist() == (iou > least).any(1).nonzero().flatten().tolist()
    assert len(which) == 4
    assert distance(some, logits[which]) < 1e-6 and distance(some_iou, iou[which]) < 1e-6


def given_tokens(few, many, lead=(2, 3)):
    torch.manual_seed(few)
    return [torch.randn(*lead, count, 256, requires_grad=True) for count in (few, many, many)]


@pytest.mark.parametrize("few", [1, 7, 15, 16, 20])
@pytest.mark.parametrize("back", [False, True])
def test_attention_and_its_gradients_are_the_plain_ones(few, back, monkeypatch):
    """In the full width where that saves time (15 tokens at most), and projected."""
    torch.manual_seed(1)
    layer, calls = Attention(256, 128), []
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    wide = layer._in_full_width
    monkeypatch.setattr(layer, "_in_full_width", lambda *x: calls.append(len(x)) or wide(*x))
    tokens, image, value = given_tokens(few, 40)
    q, k, v = (image, tokens, given_tokens(few, 1)[0]) if back else (tokens, image, value)
    found, weights = layer(q, k, v), torch.randn(256)
    assert bool(calls) == (few < 16)
    each = zip(*(x.flatten(0, 1) for x in (q, k, v)), strict=True)
    wanted = torch.stack([plain_attention(layer, *one) for one in each]).unflatten(0, (2, 3))
    assert distance(found, wanted) < 2e-6
    inputs = [*layer.parameters(), q, k, v]
    ours, theirs = (torch.autograd.grad((x @ weights).sin().sum(), inputs) for x in (found, wanted))
    scale = max(float(gradient.abs().max()) for gradient in theirs[:8])
    for mine, gradient in zip(ours, theirs, strict=True):
        assert (mine - gradient).abs().max() < 1e-4 * scale


def test_shared_tokens_are_as_if_each_prompt_had_its_own():
    torch.manual_seed(1)
    layer = Attention(256, 128)
    tokens, image, value = given_tokens(7, 40)
    image, value = image[:, :1], value[:, :1]
    own = [x.expand(-1, 3, -1, -1) for x in (image, value)]
    assert distance(layer(tokens, image, value), layer(tokens, *own)) < 2e-6
    assert distance(layer(image, tokens, tokens), layer(own[0], tokens, tokens)) < 2e-6
    # without the dimension of images, as segment-anything's transformer calls it
    assert distance(layer(tokens[0], image[0], value[0]), layer(tokens, image, value)[0]) < 2e-6


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_in_low_precision_scores_are_not_rounded(kind):
    """Fused attention keeps them in fp32."""
    torch.manual_seed(1)
    layer = Attention(256, 128)
    layer._in_full_width = None  # nobody calls it
    tokens, image, value = given_tokens(7, 40)
    dtype = torch.float32 if kind == "autocast" else torch.bfloat16
    layer.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        assert layer(tokens.to(dtype), image.to(dtype), value.to(dtype)).dtype == torch.bfloat16
