"""What a run starts from and what it leaves: provenance by content, weights before its end."""

import json
import os
import shutil

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from finetune.train import main as finetune
from sami.core.checkpoint import write_weights
from sami.encoder import export_header, load_encoder
from sami.encoders.protocol import EncoderShape
from sami.encoders.sam import SamEncoder, sam_shape
from sami.encoders.vit import Vit
from sami.pretrain import main as pretrain
from tests.runs import arguments, summary, write_shards
from tools.cache_teacher import main as cache

SHAPE = EncoderShape.stage_one(32, 2, 2, 16, 64)


def write_encoder(folder, seed):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    encoder = Vit(SHAPE)
    write_weights(folder / "encoder.safetensors", encoder.state_dict(), export_header(encoder))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def begun(shards, tmp_path, in_process):
    """A run from an encoder, cut off before its end was noted; and how it is called again."""

    def again(**more):
        options = {"encoder.checkpoint": tmp_path / "a", "train.steps": 2, **more}
        return in_process(pretrain, arguments(tmp_path / "run", shards, **options))

    write_encoder(tmp_path / "a", 1)
    assert again() == (0, "")
    (tmp_path / "run" / "summary.json").unlink()
    return tmp_path, again


def checkpoint_of(run, group="encoder"):
    return yaml.safe_load((run / "config.yaml").read_text())[group]["checkpoint"]


def test_a_start_may_move(begun):
    folder, again = begun
    shutil.copytree(folder / "a", folder / "moved")
    code, error = again(**{"encoder.checkpoint": folder / "moved" / "encoder.safetensors"})
    assert code == 0, error
    told = summary(folder / "run")["started_from"]["encoder.checkpoint"]
    assert told["path"] == str(folder / "moved" / "encoder.safetensors") and told["step"] is None
    assert len(told["sha256"]) == 64
    assert checkpoint_of(folder / "run") == told["path"]


def test_a_start_may_not_change(begun):
    folder, again = begun
    before = (folder / "run" / "config.yaml").read_bytes()
    write_encoder(folder / "b", 2)
    for path in (folder / "b", "null"):
        code, error = again(**{"encoder.checkpoint": path})
        assert code == 2 and f"encoder.checkpoint {folder}/a (sha256 " in error, error
        assert f"give --encoder.checkpoint {folder}/a" in error and error.count("\n") == 1
        assert f"now it is {path} (" in error
    write_encoder(folder / "a", 3)  # the same path, another content
    assert again()[0] == 2
    assert (folder / "run" / "config.yaml").read_bytes() == before


def test_a_start_that_has_gone_is_not_missed(begun, capsys):
    folder, again = begun
    shutil.rmtree(folder / "a")
    for path in (folder / "a", folder / "never"):
        assert again(**{"encoder.checkpoint": path}) == (0, "")
        told = summary(folder / "run")["started_from"]["encoder.checkpoint"]
        assert told["path"] == str(folder / "a") == checkpoint_of(folder / "run")
        assert len(told["sha256"]) == 64
        (folder / "run" / "summary.json").unlink()
    log = (folder / "run" / "log.txt").read_text()
    assert f"encoder.checkpoint {folder}/never does not exist: this run goes on without it" in log


def test_a_run_from_random_weights_has_no_start(begun, shards, in_process):
    folder, _ = begun
    words = {"train.steps": 2}
    assert in_process(pretrain, arguments(folder / "r", shards, **words))[0] == 0
    assert summary(folder / "r")["started_from"]["teacher.checkpoint"]["path"] == "random"
    (folder / "r" / "summary.json").unlink()
    words["encoder.checkpoint"] = folder / "a"
    code, error = in_process(pretrain, arguments(folder / "r", shards, **words))
    assert code == 2 and "was begun with encoder.checkpoint null (random weights)" in error


def test_other_samples_and_another_teacher_are_told_in_words(begun, tmp_path):
    folder, again = begun
    others = write_shards(tmp_path / "others", seed=5)
    code, error = again(**{"data.shards": others})
    assert code == 2 and "data.shards hold other samples than those this run was begun" in error
    assert "39 images in 3 shards, fingerprint" in error and "facts." not in error


def test_weights_before_the_end(shards, tmp_path, in_process):
    options = {"train.steps": 6, "run.save_every": 2, "run.keep": 9, "optim.ema": 0.5}
    run = tmp_path / "run"
    assert in_process(pretrain, arguments(run, shards, **options)) == (0, "")
    whole = (run / "encoder.safetensors").read_bytes()
    assert (run / "checkpoints/step-6/encoder.safetensors").read_bytes() == whole
    for step in (2, 4):
        place = run / "checkpoints" / f"step-{step}"
        with safe_open(place / "encoder.safetensors", "pt") as file:
            told = json.loads(file.metadata()["encoder"])
        assert told["weights"] == "ema" and told["training"]["steps"] == step
        state = torch.load(place / "state.pt", weights_only=True)
        stored, loaded = load_file(place / "encoder.safetensors"), load_encoder(place).state_dict()
        for name, tensor in stored.items():
            average = state["ema"].get(f"encoder.{name}", state["model"][f"encoder.{name}"])
            assert torch.equal(tensor, average) and torch.equal(tensor, loaded[name]), name
        assert not torch.equal(stored["cls_token"], state["model"]["encoder.cls_token"])
    (run / "encoder.safetensors").unlink()
    said = []
    assert torch.equal(
        load_encoder(run, say=said.append).cls_token,
        load_file(run / "checkpoints/step-6/encoder.safetensors")["cls_token"],
    )
    assert said == [f"{run} has not ended: the weights of its step 6 are taken"]


def test_another_entrys_folder_is_left_alone(begun, shards, in_process):
    """With checkpoints and without."""
    folder, again = begun
    assert again() == (0, "")
    for _ in range(2):
        before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
        words = [f"--run.dir={folder}/run", f"--data.shards={shards}", "--encoder.name=custom"]
        code, error = in_process(finetune, words)
        assert code == 2 and error.count("\n") == 1
        assert "holds a run of sami/pretrain.py, and this is finetune/train.py" in error
        assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")} == before
        shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)


@pytest.mark.parametrize(
    ("spoilt", "value"),
    [
        ("data.shards", "nowhere/*.tar"),
        ("teacher.checkpoint", "nowhere.pth"),
        ("encoder.checkpoint", "nowhere"),
        ("train.batch_size", 5000),
    ],
)
def test_a_start_that_fails_leaves_no_run(shards, tmp_path, in_process, spoilt, value):
    for there in ((), ("notes.txt",)):
        run = tmp_path / f"run{len(there)}"
        for name in there:
            run.mkdir()
            (run / name).write_text("mine")
        code, error = in_process(pretrain, arguments(run, shards, **{spoilt: value}))
        assert code == 2, error
        assert {path.name for path in run.iterdir()} == {"summary.json", *there}
        told = summary(run)
        assert (told["status"], told["exit_code"]) == ("failed", 2) and told["error"] in error
        # nothing stands in the way of the next start, of whatever entry
        assert in_process(finetune, [f"--run.dir={run}", "--data.shards=x"])[0] == 2
    code, error = in_process(pretrain, arguments(run, shards, **{"train.steps": 1}))
    assert code == 0, error


def test_a_run_of_an_earlier_version_goes_on(begun):
    """It recorded no content: the path has to be the same."""
    folder, again = begun
    meta = folder / "run" / "checkpoints" / "step-2" / "meta.json"
    told = json.loads(meta.read_text())
    del told["entry"], told["facts"]["started_from"]
    meta.write_text(json.dumps(told))
    write_encoder(folder / "b", 1)
    code, error = again(**{"encoder.checkpoint": folder / "b"})
    assert code == 2 and f"was begun with encoder.checkpoint {folder}/a, and now it" in error
    assert again() == (0, "")


def test_a_teacher_may_move_and_not_change(shards, tmp_path, in_process):
    torch.manual_seed(0)
    for name in ("t.pth", "other.pth"):
        encoder = SamEncoder(sam_shape(32, 1, 4))
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        state = {f"image_encoder.{n}": t for n, t in encoder.state_dict().items()}
        torch.save(state, tmp_path / name)

    def again(path):
        options = {"train.steps": 1, "teacher.checkpoint": path}
        return in_process(pretrain, arguments(tmp_path / "run", shards, **options))

    assert again(tmp_path / "t.pth") == (0, "")
    (tmp_path / "run" / "summary.json").unlink()
    code, error = again(tmp_path / "other.pth")
    assert code == 2 and "t.pth (sha256 " in error and "other.pth (sha256 " in error
    assert again("random")[0] == 2
    (tmp_path / "t.pth").rename(tmp_path / "moved.pth")
    assert again(tmp_path / "moved.pth") == (0, "")
    assert checkpoint_of(tmp_path / "run", "teacher") == str(tmp_path / "moved.pth")
    told = summary(tmp_path / "run")
    assert told["started_from"]["teacher.checkpoint"]["sha256"] == told["teacher"]["sha256"]


def test_all_files_of_a_run_follow_the_umask(shards, tmp_path, in_process):
    before = os.umask(0o027)
    try:
        assert in_process(pretrain, arguments(tmp_path / "r", shards, **{"train.steps": 1}))[0] == 0
        words = ["--out", str(tmp_path / "c"), "--teacher", "custom", "--checkpoint", "random"]
        assert in_process(cache, [shards, *words, "--image-size", "64"])[0] == 0
    finally:
        os.umask(before)
    for folder in ("r", "c"):
        files = [path for path in (tmp_path / folder).rglob("*") if path.is_file()]
        assert len(files) > 4
        for path in files:
            assert path.stat().st_mode & 0o777 == 0o640, path
