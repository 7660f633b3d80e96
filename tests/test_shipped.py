"""The project's own files, in a checkout and in an installed package."""

import shutil
import subprocess
import sys

import pytest
import yaml

from sami.core import shipped
from tests.runs import ROOT


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """As a wheel lays the files out; the working directory is another one."""
    site = tmp_path / "site"
    for name in ("configs", "slurm"):
        shutil.copytree(ROOT / name, site / "sami" / "share" / name)
    (site / "sami" / "pretrain.py").touch()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(shipped, "_PACKAGES", site)
    monkeypatch.setattr(shipped, "IS_CHECKOUT", False)
    return site


def test_in_a_checkout():
    assert shipped.IS_CHECKOUT and shipped.HOME == ROOT
    assert shipped.shipped("configs/pretrain/toy.yaml") == ROOT / "configs/pretrain/toy.yaml"
    assert shipped.short(f"{ROOT}/sami/pretrain.py") == "sami/pretrain.py"


def test_in_an_installed_package(installed, tmp_path):
    toy = "configs/pretrain/toy.yaml"
    assert shipped.shipped("sami/pretrain.py") == installed / "sami/pretrain.py"
    assert shipped.find(toy) == shipped.shipped(toy) == installed / "sami/share" / toy
    assert shipped.short(f"--config={shipped.shipped(toy)}") == f"--config={toy}"
    mine = tmp_path / "work" / toy
    mine.parent.mkdir(parents=True)
    mine.write_text("run: {}\n")
    assert shipped.shipped(toy).samefile(mine) and shipped.find(toy).samefile(mine)
    assert str(shipped.find("nowhere.yaml")) == "nowhere.yaml"


@pytest.mark.parametrize(
    ("entry", "config"),
    [
        ("sami/pretrain.py", "pretrain/toy"),
        ("finetune/train.py", "finetune/toy"),
        ("finetune/distill.py", "distill/toy"),
        ("finetune/classify.py", "classify/sami_ti"),
    ],
)
def test_a_true_command_line_finds_its_config_from_anywhere(entry, config, tmp_path):
    """With a Python of its own, as a user has it; other tests fork theirs (tests/preloaded.py)."""
    words = [sys.executable, str(ROOT / entry), "--config", f"configs/{config}.yaml"]
    done = subprocess.run([*words, "--print_config"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given = yaml.safe_load((ROOT / f"configs/{config}.yaml").read_text())
    assert yaml.safe_load(done.stdout)["run"]["dir"] == given["run"]["dir"]


@pytest.mark.parametrize("name", ["demo.sh", "test.sh", "oldest.sh"])
def test_the_scripts_tell_what_they_are_before_they_install(tmp_path, name):
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "pyproject.toml").touch()
    script = tmp_path / "tools" / name
    for word in ("--help", "-h"):
        done = subprocess.run(["bash", script, word], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == ""
        head = script.read_text().split("\n")[1].removeprefix("# ")
        assert done.stdout.startswith(head) and "#" not in done.stdout
    assert not list(tmp_path.glob(".venv*"))


def test_the_scripts_write_nothing_into_an_installed_package(tmp_path):
    share = tmp_path / "site/sami/share"
    shutil.copytree(ROOT / "tools", share / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("demo.sh", "test.sh"):
        words = ["bash", str(share / "tools" / name)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "", done
        assert done.stderr.startswith("error: ") and "for a checkout" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in share.iterdir()] == ["tools"]
