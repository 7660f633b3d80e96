"""What only a GPU can show; skipped, saying so, where there is none."""

import pytest
import torch

from finetune.data import PromptBatch
from finetune.losses import MaskLossConfig as Stage2Loss
from finetune.model import MaskDecoderConfig as Stage2Decoder
from finetune.model import build_model
from finetune.objective import Objective
from finetune.prompting import PromptConfig
from sami.core.optim import OptimConfig, build_optimizer, guarded_step, propagate_nonfinite
from sami.encoder import EncoderConfig, build_encoder
from sami.model import CrossDecoderConfig, MaskedReconstruction, TokenLossConfig
from sami.targets import to_grid
from sami.teacher import TeacherConfig, load_teacher
from tests.runs import arguments, command, numbers, run, summary, write_shards
from tests.test_toy_shards import draw
from tests.test_train import arguments as stage2_arguments
from tests.test_train import command as stage2
from tools.cache_teacher import main as cache_teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_step_does_not_wait_for_the_device():
    """Forward, teacher, backward and update under the driver's own check for synchronisation."""
    device = torch.device("cuda")
    model = MaskedReconstruction(
        build_encoder(EncoderConfig(), 224),
        CrossDecoderConfig(),
        TokenLossConfig(),
        256,
        0.75,
    ).to(device)
    teacher = load_teacher(TeacherConfig("custom", "random", 224)).to(device)
    optimizer = build_optimizer(model, OptimConfig())
    images = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8).pin_memory()
    order = torch.rand(8, 196).argsort(1).pin_memory()

    def step() -> None:
        seen, numbers = (x.to(device, non_blocking=True) for x in (images, order))
        with torch.autocast("cuda", torch.bfloat16):
            target = to_grid(teacher(seen), 14, "area")
            loss = model(seen, numbers[:, :49], numbers[:, 49:], target)["loss"]
        propagate_nonfinite(loss).backward()
        guarded_step(optimizer, 1.0)
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):  # libraries initialise themselves, tables are made once
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_run_in_bf16(tmp_path, compiled):
    shards = write_shards(tmp_path / "shards")
    words = arguments(tmp_path / "gpu", shards, **{"train.compile": compiled, "data.workers": 1})
    done = run(command(words))
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "gpu")["hardware"]["precision"] == "bf16"
    words = arguments(tmp_path / "cpu", shards, **{"run.device": "cpu", "data.workers": 1})
    assert run(command(words)).returncode == 0
    for a, b in zip(numbers(tmp_path / "gpu"), numbers(tmp_path / "cpu"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)


def test_a_step_of_stage_two_does_not_wait_for_the_device():
    device = torch.device("cuda")
    model = build_model(EncoderConfig(), Stage2Decoder(dropout=0.1), 1024, "square", False)
    objective = Objective(model.to(device), Stage2Loss(), PromptConfig(corrections=1))
    optimizer = build_optimizer(objective, OptimConfig())
    host = PromptBatch(
        torch.randint(0, 256, (1, 3, 1024, 1024), dtype=torch.uint8),
        torch.rand(1, 8, 256, 256) > 0.5,
        torch.ones(1, 8, dtype=torch.bool),
        torch.ones(1, 256, 256, dtype=torch.bool),
        torch.rand(1, 8, 6, 2) * 1024,
        torch.ones(1, 8, 6, dtype=torch.int64),
        torch.arange(0, 1024, 4.0).repeat(1, 2, 1),
    ).pin_memory()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = objective(host.to(device))["loss"]
        propagate_nonfinite(loss).backward()
        guarded_step(optimizer, 1.0)
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["efficientsam", "sam"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_stage_two_in_bf16(tmp_path, kind, compiled):
    done = draw(tmp_path / "scenes", "--shards", "2", "--images", "16")
    shards = done.stdout.split(": ")[-1].strip()
    options = {"decoder.kind": kind, "prompt.corrections": 1, "data.workers": 1}
    for place, more in (("gpu", {"train.compile": compiled}), ("cpu", {"run.device": "cpu"})):
        done = run(stage2(stage2_arguments(tmp_path / place, shards, **options, **more)))
        assert done.returncode == 0, done.stderr
    first = [numbers(tmp_path / place)[0]["loss"] for place in ("gpu", "cpu")]
    assert first[0] == pytest.approx(first[1], rel=5e-2)  # later clicks depend on what was drawn


def test_flex_attention_is_the_same_function_in_bf16():
    images = torch.rand(2, 3, 1024, 1024, device="cuda")
    found = []
    for attention in ("sdpa", "flex"):
        config = TeacherConfig("custom", "random", 1024, attention=attention)
        with torch.autocast("cuda", torch.bfloat16):
            found.append(load_teacher(config).to("cuda")(images).float())
    assert (found[0] - found[1]).norm() <= 0.02 * found[0].norm()


def test_a_cache_made_by_a_compiled_teacher(tmp_path):
    """Asynchronous copies, whole batches and FlexAttention: what plain fp32 gives again."""
    shards = write_shards(tmp_path / "shards", counts=(11,)).replace("{000..000}", "000")
    teacher = ["--teacher", "custom", "--checkpoint", "random", "--image-size", "256"]
    words = [shards, "--out", str(tmp_path / "out"), *teacher, "--precision", "fp32"]
    assert cache_teacher([*words, "--batch", "4", "--compile", "--attention", "flex"]) == 0
    assert cache_teacher([*words, "--batch", "3", "--verify", "--verify-fraction", "1"]) == 0
