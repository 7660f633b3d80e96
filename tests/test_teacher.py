"""The teacher is segment-anything's encoder, whatever the image's size."""

import pytest
import torch
from einops import rearrange
from segment_anything.modeling import ImageEncoderViT, Sam
from torch.nn import functional as F

from sami.core.errors import UserError
from sami.encoder import EncoderConfig, build_encoder
from sami.encoders.sam import OFFICIAL, SAM_SHAPES, SamEncoder, sam_shape
from sami.model import CrossDecoderConfig, MaskedReconstruction, TokenLossConfig
from sami.targets import to_grid
from sami.teacher import Teacher, TeacherConfig, describe_teacher, load_teacher


def random_encoder(width, heads, depth=2, global_blocks=(1,)):
    """Every tensor random: segment-anything leaves all positions at zero."""
    encoder = SamEncoder(sam_shape(width, depth, heads), global_blocks).eval()
    torch.manual_seed(3)
    for name, parameter in encoder.named_parameters():
        if "pos" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    return encoder


def oracle_at(encoder, size):
    """segment-anything's own module, its absolute positions replaced by the resized ones."""
    stored = encoder.pos_embed
    resized = F.interpolate(
        stored.detach().permute(0, 3, 1, 2), (size // 16, size // 16), mode="bicubic"
    ).permute(0, 2, 3, 1)

    @torch.no_grad()
    def run(images):
        encoder.pos_embed = torch.nn.Parameter(resized, requires_grad=False)
        try:
            return ImageEncoderViT.forward(encoder, images)
        finally:
            encoder.pos_embed = stored

    return run


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "heads", "size"),
    [*((SAM_SHAPES[name][0], SAM_SHAPES[name][2], 224) for name in OFFICIAL), (96, 3, 1024)],
)
def test_equal_to_segment_anything(width, heads, size):
    """At each teacher's width; and, narrow, at SAM's own size, in which windows are padded."""
    encoder = random_encoder(width, heads)
    images = torch.randn(1, 3, size, size)
    assert relative(Teacher(encoder).features(images), oracle_at(encoder, size)(images)) <= 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("size", [224, 400])
def test_flex_attention_is_the_same_function(size):
    encoder = random_encoder(96, 3, depth=3, global_blocks=(0, 2))
    images = torch.randn(2, 3, size, size)
    expected = Teacher(encoder).features(images)
    encoder.flex = True
    assert relative(Teacher(encoder).features(images), expected) <= 1e-5


def test_at_448_and_several_blocks():
    encoder = random_encoder(96, 3, depth=5, global_blocks=(1, 3))
    images = torch.randn(2, 3, 448, 448)
    teacher = Teacher(encoder)
    assert relative(teacher.features(images), oracle_at(encoder, 448)(images)) <= 1e-4
    other = torch.randn(2, 3, 224, 224)  # the tables are kept per size
    assert relative(teacher.features(other), oracle_at(encoder, 224)(other)) <= 1e-4
    assert relative(teacher.features(images), oracle_at(encoder, 448)(images)) <= 1e-4


@torch.no_grad()
def test_positions_and_windows_matter():
    """The oracle would notice a teacher without them."""
    encoder = random_encoder(96, 3)
    images = torch.randn(1, 3, 448, 448)
    whole = oracle_at(encoder, 448)(images)
    for name in ("pos_embed", "blocks.0.attn.rel_pos_h", "blocks.1.attn.rel_pos_w"):
        stored = encoder.get_parameter(name).clone()
        encoder.get_parameter(name).zero_()
        assert relative(oracle_at(encoder, 448)(images), whole) > 1e-2
        encoder.get_parameter(name).copy_(stored)
    encoder.blocks[0].window_size = 28
    with pytest.raises(AssertionError):
        assert relative(Teacher(encoder).features(images), whole) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("shape", [(224, 150), (97, 224), (224, 224)])
def test_sams_own_preprocessing_and_padding(shape):
    encoder = random_encoder(96, 3)
    encoder.img_size = 224
    sam = Sam(encoder, torch.nn.Identity(), torch.nn.Identity())
    sam.pixel_mean = torch.tensor([123.675, 116.28, 103.53]).view(-1, 1, 1)
    sam.pixel_std = torch.tensor([58.395, 57.12, 57.375]).view(-1, 1, 1)
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    expected = oracle_at(encoder, 224)(sam.preprocess(image.float())[None])
    teacher = Teacher(encoder, image_size=224)
    assert relative(teacher(image[None]), expected) <= 1e-4
    assert relative(teacher(image[None].float() / 255), expected) <= 1e-4
    with pytest.raises(ValueError, match="larger than teacher.image_size"):
        Teacher(encoder, image_size=64)(image[None])


@torch.no_grad()
def test_trunk_is_what_enters_the_neck():
    encoder = random_encoder(96, 3)
    seen = []
    encoder.neck.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    images = torch.randn(1, 3, 224, 224)
    oracle_at(encoder, 224)(images)
    assert relative(Teacher(encoder, "trunk").features(images), seen[0]) <= 1e-4


def test_area_pooling():
    features = torch.randn(2, 5, 28, 28)
    expected = rearrange(features, "b c (h i) (w j) -> b (h w) c (i j)", i=2, j=2).mean(-1)
    torch.testing.assert_close(to_grid(features, 14, "area"), expected)
    features = torch.randn(1, 3, 64, 64)
    pooled = to_grid(features, 14, "area").view(14, 14, 3)
    for y, x in ((0, 0), (3, 7), (13, 13), (6, 1)):  # windows from floor to ceil, as documented
        rows = slice(y * 64 // 14, -(-(y + 1) * 64 // 14))
        columns = slice(x * 64 // 14, -(-(x + 1) * 64 // 14))
        torch.testing.assert_close(pooled[y, x], features[0, :, rows, columns].mean((1, 2)))
    same = torch.randn(1, 3, 14, 14)
    for pool in ("area", "bilinear"):
        assert torch.equal(to_grid(same, 14, pool), same.flatten(2).transpose(1, 2))


def test_frozen_and_outside_of_what_is_trained():
    config = TeacherConfig("custom", "random", 64)
    teacher = load_teacher(config)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    teacher.train()
    assert not teacher.training and not teacher.encoder.training
    features = teacher(torch.rand(1, 3, 64, 64, requires_grad=True))
    assert features.shape == (1, 256, 4, 4) and not features.requires_grad
    again = load_teacher(config)
    assert describe_teacher(config, teacher) == describe_teacher(config, again)
    encoder = build_encoder(EncoderConfig("custom"), 64)
    trained = MaskedReconstruction(encoder, CrossDecoderConfig(), TokenLossConfig(), 256, 0.75)
    assert not any("teacher" in name for name in trained.state_dict())


def test_a_random_teacher_leaves_the_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_teacher(TeacherConfig("custom", "random", 64))
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture
def official(tmp_path):
    """A file like SAM's: image_encoder.* beside prompt encoder and decoder."""
    encoder = random_encoder(64, 4, 4, (0, 1, 2, 3))
    state = {f"image_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state["prompt_encoder.weight"] = state["mask_decoder.weight"] = torch.zeros(1)
    path = tmp_path / "sam.pth"
    torch.save(state, path)
    return path, state, encoder


@torch.no_grad()
def test_an_official_checkpoint_loads(official):
    path, _, encoder = official
    config = TeacherConfig("custom", str(path), 64)
    teacher = load_teacher(config)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(teacher.features(images), Teacher(encoder).features(images))
    described = describe_teacher(config, teacher)
    assert described["random"] is False and len(described["sha256"]) == 64


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("image_encoder.blocks.1.attn.rel_pos_h"), "rel_pos_h is missing"),
        (
            lambda s: s.update({"image_encoder.more": torch.zeros(1)}),
            "fit custom: image_encoder.more is not part of it",
        ),
        (
            lambda s: s.update({"image_encoder.pos_embed": torch.zeros(1, 14, 14, 64)}),
            "pos_embed is 1 x 14 x 14 x 64 and should be 1 x 64 x 64 x 64",
        ),
        (lambda s: s.clear(), "holds no tensors by name"),
    ],
)
def test_strict_loading(official, change, says):
    path, state, _ = official
    change(state)
    torch.save(state, path)
    with pytest.raises(UserError, match=says):
        load_teacher(TeacherConfig("custom", str(path), 64))


@pytest.mark.parametrize(
    ("damage", "says"),
    [(b"text", "is a text and no weights"), (b"", "is empty"), ("cut", "is cut short")],
)
def test_damaged_files_name_what_to_fetch(official, damage, says):
    path, _, _ = official
    path.write_bytes(path.read_bytes()[:-5000] if damage == "cut" else damage)
    with pytest.raises(UserError, match=f"{says}.*sam_vit_b_01ec64.pth"):
        load_teacher(TeacherConfig("sam_vit_b", str(path)))


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("path", ["", "nowhere.pth"])
def test_a_missing_file_names_what_to_fetch_and_where_it_goes(name, path):
    with pytest.raises(UserError) as caught:
        load_teacher(TeacherConfig(name, path))
    file = OFFICIAL[name]
    assert f"segment_anything/{file}" in str(caught.value)
    assert f"checkpoints/{file}" in str(caught.value)


def test_the_wrong_size_is_told(official):
    path, _, _ = official
    with pytest.raises(UserError, match="does not fit sam_vit_l.*sam_vit_l_0b3195.pth"):
        load_teacher(TeacherConfig("sam_vit_l", str(path)))
