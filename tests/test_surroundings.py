"""The surroundings of a program: paths, time, text, environment, devices, systems."""

import importlib
import io
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress

import finetune
import sami
from sami.core import exits
from sami.core.checkpoint import write_text
from sami.core.config import load_config
from sami.core.errors import UserError
from sami.core.exits import USER_ERROR, run_entry
from sami.core.paths import exists, expand_path, is_file, local_path
from sami.core.processes import FRAMEWORKS, OVERRULED, choose_device, exact, is_launched
from sami.core.reporting import TimeLeft, duration
from sami.pretrain import PretrainConfig, main
from tests.runs import LIMIT, ROOT, arguments, command, numbers, run, summary, write_shards

# -- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "00:00:00"),
        (59.6, "00:01:00"),
        (3599, "00:59:59"),
        (86399.4, "23:59:59"),
        (86399.6, "1 d 00:00:00"),
        (2 * 86400 + 3 * 3600 + 4 * 60 + 5, "2 d 03:04:05"),
        (400 * 86400, "400 d 00:00:00"),
        (-1, "00:00:00"),
    ],
)
def test_time_left_of_more_than_a_day_is_in_days(seconds, words):
    assert duration(seconds) == words


@given(st.integers(0, 10**9))
def test_a_duration_reads_back(seconds):
    days, _, clock = duration(seconds).rpartition(" d ")
    hours, minutes, rest = map(int, clock.split(":"))
    assert int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest == seconds
    assert hours < 24 and minutes < 60 and rest < 60


def test_a_progress_bar_tells_days_too(monkeypatch):
    with Progress(TimeLeft(), disable=True) as progress:
        number = progress.add_task("", total=10)
        (task,) = progress.tasks
        assert TimeLeft().render(task).plain == "-:--:--"
        monkeypatch.setattr(type(task), "time_remaining", property(lambda task: 90_000.0))
        assert TimeLeft().render(task).plain == "1 d 01:00:00"
        assert number == task.id


# -- paths ----------------------------------------------------------------------------------------


def test_home_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data/x")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.chdir(tmp_path)
    for text, found in {
        "~/a": "/home/me/a",
        "~": "/home/me",
        "$DATA/a-{000..003}.tar": "/data/x/a-{000..003}.tar",
        "${DATA}/*.tar": "/data/x/*.tar",
        "$EMPTY/a": "/a",
        "a~b": "a~b",
        "100$": "100$",
        "random": "random",
        "": "",
        "pipe:cat $NOPE | gzip -d": "pipe:cat $NOPE | gzip -d",
        "https://x/$DATA/a.tar": "https://x//data/x/a.tar",
        "https://x/a$NOPE.tar": "https://x/a$NOPE.tar",
    }.items():
        assert expand_path(text) == found
    for text in ("$NOPE/a", "${NOPE}/a", "a/$NOPE"):
        with pytest.raises(UserError, match="data.shards .*: the environment variable NOPE is"):
            expand_path(text, "data.shards")
    for name in ("$NOPE", "~", "~x", "${DATA}"):
        Path(name).touch()
        assert expand_path(name) == name  # it exists
    assert local_path("$DATA/x") == Path("/data/x/x")
    assert not exists("nope") and not is_file(tmp_path) and is_file("~") and not exists("\0")


def test_every_path_of_a_configuration(monkeypatch, tmp_path):
    """In the file and on the command line, in lists and in the keys of weights."""
    from finetune.classification import LabelDataConfig as Labelled
    from finetune.distill import DistillConfig
    from finetune.train import FinetuneConfig

    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("D", "/d")
    monkeypatch.setenv("HERE", str(tmp_path))
    file = tmp_path / "c.yaml"
    file.write_text("data: {shards: {$D/a.tar: 1, ~/b.tar: 2}}\nrun: {dir: ~/run}\n")
    config = load_config(
        PretrainConfig,
        [
            "--config=$HERE/c.yaml",
            "--teacher.checkpoint",
            "~/sam.pth",
            "--data.val_shards=$D/v.tar",
        ],
    )
    assert config.run.dir == "/home/me/run"
    assert config.data.shards == {"/d/a.tar": 1, "/home/me/b.tar": 2}
    assert config.data.val_shards == "/d/v.tar"
    assert config.teacher.checkpoint == "/home/me/sam.pth"
    config = load_config(
        FinetuneConfig,
        [
            "--data.shards=[$D/1.tar, ~/2.tar]",
            "--encoder.checkpoint=~/e",
            "--decoder.checkpoint=$D/m.pt",
        ],
    )
    assert config.data.shards == ["/d/1.tar", "/home/me/2.tar"]
    assert config.encoder.checkpoint == "/home/me/e" and config.decoder.checkpoint == "/d/m.pt"
    with pytest.raises(UserError, match="run.dir .*NOPE is not set"):
        load_config(PretrainConfig, ["--run.dir=$NOPE/run"])
    from dataclasses import fields

    for group in (*fields(PretrainConfig), *fields(FinetuneConfig), *fields(DistillConfig)):
        for item in fields(group.default_factory()):
            named = item.name in ("dir", "shards", "val_shards", "checkpoint", "cache_dir")
            assert named == bool(item.metadata.get("path")), f"{group.name}.{item.name}"
    paths = {"shards", "val_shards", "cache_dir"}
    assert {f.name for f in fields(Labelled) if f.metadata} == paths


def test_print_config_tells_the_expanded_paths(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(SystemExit) as left:
        load_config(PretrainConfig, ["--run.dir", "~/run", "--print_config"])
    assert left.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["run"]["dir"] == "/home/me/run"


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_the_paths_of_the_tools_are_expanded(tool):
    text = tool.read_text(encoding="utf-8")
    assert "type=Path" not in text
    for option in ("shards", "--shards", "--val-shards", "--checkpoint", "patterns"):
        at = text.find(f'add_argument("{option}"')
        words = text[at : at + 90]
        assert at < 0 or "type=path_pattern" in words or "type=int" in words, option


# -- text -----------------------------------------------------------------------------------------


def test_text_is_utf8_and_names_survive(tmp_path):
    name = "é·" + os.fsdecode(b"caf\xe9")
    write_text(tmp_path / "a.txt", name)
    assert (tmp_path / "a.txt").read_bytes() == "é·caf".encode() + b"\xe9"
    write_text(tmp_path / "a.json", json.dumps({"dir": name}))
    assert json.loads((tmp_path / "a.json").read_bytes())["dir"] == name


def test_a_terminal_that_cannot_show_it(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True)
    )
    assert run_entry(lambda: print("a · – ² \udce9 é") or 0) == 0
    assert shown.getvalue() == b"a ? ? ? ? ?\n"


def test_a_run_in_a_locale_without_unicode(tmp_path):
    """Paths, the configuration, what is said and what is written, with a name that is not UTF-8."""
    folder = tmp_path / "données" / os.fsdecode(b"caf\xe9")
    shards = write_shards(folder / "d", (9,))
    config = tmp_path / "é.yaml"
    config.write_text(f"data: {{val_shards: '{tmp_path}/données/*/d/*.tar'}}  # é\n", "utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    words = arguments(folder / "run", shards, **{"train.steps": 1, "eval.samples": 4})
    words.append("--data.allow_val_in_train=true")
    for _ in range(2):
        done = subprocess.run(
            command([*words, "--config", str(config)]),
            capture_output=True,
            env=environment,
            cwd=ROOT,
            timeout=LIMIT,
        )
        assert done.returncode == 0, done.stderr.decode()
    told = summary(folder / "run")
    assert told["status"] == "finished" and told["evaluation"]["pictures"] == 4
    assert b"is finished" in done.stdout and b"resuming" not in done.stdout
    stored = yaml.safe_load((folder / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert os.fsencode(stored["run"]["dir"]) == os.fsencode(folder / "run")


@pytest.mark.parametrize("folder", ["sami", "finetune", "tools"])
def test_no_file_is_opened_in_the_encoding_of_the_locale(folder):
    words = ["ruff", "check", "--preview", "--select", "PLW1514", "--isolated", str(ROOT / folder)]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# -- environment ----------------------------------------------------------------------------------

COMPLETE = {
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
}


@pytest.mark.parametrize(
    ("left", "named"),
    [
        (COMPLETE, "WORLD_SIZE=2"),
        (COMPLETE | {"RANK": "1"}, "RANK=1"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE=4"),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=3"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "TORCHELASTIC_RUN_ID"),
        (
            COMPLETE | {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            "no launcher answers at MASTER_ADDR 127.0.0.1, MASTER_PORT 29511",
        ),
    ],
)
def test_what_another_program_left_is_refused(monkeypatch, tmp_path, in_process, left, named):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    shards = write_shards(tmp_path / "data", (9,))
    code, said = in_process(main, arguments(tmp_path / "run", shards, **{"train.steps": 1}))
    assert code == USER_ERROR and named in said and "unset" in said and "accelerate launch" in said
    assert len(said.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "left",
    [
        {name: value for name, value in COMPLETE.items() if name != "WORLD_SIZE"},
        COMPLETE | {"WORLD_SIZE": "1"},
        {"MASTER_ADDR": "gone.example"},
        {"LOCAL_RANK": "0"},
        {"PMI_SIZE": "1", "PMI_RANK": "0", "LOCAL_RANK": "-1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "3"},
    ],
)
def test_what_says_that_it_is_alone_does_not_matter(monkeypatch, tmp_path, in_process, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    shards = write_shards(tmp_path / "data", (9,))
    code, said = in_process(main, arguments(tmp_path / "run", shards, **{"train.steps": 1}))
    assert (code, said) == (0, "")
    assert summary(tmp_path / "run")["hardware"]["processes"] == 1


def test_the_cache_is_not_made_in_part(monkeypatch, tmp_path, in_process):
    """A WORLD_SIZE of another program would leave half of the shards out."""
    from tools.cache_teacher import main as cache_teacher

    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = in_process(cache_teacher, ["x.tar", "--out", str(tmp_path / "out")])
    assert code == USER_ERROR and "WORLD_SIZE=2" in said


def test_accelerate_s_variables_change_nothing(monkeypatch, tmp_path, in_process, capsys):
    """The numbers are those of a run without them, and what is passed over is said."""
    shards = write_shards(tmp_path / "data", (13, 9))
    words = {"train.steps": 6, "train.micro_batch_size": 4}
    assert in_process(main, arguments(tmp_path / "plain", shards, **words))[0] == 0
    capsys.readouterr()
    given = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_TORCH_DEVICE": "meta",
        "ACCELERATE_USE_CPU": "yes",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    code, said = in_process(main, arguments(tmp_path / "given", shards, **words))
    assert (code, said) == (0, "")
    assert numbers(tmp_path / "plain") == numbers(tmp_path / "given")
    log = (tmp_path / "given" / "log.txt").read_text(encoding="utf-8")
    for name in given:
        if name not in ("ACCELERATE_DYNAMO_MODE", "ACCELERATE_USE_CPU"):
            assert f"{name}={given[name]} in the environment is passed over in favour" in log
            assert f"in favour of {OVERRULED[name]}" in log
    assert "passed over" not in (tmp_path / "plain" / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_another_framework_is_refused(monkeypatch, tmp_path, in_process, name):
    monkeypatch.setenv(name, "true")
    shards = write_shards(tmp_path / "data", (9,))
    code, said = in_process(main, arguments(tmp_path / "run", shards))
    assert code == USER_ERROR and name in said and FRAMEWORKS[name] in said
    assert "configs/accelerate/gpu" in said


def test_a_shell_is_no_launcher(monkeypatch):
    """With it taken for one, a run would end with the shell that started it."""
    assert not is_launched()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert not is_launched()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert is_launched()


# -- devices and systems --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", ["gpu", "GPU", "0", "cuda:", "cuda:x", "cpu:0", "xpu", "meta", ""]
)
def test_what_is_no_device(words):
    with pytest.raises(UserError) as caught:
        choose_device(words, "run.device")
    assert str(caught.value) == (
        f"run.device {words} is no device; it is one of auto, cpu, cuda, cuda:1 (or another "
        "number) or mps"
    )


def test_devices_that_are_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for words, remedy in (("cuda", "no GPU is visible"), ("cuda:1", "no GPU"), ("mps", "no Mac")):
        with pytest.raises(UserError, match=f"--device {words}: .*{remedy}"):
            choose_device(words)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("mps") == torch.device("mps")
    with pytest.raises(UserError, match="--device cuda:2: there is cuda:0 to cuda:1"):
        choose_device("cuda:2")
    assert (
        exact(torch.device("mps")) == torch.float32 and exact(torch.device("cpu")) == torch.double
    )


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ("evaluate", ["m.pt", "--shards", "x.tar"]),
        ("probe", ["r", "--shards", "x.tar", "--val-shards", "x.tar"]),
        ("cache_teacher", ["x.tar", "--out", "o"]),
        ("bench", ["stream"]),
    ],
)
def test_a_tool_on_no_device(monkeypatch, tmp_path, capsys, tool, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [tool, *words, "--device", "gpu"])
    assert run_entry(importlib.import_module(f"tools.{tool}").main) == USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith("error: --device gpu is no device; it is one of auto, cpu")
    assert len(said.splitlines()) == 1


def test_modules_import_where_fcntl_is_missing(tmp_path):
    """As on Windows, where the sentence is told instead."""
    modules = [
        module.name
        for package in (sami, finetune)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    modules += [f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py")]
    code = (
        "import importlib, importlib.util, sys\n"
        "sys.modules['fcntl'] = None\n"
        "import signal\n"
        "for name in ('SIGUSR1', 'pthread_sigmask', 'sigwaitinfo'): delattr(signal, name)\n"
        "from sami.core.exits import run_entry\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "print('imported')\n"
    )
    (tmp_path / "imports.py").write_text(code)
    done = run([sys.executable, tmp_path / "imports.py"], PYTHONPATH=str(ROOT))
    assert done.stdout == "imported\n", done.stderr[-2000:]


def test_windows_is_told_at_the_start(monkeypatch, capsys):
    monkeypatch.setattr(exits.importlib.util, "find_spec", lambda name: None)
    assert run_entry(lambda: 0) == USER_ERROR
    assert "native Windows is not supported" in capsys.readouterr().err
