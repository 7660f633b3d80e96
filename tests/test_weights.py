"""Weights as they travel: every form through every loader, or named for what it is."""

import io
import json
import os
import pickle
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from finetune.classification import AugmentConfig, build_classifier
from finetune.classification import LabelDataConfig as Labels
from finetune.model import MaskDecoderConfig, build_model, load_model, model_header
from finetune.sam import ModelShape, Sam
from sami.core.checkpoint import Export, save_checkpoint, write_weights
from sami.core.errors import MachineError, UserError
from sami.core.weights import Takes, check_weights, entry_of_run, find_weights, read_weights
from sami.encoder import EncoderConfig, build_encoder, load_encoder
from sami.encoder import export_header as export_encoder
from sami.encoders.protocol import EncoderShape
from sami.encoders.vit import Vit
from sami.teacher import TeacherConfig, load_teacher

VIT = EncoderShape(width=64, depth=2, heads=1, image_size=1024, grid=4, channels=32)
SAM = EncoderShape("sam", 32, 4, 2, 16, 1024, 64, 256)
STUDENT = EncoderShape.stage_one(64, 2, 1, 16, 64)
SHAPE = {"width": 64, "depth": 2, "heads": 1}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {
        "vit": Sam(ModelShape(VIT)),
        "sam": Sam(ModelShape(SAM, "sam", "longest", True)),
        "student": Vit(STUDENT),
    }


def renamed(state, change):
    return {change(name): tensor for name, tensor in state.items()}


def half(dtype):
    return lambda s: {n: t.to(dtype) if t.is_floating_point() else t for n, t in s.items()}


def in_the_middle(name):
    first, _, rest = name.partition(".")
    return f"module.{first}._orig_mod.{rest}" if rest else f"module.{first}"


# What is put into the file of the tensors by name.
FORMS = {
    "plain": dict,
    "model": lambda s: {"model": s},
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"state": {}, "lr": 0.1}},
    "model_state": lambda s: {"model_state": s, "loss": torch.tensor(0.5)},
    "nested": lambda s: {"model": {"state_dict": s}},
    "ddp": lambda s: {"model": renamed(s, lambda n: f"module.{n}")},
    "compiled": lambda s: renamed(s, lambda n: f"_orig_mod.{n}"),
    "both": lambda s: {"state_dict": renamed(s, lambda n: f"module._orig_mod.{n}")},
    "parts compiled": lambda s: renamed(s, in_the_middle),
    "lightning": lambda s: {"state_dict": renamed(s, lambda n: f"model.{n}"), "hyper": {"a": 1}},
    "parameters": lambda s: {n: torch.nn.Parameter(t) for n, t in s.items()},
    "average": lambda s: {"model": s, "model_ema": {n: t + 1 for n, t in s.items()}},
    "only an average": lambda s: {"ema": s},
    "fp16": half(torch.float16),
    "bf16": half(torch.bfloat16),
}
# What is done with the file.
WAYS = ("torch", "old", "zip", "safetensors", "under another name")


def write(folder, content, way):
    path = folder / "weights.pth"
    if way == "old":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif way == "zip":
        torch.save(content, path)
        path = folder / "weights.pt.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(folder / "weights.pth", "weights/weights.pt")
            archive.writestr("__MACOSX/weights/._weights.pt", b"nothing")
    elif way == "safetensors":
        path = folder / "weights.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        path = path if way == "torch" else folder / "weights.safetensors"
        torch.save(content, path)
    return path


# Each place that opens weights: of which model they are, and what becomes of them.
LOADERS = {
    "load_model": ("vit", lambda path: load_model(path)),
    "load_model of SAM": ("sam", lambda path: load_model(path)),
    "teacher.checkpoint": (
        "sam",
        lambda path: (
            load_teacher(TeacherConfig("custom", str(path), 64, width=32, heads=2)).encoder
        ),
    ),
    "teacher.checkpoint of a ViT": (
        "vit",
        lambda path: load_teacher(TeacherConfig("custom", str(path), 64)).encoder,
    ),
    "encoder.checkpoint": (
        "student",
        lambda path: build_encoder(EncoderConfig("custom", **SHAPE, checkpoint=str(path)), 64),
    ),
    "load_encoder": ("student", lambda path: load_encoder(path)),
    "classify": (
        "student",
        lambda path: build_classifier(
            EncoderConfig("custom", **SHAPE, checkpoint=str(path)),
            Labels(classes=3, image_size=64),
            AugmentConfig(),
        ),
    ),
    "stage 2's encoder.checkpoint": (
        "student",
        lambda path: (
            build_model(
                EncoderConfig("custom", **SHAPE, checkpoint=str(path)),
                MaskDecoderConfig(width=32),
                *(64, "square", False),
            ).image_encoder
        ),
    ),
    "stage 2's encoder.checkpoint, a model": (
        "vit",
        lambda path: (
            build_model(
                EncoderConfig("custom", **SHAPE, checkpoint=str(path)),
                MaskDecoderConfig(width=32),
                *(64, "square", False),
            ).image_encoder
        ),
    ),
    "decoder.checkpoint": (
        "vit",
        lambda path: (
            build_model(
                EncoderConfig("custom", **SHAPE),
                MaskDecoderConfig(checkpoint=str(path), width=32),
                *(64, "square", False),
            ).mask_decoder
        ),
    ),
}
NOT_TAKEN = ("cls_token", "norm.", "head.", "fc_norm.", "neck.")  # of a student, by some


def compare(loaded, whole, form):
    """Every tensor has arrived, in fp32, with its value."""
    ours = loaded.state_dict()
    prefixes = ("", "image_encoder.", "mask_decoder.")
    told = next(
        {n: whole[p + n] for n in ours if p + n in whole}
        for p in prefixes
        if any(p + n in whole for n in ours)
    )
    assert {n for n in ours if n not in told and not n.startswith(NOT_TAKEN)} == set()
    for name, tensor in told.items():
        if name.startswith(("head.", "norm.", "cls_token")) and "fc_norm.weight" in ours:
            continue
        assert ours[name].dtype == torch.float32, name
        expected = (
            half({"fp16": torch.float16, "bf16": torch.bfloat16}[form])({"": tensor})[""].float()
            if form in ("fp16", "bf16")
            else tensor
        )
        assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("form", FORMS)
def test_each_form_for_each_loader(models, tmp_path, loader, form):
    name, load = LOADERS[loader]
    state = {n: t.detach() for n, t in models[name].state_dict().items()}
    compare(load(write(tmp_path, FORMS[form](state), "torch")), state, form)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("way", WAYS[1:])
def test_each_kind_of_file_for_each_loader(models, tmp_path, loader, way):
    name, load = LOADERS[loader]
    state = {n: t.detach() for n, t in models[name].state_dict().items()}
    compare(load(write(tmp_path, state, way)), state, "plain")


def test_a_trained_parameter_stays_one(models, tmp_path):
    state = models["student"].state_dict()
    loaded = load_encoder(write(tmp_path, state, "torch"))
    assert loaded.cls_token.requires_grad and not loaded.pos_embed.requires_grad


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


class Foreign:
    pass


def pointer():
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 10\n"


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return buffer.getvalue()


def packed(*names, data=b"x"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, data)
    return buffer.getvalue()


# What stands in place of the weights, from what they would be, and what is said of it.
SPOILT = {
    "lfs": (lambda whole: pointer(), "is a Git LFS pointer.*git lfs pull"),
    "html": (lambda whole: b"\n<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
    "xml": (lambda whole: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
    "json": (lambda whole: b'{"error": "Repository not found"}', "is JSON"),
    "text": (lambda whole: b"Not found", "is a text"),
    "empty": (lambda whole: b"", "is empty .0 bytes."),
    "zeros": (lambda whole: bytes(len(whole)), "begins with zeros"),
    "first half": (lambda whole: whole[: len(whole) // 2], "is cut short"),
    "without its end": (lambda whole: whole[:-30], "is cut short"),
    "a hole": (lambda w: w[: len(w) // 2] + bytes(9999) + w[len(w) // 2 + 9999 :], "is damaged"),
    "gzip": (lambda whole: b"\x1f\x8b\x08\x00" + bytes(100), "packed by gzip.*gunzip"),
    "tar": (lambda whole: tar(), "is a tar archive"),
    "two in a zip": (lambda whole: packed("a.pt", "b.pt"), "2 files of weights .a.pt, b.pt."),
    "none in a zip": (lambda whole: packed("readme.txt"), "no files of weights .readme.txt."),
    "zip in zip": (lambda w: packed("a.pt", data=packed("b.pt")), "a.pt in it, is a zip archive"),
    "page in zip": (lambda w: packed("a.pt", data=b"<html>"), "a.pt in it, is a web page"),
    "hdf5": (lambda whole: b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "noise": (lambda whole: b"\xfe\xdc\x01" * 200, "no file of weights that is known"),
    "script": (lambda whole: packed("m/data.pkl", "m/code/a.py"), "TorchScript"),
}


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    found = {}
    for name, model in models.items():
        found[name] = write(folder, model.state_dict(), "torch").read_bytes()
    return found


@pytest.mark.parametrize(
    ("loader", "spoilt"),
    [("load_model", spoilt) for spoilt in SPOILT]
    + [(loader, spoilt) for loader in list(LOADERS)[1:] for spoilt in ("lfs", "a hole")],
)
def test_what_is_no_weights_is_named(whole, tmp_path, loader, spoilt):
    name, load = LOADERS[loader]
    make, says = SPOILT[spoilt]
    path = tmp_path / "weights.pth"
    path.write_bytes(make(whole[name]))
    with pytest.raises(UserError, match=says) as caught:
        load(path)
    words = str(caught.value)
    assert str(path) in words and "\n" not in words
    if "checkpoint" in loader:
        option = loader.split(" of ")[0].split(",")[0].removeprefix("stage 2's ")
        assert words.startswith(f"{option} {path}") and f"{option} takes " in words


@pytest.mark.parametrize("length", [640, 15392])
def test_a_header_whose_length_reads_like_another_file(tmp_path, length):
    """The first bytes of 640 are those of a pickle, those of 15392 are " <", as XML begins."""
    save_file({"a": torch.arange(3.0)}, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    own = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + own] + b" " * (length - own)
    (tmp_path / "m.safetensors").write_bytes(
        length.to_bytes(8, "little") + header + data[8 + own :]
    )
    assert header[:1] == b"{" and length.to_bytes(8, "little").startswith((b"\x80\x02", b" <"))
    weights = read_weights(tmp_path / "m.safetensors", Takes(("model",), "a model"))
    assert weights.tensors["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("cut", [3, 12, 200, 3000, -4])
@pytest.mark.parametrize("way", ["old", "safetensors"])
def test_other_files_that_are_cut(models, tmp_path, cut, way):
    path = write(tmp_path, models["vit"].state_dict(), way)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="is cut short|is no file of weights"):
        load_model(path)


@pytest.mark.parametrize("name", ["m.pth.part", "m.pth.crdownload", "m.pth"])
def test_a_download_that_has_not_ended(whole, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(whole["vit"][:5000])
    if name == "m.pth":
        (tmp_path / "m.pth.part").touch()
    with pytest.raises(UserError, match="is a download that has not ended"):
        load_model(path)
    (tmp_path / f"{name}.aria2").touch()  # aria2 begins with the whole length
    path.write_bytes(whole["vit"])
    with pytest.raises(UserError, match="is still being downloaded"):
        load_model(path)


@pytest.mark.parametrize(
    ("loader", "way"),
    [(loader, "torch") for loader in LOADERS] + [("load_model", "old"), ("load_model", "pickle")],
)
def test_pickles_are_never_executed(models, tmp_path, loader, way):
    name, load = LOADERS[loader]
    trap, path = tmp_path / "trap", tmp_path / "weights.pth"
    content = {"model": models[name].state_dict(), "args": Evil(trap)}
    if way == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "torch")
    with pytest.raises(UserError, match="not executed|not read"):
        load(path)
    assert not trap.exists()


def test_a_foreign_class_is_named(models, tmp_path):
    torch.save({"model": models["vit"].state_dict(), "args": Foreign()}, tmp_path / "m.pt")
    with pytest.raises(UserError, match=r"Python objects \(.*Foreign\)"):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"student": {"a": torch.ones(1)}, "teacher": {"a": torch.ones(1)}}, "two sets of weights"),
        ({"a.b": torch.ones(1), "module.a.b": torch.ones(1)}, "holds a.b twice"),
        ([torch.ones(1)], "holds no tensors by name"),
        ({"step": 3}, "holds no tensors by name"),
        ({"model": {"image_encoder.trunk.pos_embed": torch.ones(1)}}, "is SAM 2"),
    ],
)
def test_weights_that_are_not_what_is_wanted(tmp_path, content, says):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(UserError, match=says):
        load_model(tmp_path / "m.pt")


def test_quantised_weights_are_refused(models, tmp_path):
    state = dict(models["vit"].state_dict())
    state["image_encoder.neck.0.weight"] = state["image_encoder.neck.0.weight"].to(torch.int8)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(UserError, match="neck.0.weight is torch.int8, as quantised"):
        load_model(tmp_path / "m.pt")


def test_the_machines_errors_stay_its_own(models, tmp_path, monkeypatch):
    path = write(tmp_path, models["vit"].state_dict(), "torch")

    def refused(self, *args, **more):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "open", refused)
    with pytest.raises(MachineError, match="Permission denied; give this user the right"):
        load_model(path)


def test_heads_that_no_shape_tells_have_to_be_right(models, tmp_path):
    """A ViT with other heads is another function, and every tensor fits."""
    model = models["student"]
    write_weights(tmp_path / "encoder.safetensors", model.state_dict(), export_encoder(model))
    config = EncoderConfig("custom", width=64, depth=2, heads=4, checkpoint=str(tmp_path))
    with pytest.raises(UserError, match="has heads 1, and encoder.heads is 4"):
        build_model(config, MaskDecoderConfig(width=32), 64, "square", False)
    with pytest.raises(UserError, match="1 heads.*asks for.*4 heads"):
        build_encoder(config, 64)


# -- where they lie ---------------------------------------------------------------------------


def a_run(folder, kind, models, steps=(), ended=False, **told):
    """A run folder as an entry leaves it, with a checkpoint at each of the steps."""
    folder.mkdir()
    entry, name, header = {
        "encoder": ("sami/pretrain.py", "student", export_encoder),
        "model": ("finetune/train.py", "vit", model_header),
    }[kind]
    (folder / "config.yaml").write_text("run: {}\n")
    (folder / "summary.json").write_text(json.dumps({"entry": entry, **told}))
    for step in steps:
        tensors = {n: t + step for n, t in models[name].state_dict().items()}
        metadata = header(models[name], weights="last", training={"steps": step})
        export = Export(f"{kind}.safetensors", tensors, metadata)
        save_checkpoint(folder / "checkpoints", step, {"model": {}}, {}, 9, export.write)
    if ended:
        write_weights(
            folder / f"{kind}.safetensors", models[name].state_dict(), header(models[name])
        )
    return folder


def test_a_run_that_has_not_ended(models, tmp_path):
    run = a_run(tmp_path / "run", "model", models, (5, 10))
    said = []
    loaded = load_model(run, say=said.append)
    weight = models["vit"].state_dict()["image_encoder.pos_embed"]
    assert torch.equal(loaded.image_encoder.pos_embed, weight + 10)
    assert said == [f"{run} has not ended: the weights of its step 10 are taken"]
    said.clear()
    for place in (run / "checkpoints" / "step-5", run / "checkpoints" / "step-5/model.safetensors"):
        loaded = load_model(place, say=said.append)
        assert torch.equal(loaded.image_encoder.pos_embed, weight + 5) and said == []
    spoilt = run / "checkpoints" / "step-10" / "model.safetensors"
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    loaded = load_model(run, say=said.append)
    assert torch.equal(loaded.image_encoder.pos_embed, weight + 5)
    assert "step 5 are taken" in said[0] and "step-10 cannot be used" in said[0]
    with pytest.raises(UserError, match="differs from its checksum"):
        load_model(spoilt.parent)
    write_weights(
        run / "model.safetensors", models["vit"].state_dict(), model_header(models["vit"])
    )
    assert torch.equal(load_model(run).image_encoder.pos_embed, weight)


def test_checkpoints_of_earlier_versions(tmp_path, models):
    run = a_run(tmp_path / "run", "model", models)
    save_checkpoint(run / "checkpoints", 5, {"model": {}}, {}, 9)
    with pytest.raises(UserError, match="without whole weights .*no weights of its own, as check"):
        load_model(run)
    with pytest.raises(UserError, match="as checkpoints of earlier versions: the same command"):
        load_model(run / "checkpoints" / "step-5")
    with pytest.raises(UserError, match="step-5, whose weights are taken"):
        load_model(run / "checkpoints" / "step-5" / "state.pt")


MODEL = Takes(("model",), "a model")
ENCODER = Takes(("encoder",), "an encoder")


def test_what_lies_at_a_path_is_told(tmp_path, models):
    """Without loading; the sentences of all options alike."""
    first = a_run(tmp_path / "first", "encoder", models, (5,))
    ended = a_run(tmp_path / "ended", "encoder", models, (), ended=True)
    second = a_run(tmp_path / "second", "model", models, (5,))
    fresh = a_run(tmp_path / "fresh", "encoder", models)
    broken = a_run(tmp_path / "broken", "encoder", models)
    (broken / "summary.json").write_text('{"status": "failed", "entry": "sami/pretrain.py"}')
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "summary.json").write_text('{"status": "failed", "entry": "sami/pretrain.py"}')
    other = tmp_path / "other"
    other.mkdir()
    (other / "sam.pth").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    page = tmp_path / "page.pth"
    page.write_text("<html>")
    for path in (first, ended, first / "checkpoints", first / "checkpoints/step-5", "", None):
        assert check_weights(path, ENCODER, "encoder.checkpoint") is None
    makes = "is a run of sami/pretrain.py, which makes an encoder of stage 1"
    for path, takes, says in [
        (first, MODEL, makes),
        (ended, MODEL, makes),
        (second, ENCODER, "is a run of finetune/train.py, which makes a model of stage 2"),
        (first / "checkpoints/step-5", MODEL, "is a checkpoint of sami/pretrain.py"),
        (ended / "encoder.safetensors", MODEL, "is an encoder of stage 1 (of sami/pretrain.py)"),
        (fresh, ENCODER, "is a run that has not saved yet"),
        (broken, ENCODER, "is a run that failed before its first checkpoint: summary.json says"),
        (failed, ENCODER, "is a start that failed"),
        (other, MODEL, f"is a folder; name the file in it, such as {other}/sam.pth"),
        (tmp_path / "nowhere", ENCODER, "does not exist; a.b takes an encoder"),
        (tmp_path / "link", ENCODER, f"does not exist (a link to {tmp_path}/gone)"),
        (page / "more", MODEL, "does not exist"),
        (tmp_path / ("n" * 300), MODEL, "does not exist"),
        (page, MODEL, "is a web page"),
    ]:
        told = check_weights(path, takes, "a.b")
        assert told and told.startswith(f"a.b {path}") and says in told, told
    assert entry_of_run(first) == "sami/pretrain.py" and entry_of_run(failed) is None


def test_runs_of_earlier_versions_are_recognised(tmp_path):
    """They do not tell their entry: their groups do."""
    for group, entry in [("mask", "sami/pretrain.py"), ("prompt", "finetune/train.py")]:
        folder = tmp_path / group
        folder.mkdir()
        (folder / "config.yaml").write_text(f"run:\n  dir: x\n{group}:\n  a: 1\n")
        assert entry_of_run(folder) == entry


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (None, "the path is empty; give the folder of a run of stage 2"),
        ("", "the path is empty; give"),
        (3, "the path is 3, which is no path; give"),
        (b"a", "the path is b'a', which is no path; give"),
        (".", ". is an empty folder; give"),
    ],
)
def test_what_is_no_path_of_a_model(tmp_path, monkeypatch, path, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_model(path)
    assert str(error.value).startswith(says)


def test_an_empty_path_is_none_and_not_here(models, tmp_path, monkeypatch):
    """Path("") is the working directory, and there may be weights in it."""
    monkeypatch.chdir(tmp_path)
    write_weights(tmp_path / "model.safetensors", models["vit"].state_dict(), {})
    write_weights(tmp_path / "encoder.safetensors", models["student"].state_dict(), {})
    with pytest.raises(UserError, match="is empty; a takes a model"):
        find_weights("", MODEL, "a")
    for config in (EncoderConfig("custom", checkpoint=""), MaskDecoderConfig(checkpoint="")):
        config.check()
        assert config.checkpoint is None
    with pytest.raises(UserError, match="teacher.checkpoint is empty"):
        load_teacher(TeacherConfig("custom", "", 64))
    encoder = build_encoder(EncoderConfig("custom", checkpoint=""), 64)
    assert encoder.shape.heads == 2  # its own, and not of the file
    with pytest.raises(UserError, match="is empty"):
        load_model("")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_follow_the_umask(models, tmp_path, umask):
    before = os.umask(umask)
    try:
        run = a_run(tmp_path / "run", "encoder", models, (1,), ended=True)
    finally:
        os.umask(before)
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    assert len(files) == 6
