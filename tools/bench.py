"""Speed of the parts of a stage, interleaved in one run so that their ratios can be trusted.

python tools/bench.py stage1 [--batch 16] [--rounds 11] [--device cpu] [--teacher sam_vit_b] ...
python tools/bench.py stream [--shards PATTERN] [--rounds 11] [--batch 16]
python tools/bench.py cache [--batch 16] [--workers 2] [--grid 32] [--rounds 11] [--device cpu] ...
python tools/bench.py stage2 [--batch 1] [--masks 8 32 64] [--rounds 11] [--device cpu] ...
python tools/bench.py everything --rounds 3 [--model runs/own] [--image image.jpg] [--head sam] ...

Each is a file of tools/benches/.
"""

import importlib
import sys
from pathlib import Path

import torch

from sami.core.exits import run_entry
from sami.core.options import Options, require_least
from sami.core.paths import local_path, path_pattern
from sami.core.processes import DEVICES, choose_device
from sami.encoders.sam import SAM_SHAPES

BENCHES = Path(__file__).parent / "benches"
SHARDS = "of the data path; drawn images if none"


def main() -> int:
    parser = Options(description=__doc__)
    parser.add_argument("stage", choices=["stage1", "stream", "cache", "stage2", "everything"])
    parser.add_argument("--device", default="auto", help=f"{DEVICES}; default: auto")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, help="images of a training step")
    parser.add_argument("--masks", type=int, nargs="+", default=[8, 32, 64], help="of stage2")
    parser.add_argument("--image-size", type=int, default=1024, help="of stage2, everything")
    parser.add_argument("--step-rounds", type=int, default=5, help="of stage2's training steps")
    parser.add_argument("--encoder", help="default: vit_ti, of stage2 also vit_s")
    parser.add_argument("--teacher", default="sam_vit_b", choices=list(SAM_SHAPES))
    parser.add_argument("--teacher-batch", type=int, default=1)
    parser.add_argument("--teacher-sizes", type=int, nargs="+", default=[1024, 224])
    parser.add_argument("--shards", type=path_pattern, nargs="+", default=[], help=SHARDS)
    parser.add_argument("--workers", type=int, default=2, help="of cache, for each stream")
    parser.add_argument("--grid", type=int, default=32, help="of cache's features")
    parser.add_argument("--side", type=int, default=32, help="points a side, of everything")
    parser.add_argument("--pixels", type=int, nargs=2, default=[1500, 2250], help="height, width")
    parser.add_argument("--model", help="of everything; default: random weights of --encoder")
    parser.add_argument("--head", choices=["efficientsam", "sam"], default="efficientsam")
    parser.add_argument("--image", type=local_path, help="of everything; default: a drawn one")
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs=3,
        help="of everything: predicted IoU, stability and its offset; default: found, so that a "
        "third of the masks pass the first and half of these the second",
    )
    args = parser.parse_args()
    if args.stage != "stage2":
        args.encoder = args.encoder or "vit_ti"
    args.device = str(choose_device(args.device))
    require_least(1, args, "rounds", "step_rounds", "side")
    torch.manual_seed(0)
    if str(BENCHES.parent) not in sys.path:  # where this is imported, and not run
        sys.path.append(str(BENCHES.parent))
    getattr(importlib.import_module(f"benches.{args.stage}"), args.stage)(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
