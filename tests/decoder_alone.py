"""Why finetuning the mask decoder alone ruins a MobileSAM elsewhere (its issue 49), shown small.

python -m tests.decoder_alone MODEL --shards TARS --val-shards TARS --out DIR [--group.field ...]

MODEL is a run of finetune/distill.py with a TinyViT. Its decoder is finetuned with the encoder
frozen, at several learning rates, of which the first is as good as none, in three ways:

    kept      as finetune/train.py does it
    moving    the encoder's weights have no gradient, and yet its batch normalisation is in training
              mode: model.train() of code that was written for SAM's own encoders, which have none
    unscaled  moving, and images in 0..1 without SAM's mean and std, as the same code gives them;
              in use they are normalised

Prints a table of mIoU on the held-out images, beside the model before and what needs no model.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from finetune import train
from sami.core.exits import run_entry
from sami.core.tables import show_table
from tests.runs import ROOT

RATES = (1e-12, 1e-5, 1e-4, 1e-3)
WAYS = ("kept", "moving", "unscaled")
BUILD = train.build_model


class Unscaled(nn.Module):
    """Normalises in use alone."""

    def __init__(self, usual: nn.Module) -> None:
        super().__init__()
        self.usual = usual

    def forward(self, images):
        if not self.training:
            return self.usual(images)
        return images if images.is_floating_point() else images / 255


def built(way: str) -> Callable[..., nn.Module]:
    """What builds the model in the place of :func:`finetune.model.build_model`."""

    def build(*given, **named):
        model = BUILD(*given, **named)
        encoder = model.image_encoder
        if way != "kept":
            encoder.frozen_statistics = False
            encoder.train()
        if way == "unscaled":
            encoder.normalise = Unscaled(encoder.normalise)
        return model

    return build


def measures(folder: Path) -> dict[str, float]:
    """The last held-out measures of a run, in %."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [json.loads(line) for line in lines if "val_miou_box" in line][-1]
    return {name.removeprefix("val_"): 100 * last[name] for name in last if name.startswith("val_")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "--shards", "--val-shards", "--out"):
        parser.add_argument(name)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    args, more = parser.parse_known_args()  # others are finetune/train.py's
    rows = []
    for way in WAYS:
        train.build_model = built(way)
        for rate in args.rates:
            folder = Path(args.out) / f"{way}-{rate:g}"
            words = ["--config", str(ROOT / "configs/finetune/sam_decoder_ti.yaml")]
            options = {
                "run.dir": folder,
                "data.shards": args.shards,
                "data.val_shards": args.val_shards,
                "encoder.checkpoint": args.model,
                "decoder.checkpoint": args.model,
                "decoder.freeze": "encoder",
                "prompt.corrections": 0,
                "optim.lr": rate,
                "optim.warmup": 10,
                "eval.every": 0,
            }
            words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
            code = run_entry(lambda words=words: train.main([*words, *more]))
            if code:
                return code
            found = measures(folder)
            cells = [found[f"miou_{name}"] for name in ("box", "1_click", "3_clicks")]
            rows.append([way, f"{rate:g}" if rate > 1e-9 else "none", *(f"{v:.1f}" for v in cells)])
    cells = [found[f"trivial_{name}"] for name in ("box", "1_click", "3_clicks")]
    rows.append(["without a model", "", *(f"{v:.1f}" for v in cells)])
    show_table("mask decoder alone", ["encoder", "rate", "box", "1 click", "3 clicks"], rows, "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
