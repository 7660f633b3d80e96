"""Gradients of one batch, split over however many processes there are; started by a launcher.

gradients.py OUT SHARDS: writes {"processes", "gradients"} for the same list of sample keys.
gradients.py OUT SHARDS spoilt: the last rank's loss is infinite; writes whether each rank left the
update out, and whether its weights stayed as they were.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from sami.core.index import open_sources
from sami.core.optim import OptimConfig, build_optimizer, guarded_step, propagate_nonfinite
from sami.core.patterns import expand
from sami.core.reading import read_range
from sami.data import CropTransform
from sami.encoder import EncoderConfig, build_encoder
from sami.masking import MaskConfig
from sami.model import CrossDecoderConfig, MaskedReconstruction, TokenLossConfig
from sami.targets import to_grid
from sami.teacher import TeacherConfig, load_teacher


def main() -> None:
    out, pattern, *spoilt = sys.argv[1:]
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(accelerator.process_index)  # the wrapper has to make the weights equal
    encoder = build_encoder(EncoderConfig("custom"), 64)
    model = MaskedReconstruction(
        encoder,
        CrossDecoderConfig(width=32, depth=2, heads=2),
        TokenLossConfig(),
        256,
        0.75,
    )
    if accelerator.process_index == 0:
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    teacher = load_teacher(TeacherConfig("custom", "random", 64))
    views = CropTransform(0, 64, 64, 4, MaskConfig(ratio=0.75), (0.2, 1.0), True)

    share = 8 // accelerator.num_processes
    mine = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    (source,) = open_sources(expand(pattern, "shards"), Path(f"{out}-{accelerator.process_index}"))
    samples = read_range(source.shards, mine, views.fields)
    batch = views.collate([views.decode(sample, 0, False) for sample in samples])
    wrapped = accelerator.prepare(model)
    target = to_grid(teacher(batch.teacher_view), 4, "area")
    loss = wrapped(batch.student, batch.visible, batch.masked, target)["loss"]
    if spoilt:
        last = accelerator.process_index == accelerator.num_processes - 1
        before = [parameter.detach().clone() for parameter in model.parameters()]
        accelerator.backward(propagate_nonfinite(loss + (torch.inf if last else 0.0)))
        _, skipped = guarded_step(build_optimizer(model, OptimConfig()), 0.0)
        kept = all(map(torch.equal, before, model.parameters()))
        told = accelerator.gather(torch.tensor([[skipped.item(), float(kept)]]))
        if accelerator.process_index == 0:
            torch.save(told, out)
        accelerator.end_training()
        return
    accelerator.backward(loss)
    if accelerator.process_index == 0:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        torch.save({"processes": accelerator.num_processes, "gradients": gradients}, out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
