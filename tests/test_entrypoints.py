"""sami/pretrain.py as a user runs it: what it leaves behind, and what it says to bad input."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sami.core.config import load_config
from sami.core.entries import ENTRIES
from sami.encoder import load_encoder
from sami.pretrain import PretrainConfig, main
from tests.runs import (
    ROOT,
    arguments,
    command,
    every_parameter_was_updated,
    numbers,
    run,
    start,
    summary,
    wait_for,
    write_cache,
    write_shards,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def call(in_process):
    """Run the entry in this process; returns exit code and what stood on stderr."""
    return lambda words: in_process(main, words)


@pytest.mark.slow
def test_run_folder(shards, tmp_path, call):
    held_out = write_shards(tmp_path / "val", (7,), seed=1)
    folder = tmp_path / "run"
    options = {
        "data.val_shards": held_out,
        "eval.every": 5,
        "run.picture_every": 6,
        "run.log_every": 4,
    }
    code, _ = call(arguments(folder, shards, **options))
    assert code == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [
        4,
        5,
        8,
        10,
        12,
    ]  # logged, and where it was evaluated
    for line in lines:
        assert {"step", "samples", "loss", "lr", "images_per_second", "data_wait"} <= line.keys()
        assert 0 <= line["data_wait"] <= 1 and line["samples"] == 8 * line["step"]
    assert all("val_r2" in line for line in lines if line["step"] in (5, 10, 12))
    images = sorted(path.name for path in (folder / "pictures").iterdir())
    assert images == ["reconstruction-0000006.png", "reconstruction-0000012.png"]
    told = summary(folder)
    assert told["status"] == "finished" and told["exit_code"] == 0 and told["steps"] == 12
    assert told["loss"] == lines[-1]["loss"] and told["evaluation"]["r2"] == lines[-1]["val_r2"]
    assert told["evaluation"]["pictures"] == 7
    assert told["teacher"]["random"] is True and len(told["teacher"]["sha256"]) == 64
    assert told["versions"]["torch"] and told["hardware"]["processes"] == 1
    assert load_config(PretrainConfig, ["--config", str(folder / "config.yaml")]).train.steps == 12
    encoder = load_encoder(folder)
    assert encoder.shape.width == 32
    with safe_open(folder / "encoder.safetensors", "pt") as file:
        assert all(not key.startswith(("teacher", "decoder", "head")) for key in file.keys())
        header = json.loads(file.metadata()["encoder"])
    assert header["width"] == 32 and header["training"]["teacher"]["random"] is True
    state = torch.load(folder / "checkpoints" / "step-12" / "state.pt", weights_only=True)
    assert not any("teacher" in key for key in state["model"])
    assert "RANDOM" in (folder / "log.txt").read_text()


def test_a_finished_run_is_left_alone(shards, tmp_path, call):
    words = arguments(tmp_path, shards, **{"train.steps": 2})
    assert call(words)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.name != "log.txt"}
    assert call(words)[0] == 0
    assert before == {
        path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.name != "log.txt"
    }


def test_seed_decides_and_repeats(shards, tmp_path, call):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert (
            call(arguments(tmp_path / name, shards, **{"run.seed": seed, "train.steps": 3}))[0] == 0
        )
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b") != numbers(tmp_path / "c")


@pytest.mark.slow
def test_accumulation_gives_the_losses_of_one_large_batch(shards, tmp_path, call):
    """Same samples per step in other pieces: the same curve up to rounding."""
    for name, micro in (("whole", 8), ("pieces", 2)):
        assert call(arguments(tmp_path / name, shards, **{"train.micro_batch_size": micro}))[0] == 0
    for a, b in zip(numbers(tmp_path / "whole"), numbers(tmp_path / "pieces"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "config", sorted(path.name for path in (ROOT / "configs/pretrain").glob("*.yaml"))
)
def test_every_shipped_config_trains(config, shards, tmp_path, call):
    """With data, teacher and sizes of a test, but every switch of the method as shipped."""
    small = arguments(
        tmp_path, shards, **{"train.steps": 2, "train.epochs": "null", "encoder.heads": 2}
    )
    small += [
        "--encoder.depth=2",
        "--teacher.depth=1",
        "--teacher.heads=2",
        "--data.val_shards=",
        "--eval.every=0",
    ]
    if "cached" in config:
        shape = ("--width", "32", "--depth", "1", "--heads", "2")
        small.append(f"--data.shards={write_cache(shards, tmp_path / 'cached', *shape)}")
    code, error = call(["--config", str(ROOT / "configs/pretrain" / config), *small])
    assert code == 0, error
    assert [line["skipped_updates"] for line in numbers(tmp_path)] == [0, 0]
    every_parameter_was_updated(tmp_path, 2)


@pytest.mark.parametrize(
    "switch",
    [
        {"decoder.memory": "visible"},
        {"decoder.kind": "self"},
        {"loss.kind": "cosine"},
        {"loss.tokens": "masked"},
        {"teacher.layer": "trunk"},
        {"teacher.image_size": 128},
        {"teacher.pool": "bilinear", "teacher.image_size": 128},
        {"mask.ratio": 0},
        {"mask.ratio": 0.5},
        {
            "target.kind": "pixels",
            "teacher.name": "none",
            "teacher.width": "null",
            "teacher.depth": "null",
        },
        {"optim.ema": 0.5, "optim.clip": 1.0},
        {"train.precision": "bf16"},
    ],
    ids=lambda switch: " ".join(f"{k}={v}" for k, v in switch.items()),
)
def test_switches(switch, shards, tmp_path, call):
    code, error = call(arguments(tmp_path, shards, **{"train.steps": 2, **switch}))
    assert code == 0, error
    assert all(line["loss"] > 0 and line["skipped_updates"] == 0 for line in numbers(tmp_path))
    if "optim.ema" in switch:
        assert summary(tmp_path)["weights"] == "ema"
        with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
            assert json.loads(file.metadata()["encoder"])["weights"] == "ema"
        state = torch.load(tmp_path / "checkpoints" / "step-2" / "state.pt", weights_only=True)
        exported = load_encoder(tmp_path).state_dict()
        assert torch.equal(exported["norm.weight"], state["ema"]["encoder.norm.weight"])
        assert not torch.equal(exported["norm.weight"], state["model"]["encoder.norm.weight"])


@pytest.mark.slow
def test_it_learns(tmp_path, call):
    """More than the mean: r2 on held-out images rises well above 0, also where it saw nothing."""
    shards = write_shards(tmp_path / "shards", (200,), detail=2)  # what is hidden can be guessed
    held_out = write_shards(tmp_path / "val", (32,), detail=2, seed=1)
    options = {"data.val_shards": held_out, "train.steps": 300, "train.batch_size": 32}
    options |= {"optim.lr": 3e-3, "optim.base_batch": 32, "run.log_every": 50}
    code, error = call(arguments(tmp_path / "run", shards, **options, **{"run.save_every": 300}))
    assert code == 0, error
    told = summary(tmp_path / "run")["evaluation"]
    assert told["r2"] > 0.2 and told["r2_masked"] > 0.15


def test_training_on_nothing_but_nan_stops(shards, tmp_path, call):
    options = {"optim.lr": 1e30, "train.max_bad_steps": 3, "optim.warmup": 0, "train.steps": 40}
    code, error = call(arguments(tmp_path, shards, **options, **{"run.save_every": 1}))
    assert code == 2
    assert "not finite" in error and "optim.lr" in error and "last good checkpoint" in error
    assert summary(tmp_path)["status"] == "failed" and summary(tmp_path)["exit_code"] == 2


BAD_INPUT = {
    "unknown key": (
        ["--optim.lrr=1"],
        "--optim.lrr is not a known option; did you mean --optim.lr?",
    ),
    "wrong type": (["--optim.lr=fast"], "optim.lr must be a finite number, got fast"),
    "wrong choice": (
        ["--decoder.memory=all"],
        "decoder.memory must be one of visible_and_masked, visible",
    ),
    "no shards": (["--data.shards="], "data.shards is empty"),
    "no such shards": (
        ["--data.shards=nowhere/a-{0..3}.tar"],
        "'nowhere/a-{0..3}.tar' matches no file",
    ),
    "no teacher": (
        [
            "--teacher.name=sam_vit_h",
            "--teacher.width=null",
            "--teacher.depth=null",
            "--teacher.checkpoint=none.pth",
        ],
        "sam_vit_h_4b8939.pth",
    ),
    "an empty teacher": (["--teacher.checkpoint="], "teacher.checkpoint is empty"),
    "batch": (
        ["--train.batch_size=9", "--train.micro_batch_size=2"],
        "try --train.batch_size 8 or 10",
    ),
    "too large a batch": (["--train.batch_size=512"], "less than one train.batch_size of 512"),
    "too short an epoch": (
        ["--data.epoch_samples=7"],
        "data.epoch_samples 7 is less than one train.batch_size of 8; raise the former",
    ),
    "mask": (["--mask.ratio=1.0"], "mask.ratio 1.0"),
    "mask leaves nothing": (["--mask.ratio=0.99"], "leaves 0 of 16 patches visible"),
    "size": (
        ["--data.image_size=65"],
        "data.image_size 65 is not divisible by encoder.patch_size 16",
    ),
    "teacher size": (
        ["--teacher.image_size=100"],
        "teacher.image_size 100 must be a positive multiple of 16",
    ),
    "no config": (["--config=nowhere.yaml"], "nowhere.yaml"),
    "no gpu": (["--run.device=cuda"], "no GPU is visible"),
    "abbreviation": (["--optim.l=1"], "--optim.l is not a known option"),
    "encoder": (["--encoder.checkpoint=nowhere"], "nowhere does not exist"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, shards, tmp_path, call):
    if case == "no gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words, expected = BAD_INPUT[case]
    code, error = call([*arguments(tmp_path, shards), *words])
    assert code == 2
    assert expected in error
    assert "Traceback" not in error and error.count("\n") == 1


def test_shards_without_images_or_not_tars(tmp_path, call):
    (tmp_path / "text.tar").write_text("this is no tar")
    code, error = call(arguments(tmp_path / "a", str(tmp_path / "text.tar")))
    assert code == 2 and "text.tar is not a readable tar" in error and error.count("\n") == 1
    pattern = write_shards(tmp_path / "empty", (0,))
    code, error = call(arguments(tmp_path / "b", pattern))
    assert code == 2 and "no image" in error


def test_all_images_corrupt(tmp_path, call):
    pattern = write_shards(tmp_path / "shards", (12,), corrupt=12)
    code, error = call(arguments(tmp_path / "run", pattern))
    assert code == 2 and "unusable" in error
    assert summary(tmp_path / "run")["exit_code"] == 2


def test_corrupt_samples_are_counted_and_named(tmp_path, call):
    pattern = write_shards(tmp_path / "shards", corrupt=3)
    code, _ = call(arguments(tmp_path / "run", pattern))
    assert code == 0
    assert summary(tmp_path / "run")["bad_samples"]["damaged image"] >= 3
    assert "bad sample s-000/p0001: damaged image" in (tmp_path / "run" / "log.txt").read_text()


def test_another_configuration_is_kept_out_of_a_run_folder(shards, tmp_path, call):
    assert call(arguments(tmp_path, shards))[0] == 0
    kept = [path for path in tmp_path.rglob("*.*") if not path.name.startswith("index-")]
    before = {path: path.read_bytes() for path in kept}
    code, error = call(arguments(tmp_path, shards, **{"optim.lr": 1e-3}))
    assert code == 2 and "optim.lr was 0.0024 and is now 0.001" in error
    code, error = call(arguments(tmp_path, write_shards(tmp_path / "other", seed=5)))
    assert code == 2 and "fingerprint" in error
    assert before == {path: path.read_bytes() for path in before}  # nothing written is lost


@pytest.mark.slow
def test_sources_with_weights(tmp_path, call):
    a, b = (write_shards(tmp_path / name, (20,), seed=i) for i, name in enumerate("ab"))
    assert call(arguments(tmp_path / "run", json.dumps({a: 3, b: 1})))[0] == 0
    data = summary(tmp_path / "run")["data"]
    assert data["pictures"] == 26 and data["weights"] == [0.75, 0.25]
    (tmp_path / "b").rename(tmp_path / "c")  # the same shards elsewhere are the same run
    moved = b.replace("/b/", "/c/")
    code, error = call(arguments(tmp_path / "run", json.dumps({a: 1, moved: 1})))
    assert code == 2 and "weights of data.shards were [0.75, 0.25] and are now [0.5, 0.5]" in error
    code, error = call(arguments(tmp_path / "other", json.dumps({a: 1, b: -1})))
    assert code == 2 and "must be positive" in error


def test_two_jobs_in_one_folder(shards, tmp_path):
    words = command(arguments(tmp_path, shards, **{"train.steps": 2000, "run.save_every": 1000}))
    first = start(words)
    try:
        wait_for((tmp_path / "metrics.jsonl").exists, first)
        second = run(words)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert f"is in use by host {os.uname().nodename}, pid {first.pid}" in second.stderr


def test_sentence_and_traceback_on_the_command_line(shards, tmp_path):
    words = command(arguments(tmp_path, "nowhere.tar"))
    done = run(words)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: data.shards: 'nowhere.tar'")
    assert "Traceback" not in done.stderr
    assert "Traceback" in run([*words, "--run.debug=true"]).stderr


def readme_commands() -> list[str]:
    """Lines of the README's shell blocks, continuation lines joined."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")
    ]


def test_the_readme_says_what_works():
    """Every command of the README names files that exist and options that are known."""
    commands = readme_commands()
    assert {"bash tools/demo.sh", "bash tools/test.sh"} <= set(commands)
    entries, known = 0, {}
    for line in commands:
        words = shlex.split(line)
        scripts = [
            word for word in words if re.fullmatch(r"(sami|finetune|tools)/\S+\.(py|sh)", word)
        ]
        for script in scripts:
            assert (ROOT / script).exists(), line
        configs = [word for word in words if word.startswith("configs/")]
        assert all((ROOT / config).exists() for config in configs), line
        for script, entry in ENTRIES.items():
            if script in words:
                load_config(entry.config_class, words[words.index(script) + 1 :])
                entries += 1
                break
        else:
            if not scripts or not scripts[0].endswith(".py"):
                continue
            if scripts[0] not in known:
                text = run([sys.executable, str(ROOT / scripts[0]), "--help"])
                assert text.returncode == 0, text.stderr
                known[scripts[0]] = set(re.findall(r"--[a-z-]+", text.stdout))
            own = words[words.index(scripts[0]) :]
            assert {word for word in own if word.startswith("--")} <= known[scripts[0]], line
    assert entries >= 5


def test_the_demo(tmp_path):
    """The README's first command, with fewer steps."""
    if not (ROOT / ".venv" / "installed").exists():
        pytest.skip("runs where tools/test.sh set up .venv; here it would install one")
    environment = {"RUN": str(tmp_path / "run"), "DATA": str(tmp_path / "data"), "IMAGES": "64"}
    few = ["train.steps=2", "eval.samples=2", "data.image_size=32", "encoder.width=32"]
    few = [f"{stage}.{word}" for stage in ("teacher", "pretrain", "finetune") for word in few]
    words = ["--set", *few, "pretrain.teacher.image_size=32", "pretrain.decoder.width=32"]
    words += ["--seeds", "1", "--settings", "teacher", "SAMI"]  # tests/test_chain.py compares
    done = run(["bash", "tools/demo.sh", *words], **environment)
    assert done.returncode == 0, done.stderr
    for name in ("teacher", "pretrain", "SAMI_seed-0/finetune"):
        assert f"{name}: step 2/2 · loss " in done.stdout
    assert "evaluate_teacher: evaluating 2/2" in done.stdout
    path = re.search(r"the report: (\S+)", done.stdout)
    assert path and Path(path.group(1)).read_text().count("data:image/png") > 3


def test_the_benchmarks_run():
    """Stage 2's, as small as they get; what they measure is not asserted."""
    words = ["stage2", "--device", "cpu", "--rounds", "1", "--step-rounds", "1"]
    words += ["--image-size", "64", "--masks", "2", "--encoder", "vit_ti"]
    done = run([*command([])[:1], str(ROOT / "tools/bench.py"), *words])
    assert done.returncode == 0, done.stderr
    assert "sample: ours is" in done.stdout and "vit_ti, 2 masks" in done.stdout
    done = run([*command([])[:1], str(ROOT / "tools/bench.py"), "stage2", "--rounds", "0"])
    assert done.returncode == 2 and "--rounds 0 must be positive" in done.stderr
