"""What --check looks at, and what is missing before a run, all at once."""

import contextlib
import io
import json
import shlex
import sys

import pytest

from finetune import classify, distill, train
from sami import pretrain
from sami.core.config import needs_of
from tests.runs import ROOT, arguments, run, write_cache, write_shards
from tests.test_entrypoints import readme_commands
from tools.make_toy_shards import write_shard

ENTRIES = {"pretrain": pretrain, "finetune": train, "distill": distill, "classify": classify}


@pytest.fixture
def call(in_process):
    """Run an entry here; its code, what it said and the sentence that it ended with."""

    def called(entry, words):
        said = io.StringIO()

        def main(words):
            with contextlib.redirect_stdout(said):
                return ENTRIES[entry].main(words)

        code, error = in_process(main, words)
        return code, said.getvalue(), error

    return called


@pytest.fixture
def scenes(tmp_path):
    """Two shards of drawn scenes with masks."""
    (tmp_path / "data").mkdir()
    for number in range(2):
        numbers = range(8 * number, 8 * number + 8)
        write_shard(tmp_path / "data", 0, 64, 64, number, numbers)
    return [str(path) for path in sorted((tmp_path / "data").glob("*.tar"))]


def small(entry, folder, shards, **more):
    """Options of the smallest run of an entry."""
    if entry == "pretrain":
        return arguments(folder, shards, **more)
    options = {
        "run.dir": folder,
        "run.device": "cpu",
        "data.shards": shards,
        "data.image_size": 64,
        "encoder.name": "custom",
        "encoder.width": 32,
        "encoder.depth": 1,
        "encoder.heads": 2,
        "train.steps": 2,
        "train.batch_size": 4,
    }
    options |= {"decoder.width": 32} if entry == "finetune" else {"data.classes": 3}
    return [f"--{key}={value}" for key, value in (options | more).items()]


@pytest.mark.parametrize("entry", ["pretrain", "finetune"])
def test_check_looks_at_everything_and_leaves_nothing(entry, scenes, tmp_path, call):
    words = small(entry, tmp_path / "run", json.dumps(scenes[:1]))
    words += ["--data.val_shards", scenes[1]]
    code, said, error = call(entry, [*words, "--check"])
    assert code == 0, error
    lines = said.splitlines()
    assert lines[0] == "the configuration: every field is valid"
    assert any(line.startswith("data.shards: 1 shard(s), 8 images, ") for line in lines)
    assert "data.val_shards: 1 shard(s), 8 images" in lines
    size = 8 if entry == "pretrain" else 4
    assert f"a first batch: {size} images read and decoded" in lines
    assert lines[-1].startswith("not checked: ") and f"{tmp_path / 'run'}" in lines[-1]
    told = (
        "teacher: custom, RANDOM, sha256 " if entry == "pretrain" else "decoder: efficientsam, from"
    )
    assert told in said
    assert not (tmp_path / "run").exists()


def test_check_of_a_run_that_is_there_leaves_it_as_it_is(scenes, tmp_path, call):
    words = arguments(tmp_path / "run", json.dumps(scenes), **{"train.steps": 2})
    assert call("pretrain", words)[0] == 0
    before = {
        path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes())
        for path in (tmp_path / "run").rglob("*")
    }
    assert call("pretrain", [*words, "--check"])[0] == 0
    after = {
        path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes())
        for path in (tmp_path / "run").rglob("*")
    }
    assert before == after


def test_check_refuses_a_folder_that_the_start_refuses(scenes, tmp_path, call):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("prompt: {}\nmodel: {}\n")
    for place, words in (
        ("run", "holds a run of finetune/train.py, and this is sami/pretrain.py"),
        ("run/config.yaml", "is a file"),
    ):
        told = call("pretrain", [*arguments(tmp_path / place, scenes), "--check"])
        assert told[0] == 2 and f"run.dir {tmp_path / place} {words}" in told[-1], told


def test_check_counts_what_is_bad(tmp_path, call):
    shards = write_shards(tmp_path / "shards", (6, 6), corrupt=2)
    words = arguments(tmp_path / "run", shards, **{"data.max_bad_fraction": 1})
    code, said, _ = call("pretrain", [*words, "--check"])
    assert code == 0
    assert "a first batch: 6 images read and decoded; left out: 2 damaged image" in said
    shards = write_shards(tmp_path / "all", (12,), corrupt=12)
    code, _, error = call("pretrain", [*arguments(tmp_path / "run", shards), "--check"])
    assert code == 2 and "none of the first 8 images of data.shards can be used" in error
    shards = write_shards(tmp_path / "bare", (8,))  # no masks in them, and no labels
    for entry in ("finetune", "classify"):
        code, _, error = call(entry, [*small(entry, tmp_path / "run", shards), "--check"])
        assert code == 2 and "data.shards" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_check_reads_a_cache_without_its_checksums(tmp_path, call):
    shape = ("--width", "32", "--depth", "1", "--heads", "2")
    shards = write_cache(write_shards(tmp_path / "s", (9,)), tmp_path / "cache", *shape)
    words = arguments(tmp_path / "run", shards, **{"teacher.cached": True, "teacher.heads": 2})
    code, said, error = call("pretrain", [*words, "--check"])
    assert code == 0, error
    assert "a first batch: 8 images" in said and "reading 1 cached" not in said


def test_check_is_done_by_one_process(tmp_path, call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    code, _, error = call("pretrain", [*arguments(tmp_path, "x.tar"), "--check"])
    assert code == 2 and "--check is done by one process" in error


@pytest.mark.parametrize("check", [[], ["--check"]], ids=["start", "check"])
@pytest.mark.parametrize(
    ("entry", "config", "missing"),
    [
        ("pretrain", "sami_ti", {"data.shards", "teacher.checkpoint checkpoints/sam_vit_h"}),
        ("pretrain", "sami_ti_cached", {"data.shards"}),
        ("pretrain", "mae_ti", {"data.shards"}),
        ("finetune", "efficient_sam_ti", {"data.shards", "data.val_shards", "encoder.checkpoint"}),
        (
            "finetune",
            "sam_decoder_ti",
            {
                "data.shards",
                "data.val_shards",
                "encoder.checkpoint runs/sami_ti",
                "decoder.checkpoint checkpoints/sam_vit_h",
            },
        ),
        ("distill", "decoupled_tiny_vit", {"data.shards", "data.val_shards", "decoder.checkpoint"}),
        ("distill", "semi_coupled", {"data.shards", "data.val_shards", "teacher.checkpoint"}),
        ("classify", "sami_ti", {"data.shards", "data.val_shards", "encoder.checkpoint"}),
    ],
)
def test_all_that_is_missing_is_named_at_once(
    entry, config, missing, check, tmp_path, call, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(ROOT / f"configs/{entry}/{config}.yaml"), "--run.device=cpu"]
    code, _, error = call(entry, [*words, f"--run.dir={tmp_path / 'run'}", *check])
    assert code == 2 and error.count("\n") == 1, error
    for name in missing:
        assert name in error
    if len(missing) > 1:
        assert error.startswith(f"error: {len(missing)} inputs are missing: (1) data.shards: ")
        assert f"({len(missing)})" in error
    if "encoder.checkpoint" in " ".join(missing):
        assert "encoder.checkpoint takes the folder of a run of stage 1" in error
    data = {"pretrain": "ImageNet-1K as shards", "finetune": "SA-1B's tars", "distill": "SA-1B's"}
    data["classify"] = data["pretrain"]
    assert f"configs/{entry}/{config}.yaml needs {data[entry]}" in error
    assert error.endswith(" (docs/data.md tells how they are got and made)\n")


def test_what_a_configuration_needs(tmp_path):
    for path in [path for path in ROOT.glob("configs/*/*.yaml") if path.parent.name in ENTRIES]:
        assert needs_of(["--config", str(path)]).startswith(f"{path} needs "), path
    file = tmp_path / "a.yaml"
    file.write_text(
        "# Title.\n# Needs   tars of v1.0, and\n#         more (b.yaml). Else nothing.\nrun: {}\n"
    )
    told = needs_of(["--run.seed=1", f"--config={file}"])
    assert told.startswith(f"{file} needs tars of v1.0, and more (b.yaml) (docs/data.md ")
    file.write_text("run: {}\n")
    assert needs_of([f"--config={file}"]) == needs_of([]) == ""


def test_the_readmes_first_look(tmp_path, call, monkeypatch):
    """Its commands, with fewer images and steps."""
    lines = [line for line in readme_commands() if "data/try" in line or "try.yaml" in line]
    drawing, training = [shlex.split(line) for line in lines[:-1]], shlex.split(lines[-1])
    monkeypatch.chdir(tmp_path)
    for words in drawing:
        assert words[:2] == ["python", "tools/make_toy_shards.py"]
        script = [sys.executable, str(ROOT / words[1]), str(tmp_path / words[2]), *words[3:]]
        done = run([*script, "--images", "32", "--workers", "1"])
        assert done.returncode == 0, done.stderr
    assert len(drawing) == 2 and training[:2] == ["python", "sami/pretrain.py"]
    few = ["--train.steps=2", "--run.save_every=2", "--run.picture_every=2", "--run.device=cpu"]
    code, _, error = call("pretrain", [*training[2:], *few, "--data.workers=0"])
    assert code == 0, error
    assert (tmp_path / "runs/try/encoder.safetensors").exists()
    assert [path.name for path in (tmp_path / "runs/try/pictures").iterdir()] == [
        "reconstruction-0000002.png"
    ]


def test_what_is_not_asked_for_is_not_missed(tmp_path, call):
    """Remote shards are not looked for, nor an encoder that nobody named."""
    words = small("finetune", tmp_path / "run", "pipe:false")
    words += ["--encoder.checkpoint=nowhere", "--data.val_shards=http://nowhere.invalid/a.tar"]
    code, _, error = call("finetune", words)
    assert code == 2 and error.startswith("error: encoder.checkpoint nowhere does not exist")
