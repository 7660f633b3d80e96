"""Command line over files over defaults, and one sentence for what is wrong."""

import pytest

from sami.core.config import load_config, to_dict, to_yaml
from sami.core.errors import UserError
from sami.pretrain import PretrainConfig
from tests.runs import ROOT, command, run


def load(*words):
    return load_config(PretrainConfig, list(words))


@pytest.fixture
def files(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("optim: {lr: 1.0e-3, clip: 1.0}\nmask: {ratio: 0.5}\n")
    second.write_text("optim:\n  lr: 2e-3\n")
    return str(first), str(second)


def test_who_wins(files):
    first, second = files
    assert load("--config", first).optim.lr == 1e-3
    for words in (
        ["--config", first, "--optim.lr", "5"],
        ["--optim.lr", "5", "--config", first],
        ["--optim.lr=5", f"--config={first}"],
    ):
        assert load(*words).optim.lr == 5
    both = load("--config", first, "--mask.ratio", "0.6", "--config", second)
    assert (both.optim.lr, both.optim.clip, both.mask.ratio) == (2e-3, 1.0, 0.6)
    assert load().optim.betas == (0.9, 0.95)


def test_the_resolved_config_is_a_config(tmp_path):
    config = load(
        "--data.shards", "[a.tar, 'b-{0..1}.tar']", "--optim.betas=[0.8, 0.9]", "--train.steps=3"
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load("--config", str(tmp_path / "config.yaml")) == config
    assert to_dict(config)["data"]["shards"] == ["a.tar", "b-{0..1}.tar"]


def test_check_alone():
    """Of the values, as a sweep asks for them before the inputs are there."""
    with pytest.raises(UserError, match="mask.ratio 2.0 must be"):
        load("--mask.ratio=2", "--check=values")
    with pytest.raises(SystemExit) as left:
        load("--config", str(ROOT / "configs/pretrain/sami_ti.yaml"), "--check=values")
    assert left.value.code == 0


def test_print_config(tmp_path):
    done = run(command(["--optim.lr", "0.5", "--print_config"]))
    assert done.returncode == 0
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert load("--config", str(tmp_path / "printed.yaml")) == load("--optim.lr", "0.5")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim: {lrr: 1}", "optim.lrr is not a known key; did you mean optim.lr?"),
        ("optim: {lr: fast}", "optim.lr must be a finite number, got fast"),
        ("optimizer: {lr: 1}", "optimizer"),
        ("data: {workers: 1.5}", "data.workers must be an integer, got 1.5"),
        ("train: {compile: 3}", "train.compile must be true or false, got 3"),
        ("train: {steps: many}", "train.steps must be an integer or null, got many"),
        ("decoder: {predict_fraction: 0}", "decoder.predict_fraction 0.0 must be over 0 and at"),
        ("decoder: {predict_fraction: 0.5, kind: self}", "goes with decoder.kind cross"),
        ("decoder: {kind: crosss}", "decoder.kind must be one of cross, self, got crosss"),
        ("optim: {betas: [1, 2, 3]}", "optim.betas must be a list of 2 numbers, got [1, 2, 3]"),
        ("optim: [", "line 1: expected the node content"),
        ("just text", ""),
    ],
)
def test_bad_files(tmp_path, text, says):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load("--config", str(file))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optim.warmup=1.5"], "optim.warmup 1.5 is a share of the steps"),
        (["--optim.betas=[0.9, 1.0]"], "optim.betas"),
        (["--optim.lr=0"], "optim.lr 0.0 must be positive"),
        (["--optim.lr=.inf"], "optim.lr must be a finite number, got"),
        (["--run.seed=-1"], "run.seed -1"),
        (["--data.crop_scale=[0.5, 0.2]"], "data.crop_scale"),
        (["--mask.ratio=-0.1"], "mask.ratio -0.1"),
        (["--mask.ratio=0", "--loss.tokens=masked"], "loss.tokens masked needs masked tokens"),
        (["--mask.ratio=0.999"], "leaves 0 of 196 patches visible"),
        (["--teacher.name=none"], "target.kind teacher needs a teacher"),
        (["--teacher.width=64"], "teacher.width goes with teacher.name custom"),
        (["--encoder.name=vit_x"], "encoder.name 'vit_x' is not one of"),
        (["--encoder.heads=5"], "encoder.width 192 is not divisible by encoder.heads 5"),
        (["--decoder.heads=7"], "decoder.width 512 is not divisible by decoder.heads 7"),
        (["--train.epochs=0"], "train.epochs 0 must be positive"),
        (["--run.keep=0"], "run.keep 0 must be positive"),
        (["--data.workers"], "data.workers"),
        (["stray"], "'stray' is not an option"),
        (["--shards=a"], "--shards is not a known option; did you mean --data.shards?"),
        (["--config"], "config"),
    ],
)
def test_bad_values(words, says):
    with pytest.raises(UserError) as caught:
        load(*words)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/pretrain").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_configs_are_the_papers(path):
    config = load("--config", str(path))
    assert path.read_text().startswith("#")  # its head is its record
    assert config.run.dir == f"runs/{path.stem}"
    if path.stem not in ("toy", "toy_mae", "try"):
        assert (config.optim.lr, config.optim.base_batch, config.train.batch_size) == (
            2.4e-3,
            4096,
            4096,
        )
        assert (config.optim.betas, config.optim.weight_decay) == ((0.9, 0.95), 0.05)
        assert (config.train.epochs, config.optim.warmup) == (400, 0.1)
        assert (config.optim.clip, config.optim.ema) == (0, 0)
        assert config.data.image_size == 224 and config.data.hflip
    if path.stem.startswith("sami"):
        decoder = (config.decoder.kind, config.decoder.memory)
        assert decoder == ("cross", "visible_and_masked")
        assert (config.decoder.depth, config.decoder.width, config.decoder.heads) == (8, 512, 16)
        assert (config.loss.kind, config.loss.tokens, config.mask.ratio) == ("mse", "all", 0.75)
        cached = path.stem.endswith("_cached")
        assert (config.teacher.name, config.teacher.layer) == ("sam_vit_h", "neck")
        assert config.teacher.cached == cached
        assert config.teacher.image_size == (1024 if cached else 224)
        assert config.decoder.predict_fraction == 1
