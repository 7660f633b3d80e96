"""What people type: understood, or one sentence and exit code 2."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

from finetune.classify import ClassifyConfig
from finetune.distill import DistillConfig
from finetune.train import FinetuneConfig
from sami.core.config import load_config
from sami.core.configfile import read_yaml
from sami.core.entries import ENTRIES, entry_of_groups
from sami.core.errors import UserError
from sami.core.options import Options, join_lists
from sami.pretrain import PretrainConfig
from tests.runs import ROOT

CLASSES = {
    "sami/pretrain.py": PretrainConfig,
    "finetune/train.py": FinetuneConfig,
    "finetune/distill.py": DistillConfig,
    "finetune/classify.py": ClassifyConfig,
}
FOLDERS = {entry.name: script for script, entry in ENTRIES.items()}
FOREIGN = {  # folders of configurations that no entry reads, and what is said of them
    "sweeps": "is a sweep; run it with python tools/sweep.py run",
    "compare": "is a comparison; run it with python tools/compare.py",
    "accelerate": "accelerate launch --config_file",
    "fastsam": "is for ultralytics; run yolo train cfg=",
}
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


@pytest.fixture(params=CLASSES.values(), ids=CLASSES)
def load(request):
    return lambda *words: load_config(request.param, list(words))


def refusal(call, *words):
    with pytest.raises(UserError) as caught:
        call(*words)
    assert "\n" not in str(caught.value) and "<unicode string>" not in str(caught.value)
    return str(caught.value)


# ---- Options


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--optim.lrr 1", "--optim.lrr is not a known option; did you mean --optim.lr?"),
        ("--optim.lr", "--optim.lr needs a value: a finite number"),
        ("--optim.lr --run.dir=x", "--optim.lr needs a value"),
        ("--optim.lr -1", "optim.lr -1.0 must be positive"),
        ("-optim.lr 1", "'-optim.lr' is not an option; did you mean --optim.lr?"),
        ("optim.lr=1", "'optim.lr=1' is not an option; did you mean --optim.lr=1?"),
        ("--optim.lr:1", "did you mean --optim.lr?"),
        ("--optim-lr 1", "did you mean --optim.lr?"),
        ("--Optim.lr 1", "did you mean --optim.lr?"),
        ("--optim.l 1", "did you mean --optim.lr?"),
        ("--lr 1", "did you mean --optim.lr?"),
        ("--optim.lr 1 2", "'2' is not an option; options are written --group.field value"),
        ("--optim.lr=1,5", "optim.lr must be a finite number, got 1,5"),
        ("--optim.lr=null", "optim.lr must be a finite number, got null"),
        ("--optim.lr=nan", "optim.lr must be a finite number, got nan"),
        ("--run.debug", "--run.debug needs a value: true or false"),
        ("--run.debug=1", "run.debug must be true or false, got 1"),
        ("--run.debug=maybe", "run.debug must be true or false, got maybe"),
        ("--run.device=gpux", "run.device gpux is no device"),
        ("--run.dir", "--run.dir needs a value"),
        ("--run.dir=", "run.dir is empty"),
        ("--run x", "run must be a group of keys"),
        ("--run.save_every=1e3", "run.save_every must be an integer, got 1000.0; write 1000"),
        ("--train.steps=None", "train.steps must be an integer or null, got null"),
        ("--data.workers=true", "data.workers must be an integer, got True"),
        ("--optim.betas=0.9,0.95", "got 0.9,0.95; write it as [0.9, 0.95], or as 0.9 0.95"),
        ("--optim.betas 0.9", "optim.betas must be a list of 2 numbers, got 0.9"),
        ("--optim.betas", "--optim.betas needs a value: a list of 2 numbers"),
        ("--encoder.checkpoint a.pt b.pt", "'b.pt' is not an option"),
        ("--encoder.checkpoint a.pt b.pt", "put a pattern such as 'data/*.tar' in quotes"),
        ("--data.shards", "--data.shards needs a value"),
        ("stray", "'stray' is not an option; options are written --group.field value"),
        ("configs/a.yaml", "did you mean --config configs/a.yaml?"),
        ("--config", "--config needs a YAML file"),
        ("--config=", "--config needs a YAML file"),
        ("--config --optim.lr 1", "--config needs a YAML file"),
        ("--config nowhere.yaml", "--config nowhere.yaml does not exist"),
        ("--config configs", "--config configs is a folder; name a YAML file"),
        ("--help=1", "--help takes no value"),
        ("--", "'--' is not an option"),
    ],
)
def test_typing_mistakes(load, words, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert says in refusal(load, *words.split())


@pytest.mark.parametrize(
    ("words", "shards", "val_shards"),
    [
        (["--data.shards", "a.tar"], "a.tar", ""),
        (["--data.shards", "a.tar", "b c.tar"], ["a.tar", "b c.tar"], ""),
        (["--data.shards=a.tar", "--data.shards=b.tar"], ["a.tar", "b.tar"], ""),
        (["--data.shards", "a", "b", "--data.val_shards", "c", "d"], ["a", "b"], ["c", "d"]),
        (["--data.shards", "[a,", "b]"], ["a", "b"], ""),
        (["--data.shards", "{a:", "1,", "b:", "3}"], {"a": 1.0, "b": 3.0}, ""),
        (["--data.shards", "s-{0..3}.tar"], "s-{0..3}.tar", ""),
        (["--data.shards", "s-{0..3}.tar", "{t,u}.tar"], ["s-{0..3}.tar", "{t,u}.tar"], ""),
        (["--data.shards", "a", "--run.seed=1", "--data.shards", "b"], "b", ""),
        (["--data.shards", "a", "--data.shards="], "", ""),
        (["--data.val_shards", "a", "b", "--data.val_shards="], "", ""),
    ],
)
def test_several_files_are_a_list(load, words, shards, val_shards):
    """What a shell makes of a pattern without quotes; an option that comes again wins."""
    data = load(*words).data
    assert (data.shards, data.val_shards) == (shards, val_shards)


def test_what_is_meant_is_taken(load):
    config = load("--optim.betas", "0.8", "0.9", "--run.debug", "yes", "--optim.lr", "1e-3")
    assert (config.optim.betas, config.run.debug, config.optim.lr) == ((0.8, 0.9), True, 1e-3)
    assert join_lists(["--x", "a", "b"], ["y"]) == ["--x", "a", "b"]


# ---- Files


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- a\n- b\n", "holds a list and no map of keys"),
        (b"hello", "holds plain text and no map of keys"),
        (b"3", "holds 3 and no map of keys"),
        (b"1: 2\n", "has the key 1, which is no name"),
        (b"optim:\n\tlr: 1\n", "line 2: found character '\\t' that cannot start any token"),
        (b"optim:\n\tlr: 1\n", "indent with spaces, not with tabs"),
        (b"optim:\n  lr: 1\n\tclip: 2\n", "indent with spaces, not with tabs"),
        ("optim: {lr: 3}".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"run: {dir: caf\xe9}", "is no text in UTF-8"),
        (b"PK\x03\x04\xff\xfe", "is no text in UTF-8"),
        (b"\0\0", "cannot be read"),
        (b"optim:\n  lr: 1\n  lr: 2\n", "'lr' stands twice in the map that begins in line 2"),
        (b"optim: {lr: 1}\noptim: {clip: 2}\n", "'optim' stands twice"),
        (b"optim:\n  lr: null\n", "optim.lr must be a finite number, got null"),
        (b"optim: 3\n", "optim must be a group of keys, got 3"),
        (b"optim: [1]\n", "optim must be a group of keys, got [1]"),
        (b"optim:\n lr 3\n", "optim must be a group of keys, got lr 3"),
        (b"optim: {lr: 3\n", "is no YAML (line 2: expected ',' or '}'"),
        (b"optim:\n  lr: 3\n   clip: 4\n", "is no YAML (line 3"),
        (b"optim: {lr: 1}\n---\nrun: {seed: 1}\n", "is no YAML (line 2"),
        (b"optim: !!python/object:os.x {}\n", "is no YAML (line 1"),
        (b"optim: {lr: fast}\n", "optim.lr must be a finite number, got fast"),
        (b"optim: {lrr: 1}\n", "optim.lrr is not a known key; did you mean optim.lr?"),
        (b"lr: 1\n", "lr is not a known key; did you mean optim.lr?"),
    ],
)
def test_odd_files(load, tmp_path, content, says):
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    told = refusal(load, "--config", str(file))
    assert says in told
    assert "optim.lr must be a finite number, got fast" in told or str(file) in told


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfoptim:\n  lr: 3\n",
        b"optim:\r\n  lr: 3\r\n",
        b"optim.lr: 3\n",
        b'{"optim": {"lr": 3}}',
        b"optim:\n  lr: '3'\nrun:\n",
        b"optim:\n  lr: 3e0\n",
        b"%YAML 1.1\n---\noptim: {lr: 3}\n...\n",
    ],
)
def test_files_that_are_fine(load, tmp_path, content):
    (tmp_path / "fine.yaml").write_bytes(content)
    assert load("--config", str(tmp_path / "fine.yaml")).optim.lr == 3


def test_a_file_on_a_base(load, tmp_path):
    """Field by field over what lies beside it, or where --config would look, in any notation."""
    (tmp_path / "low.yaml").write_text("optim: {lr: 3, clip: 0.5}\ntrain.steps: 7\nrun:\n")
    (tmp_path / "base.yaml").write_text("base: low.yaml\noptim.lr: 4\ntrain: {epochs: null}\n")
    file = tmp_path / "fine.yaml"
    file.write_text(f"base: {tmp_path}/base.yaml\noptim:\ntrain: {{steps: null, epochs: 2}}\n")
    config = load("--config", str(file))
    assert (config.optim.lr, config.optim.clip) == (4, 0.5)
    assert (config.train.steps, config.train.epochs) == (None, 2)
    assert load("--optim.lr", "5", "--config", str(file)).optim.lr == 5


def test_a_shipped_base_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("base: configs/pretrain/mae_ti.yaml\nencoder: {name: vit_s}\n")
    with pytest.raises(SystemExit):
        load_config(PretrainConfig, ["--config", "own.yaml", "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["encoder"]["name"], shown["decoder"]["kind"]) == ("vit_s", "self")
    assert shown["optim"]["lr"] == 2.4e-3 and "base" not in shown


@pytest.mark.parametrize(
    ("base", "content", "says"),
    [
        (b"", b"base: base.yaml\n", "fine.yaml: base {}/base.yaml is empty"),
        (b"optim: {lr: 1}", b"base: no.yaml\n", "fine.yaml: base no.yaml does not exist"),
        (b"optim: {lr: 1}", b"base: [base.yaml]\n", "base must be the path of a configuration"),
        (b"base: fine.yaml", b"base: base.yaml\n", "fine.yaml leads back to a file that begins"),
        (b"optim: {lrr: 1}", b"base: base.yaml\n", "{}/base.yaml: optim.lrr is not a known key"),
        (b"optim: {lr: 1}", b"base: base.yaml\noptim: 3\n", "fine.yaml: optim must be a group"),
        (b"optim: {lr: x}", b"base: base.yaml\n", "optim.lr must be a finite number, got x"),
    ],
)
def test_odd_bases(load, tmp_path, base, content, says):
    (tmp_path / "base.yaml").write_bytes(base)
    (tmp_path / "fine.yaml").write_bytes(content)
    assert says.format(tmp_path) in refusal(load, "--config", str(tmp_path / "fine.yaml"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_a_file_that_is_meant_for_something_else(path):
    kind = path.parent.name
    for entry, config_class in CLASSES.items():
        words = ["--config", str(path)]
        if kind in FOREIGN:
            says = FOREIGN[kind]
        elif (own := FOLDERS[kind]) == entry:
            load_config(config_class, words)
            continue
        else:
            says = f"{path} is a configuration of {own}; run python {own} --config {path}"
        assert says in refusal(lambda *w, c=config_class: load_config(c, list(w)), *words)


def test_every_entry_is_known():
    """Files with a loop and a configuration; and what is looked up by name is there."""
    found = {
        f"{folder}/{path.name}"
        for folder in ("sami", "finetune")
        for path in (ROOT / folder).glob("*.py")
        if "run_entry(main)" in path.read_text()
    }
    assert found == set(ENTRIES) == set(CLASSES)
    assert {script: entry.config_class for script, entry in ENTRIES.items()} == CLASSES
    for entry in ENTRIES.values():
        assert entry_of_groups(vars(entry.config_class())) is entry
        assert list((ROOT / "configs" / entry.name).glob("*.yaml"))


def test_a_yaml_file_that_is_none(tmp_path):
    assert "does not exist; see docs/" in refusal(read_yaml, tmp_path / "x", "", "docs/")


# ---- Tools


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_answers_in_one_sentence(tool, monkeypatch):
    """Nothing given, and an option that is none; argparse alone prints a page of usage."""
    module = importlib.import_module(f"tools.{tool}")
    monkeypatch.setattr("sys.argv", [f"tools/{tool}.py", "--frobnicate"])
    told = refusal(module.main)
    known = "--frobnicate is not a known option; python tools/"
    assert told.startswith(known) or f"missing; python tools/{tool}.py --help" in told


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("m", "--shards or --coco is missing; python tools/x.py --help shows how"),
        ("--shards a", "MODEL is missing"),
        ("m --shards", "--shards needs one value or more"),
        ("m --shards a --samples", "--samples needs a value"),
        ("m --shards a --samples many", "--samples must be an integer, got many"),
        ("m --shards a --share x", "--share must be a number, got x"),
        ("m --shards a --precision fp16", "--precision must be one of fp32, bf16, got fp16"),
        ("m --shards a --coco b", "--coco and --shards exclude each other"),
        ("m --shards a --sample 3", "--sample is not a known option; did you mean --samples?"),
        ("m --shards a --val_shards b", "did you mean --val-shards?"),
        ("m more --shards a", "'more' is one word too many; put a pattern such as"),
        ("m --shards a --quick=1", "--quick takes no value"),
    ],
)
def test_the_sentences_of_a_tool(words, says, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tools/x.py"])
    parser = Options(description="")
    parser.add_argument("model")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--shards", nargs="+")
    data.add_argument("--coco")
    parser.add_argument("--val-shards", nargs="+")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--share", type=float)
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--quick", action="store_true")
    told = refusal(lambda *w: parser.parse_args(list(w)), *words.split())
    assert says in told and not re.search(r"usage|argument ", told)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_fits_a_terminal(tool, monkeypatch, capsys):
    """80 columns, with every word of the description; argparse's usage breaks no list."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", [f"tools/{tool}.py", "--help"])
    module = importlib.import_module(f"tools.{tool}")
    with pytest.raises(SystemExit) as left:
        module.main()
    said = capsys.readouterr().out.split("\n\n", 1)[1]
    assert left.value.code == 0 and max(map(len, said.splitlines())) <= 80
    assert " ".join(module.__doc__.split()) in " ".join(said.split())
