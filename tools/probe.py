"""k-NN and a linear probe of a pretrained encoder, on shards with labels (.cls).

python tools/probe.py RUN --shards PATTERN [PATTERN ...] --val-shards PATTERN [PATTERN ...] ...

RUN is a run folder of sami/pretrain.py (its newest checkpoint, as long as it has not ended), or its
encoder.safetensors. Top-1 in % on the held-out
images: of the 20 nearest of --samples training images, and of one linear layer trained on
them. With eval.probe a pretraining measures the same as it goes. A quick measure that ranks
encoders; the paper's numbers are those of finetune/classify.py.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from sami.core.checkpoint import write_text
from sami.core.config import require
from sami.core.exits import run_entry
from sami.core.index import Shard, open_sources
from sami.core.labels import check_names, require_labels
from sami.core.options import Options, require_least
from sami.core.overlap import refuse_overlap
from sami.core.paths import local_path, path_pattern
from sami.core.patterns import expand
from sami.core.processes import DEVICES, choose_device
from sami.encoder import load_encoder
from sami.probe import compare, embed, spread


def main(argv: list[str] | None = None) -> int:
    parser = Options(description=__doc__)
    parser.add_argument("run", type=path_pattern, metavar="RUN")
    parser.add_argument(
        "--shards", type=path_pattern, nargs="+", required=True, help="training images"
    )
    parser.add_argument(
        "--val-shards", type=path_pattern, nargs="+", required=True, help="held-out images"
    )
    parser.add_argument(
        "--allow-val-in-train", action="store_true", help="measure on training images, too"
    )
    parser.add_argument("--samples", type=int, default=50_000, help="at most so many of each")
    parser.add_argument("--out", type=local_path, help="file for the result, as JSON")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    parser.add_argument("--device", default="auto", help=f"{DEVICES}; default: auto")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args(argv)
    require_least(1, args, "samples")
    require_least(0, args, "workers")
    out, bf16 = args.out, args.precision == "bf16"
    require(out is None or not out.exists(), f"{out} holds a result already; name another --out")
    device = choose_device(args.device)

    encoder = load_encoder(args.run, "RUN").to(device)
    keys, found = ("--shards", "--val-shards"), []
    with tempfile.TemporaryDirectory() as folder:
        opened: list[list[Shard]] = []
        for key, patterns in zip(keys, (args.shards, args.val_shards), strict=True):
            sources = open_sources(expand(patterns, key), Path(folder), print)
            opened.append([shard for source in sources for shard in source.shards])
            require_labels(opened[-1], key, "k-NN and linear probe need labels: name others")
        check_names(*opened, keys)
        if not args.allow_val_in_train:
            refuse_overlap(*opened, keys, "--allow-val-in-train")
        for shards in opened:
            numbers = spread(shards, args.samples)
            pair = embed(encoder, shards, numbers, device, bf16, args.workers)
            found.append([tensor.to(device) for tensor in pair])
    result, counts = compare(*found), [len(labels) for _, labels in found]
    known = torch.isin(found[1][1], found[0][1]).sum().item()
    if known < counts[1]:
        print(
            f"only {known} of {counts[1]} held-out images have a label that occurs among the "
            "training images: the others cannot be found"
        )
    print(
        f"{args.run}: k-NN {result['knn']:.1f} %, linear probe {result['linear']:.1f} % of "
        f"{counts[1]} held-out images, after {counts[0]} others"
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        info = {"command": sys.argv, "pictures": counts[0], "val_pictures": counts[1]}
        write_text(out, json.dumps(result | info, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
