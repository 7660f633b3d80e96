"""Index shards beside themselves, once for all runs: <shard>.tar.index.npz.

python tools/index_shards.py PATTERN [PATTERN ...] [--workers N]

A run indexes what has no index yet, in its own folder; with SA-1B's thousand tars on a network file
system that takes a while, and a sweep would repeat it. Finished indexes stay; a shard that changed
is indexed again.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor

from sami.core.config import require
from sami.core.errors import not_written
from sami.core.exits import run_entry
from sami.core.index import index_beside, stored_index
from sami.core.network import is_url
from sami.core.options import Options, require_least
from sami.core.paths import path_pattern
from sami.core.patterns import expand
from sami.core.progress import track
from sami.core.scanning import scan, stamp_of


def index(url: str) -> tuple[int, list[str]]:
    """Index one shard unless it has been; its samples and what is odd about it."""
    path = index_beside(url)
    members = stored_index(path, stamp_of(url))
    if members is None:
        members = scan(url)
        try:
            members.save(path)
        except OSError as error:
            remedy = "a run keeps indexes in its own folder instead"
            raise not_written(error, str(path), remedy) from error
    return len(members.keys), [f"{url}: {note}" for note in members.notes]


def main() -> int:
    parser = Options(description=__doc__)
    parser.add_argument(
        "patterns", type=path_pattern, nargs="+", help="such as 'data/sa1b/sa_*.tar'"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    require_least(1, args, "workers")
    urls = [url for group, _ in expand(args.patterns, "PATTERN") for url in group]
    remote = next(filter(is_url, urls), None)
    require(remote is None, f"{remote} is no local file; a run indexes it in its own folder")
    samples, notes = 0, []
    with ProcessPoolExecutor(args.workers) as pool:
        for count, odd in track(pool.map(index, urls), "indexing", total=len(urls)):
            samples += count
            notes += odd
    print("\n".join([*notes, f"{samples} samples in {len(urls)} shards"]))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
