"""What only a GPU can show; skipped, saying so, where there is none."""

import pytest
import torch

from sami.core.optim import OptimConfig, build_optimizer, guarded_step, poison
from sami.encoder import EncoderConfig, build_encoder
from sami.model import DecoderConfig, LossConfig, MaskedReconstruction
from sami.teacher import TeacherConfig, load_teacher, to_grid
from tests.runs import arguments, command, numbers, run, summary, write_shards

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_step_does_not_wait_for_the_device():
    """Forward, teacher, backward and update under the driver's own check for synchronisation."""
    device = torch.device("cuda")
    model = MaskedReconstruction(
        build_encoder(EncoderConfig(), 224), DecoderConfig(), LossConfig(), 256, 0.75
    ).to(device)
    teacher = load_teacher(TeacherConfig("custom", "random", 224)).to(device)
    optimizer = build_optimizer(model, OptimConfig())
    images = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8).pin_memory()
    order = torch.rand(8, 196).argsort(1).pin_memory()

    def step() -> None:
        pictures, numbers = (x.to(device, non_blocking=True) for x in (images, order))
        with torch.autocast("cuda", torch.bfloat16):
            target = to_grid(teacher(pictures), 14, "area")
            loss = model(pictures, numbers[:, :49], numbers[:, 49:], target)["loss"]
        poison(loss).backward()
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
