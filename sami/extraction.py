"""A teacher over shards, once per image: what ``tools/cache_teacher.py`` runs.

A shard is written under another name and renamed when it is whole; then the manifest, which several
processes share under a lock, gets its checksum. So whatever kills a process costs it one shard.
"""

import contextlib
import io
import itertools
import os
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from sami.caching import Manifest
from sami.core.checkpoint import sha256_of
from sami.core.config import require
from sami.core.errors import BadSample, UserError
from sami.core.images import open_image, resize_whole
from sami.core.index import Shard
from sami.core.locks import is_named, locked
from sami.core.reading import RawSample, read_samples, read_whole
from sami.core.scanning import IMAGE, TEACHER, split_name
from sami.features import Cache, QuantizedFeatures, from_bytes, pack, quantise, to_bytes
from sami.teacher import Teacher

TOLERANCE = 0.03  # relative difference within which features count as recomputed: int8 has 0.01


@dataclass
class FeatureExtractor:
    """A teacher and how it is run over images.

    Attributes:
        batch: images per forward.
        workers: threads that decode.
        fixed: always give it whole batches, which a compiled teacher needs.
    """

    teacher: Teacher
    cache: Cache
    device: torch.device
    batch: int
    workers: int
    fixed: bool = False

    def start(self, batch: list[tuple]) -> tuple[list[list[torch.Tensor]], Callable[[], None]]:
        """What is stored of samples of :func:`_decoded`, and what waits until it is there.

        On a GPU the next batch can be decoded while this one is computed and copied.
        """
        features = self.extract([pixels for _, _, _, pixels in batch])
        on_cuda = self.device.type == "cuda"
        stored = [
            [tensor.to("cpu", non_blocking=on_cuda) for tensor in quantise(one, self.cache, size)]
            for one, (_, _, size, _) in zip(features, batch, strict=True)
        ]
        if not on_cuda:
            return stored, lambda: None
        copied = torch.cuda.Event()
        copied.record()
        return stored, copied.synchronize

    def extract(self, images: list[np.ndarray]) -> torch.Tensor:
        """Features [B, C, s, s] of images as :func:`extract_whole` takes them."""
        fill = [images[-1]] * (self.batch - len(images)) if self.fixed else []
        bf16 = self.cache.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return extract_whole(self.teacher, images + fill)[: len(images)]


@torch.no_grad()
def extract_whole(teacher: Teacher, images: Sequence[np.ndarray]) -> torch.Tensor:
    """The teacher's features of whole images, each padded to the same square.

    Args:
        images: uint8 [h, w, 3] each, at what :meth:`Cache.input_size` says. Padded on the right
            and below after normalisation, as SAM does.

    Returns:
        [B, C, s, s] with s = image_size / patch size, in the teacher's precision.
    """
    device, side = teacher.normalise.mean.device, teacher.image_size
    canvas = torch.zeros(len(images), 3, side, side, dtype=torch.uint8)
    inside = torch.zeros(len(images), 1, side, side, dtype=torch.bool)
    for number, image in enumerate(images):
        height, width = image.shape[:2]
        canvas[number, :, :height, :width] = torch.from_numpy(image).permute(2, 0, 1)
        inside[number, :, :height, :width] = True
    return teacher.features(teacher.normalise(canvas.to(device)) * inside.to(device))


def describe_preprocessing(teacher: Teacher) -> dict[str, Any]:
    """What happens to an image before the teacher, for a reader of the manifest."""
    mean, std = (
        [round(255 * value, 4) for value in tensor.double().flatten().tolist()]
        for tensor in (teacher.normalise.mean, teacher.normalise.std)
    )
    longest = teacher.resize == "longest"
    sides = "longest side" if longest else "both sides"
    return {
        "resize": f"upright, {sides} to image_size, antialiased bilinear",
        "mean": mean,
        "std": std,
        "padding": "zeros on the right and below after normalisation" if longest else "none",
    }


def prepare(data: bytes, cache: Cache) -> tuple[tuple[int, int], np.ndarray]:
    """An image's upright width and height, and its pixels as the teacher sees them.

    Raises:
        BadSample: it cannot be used.
    """
    image = open_image(data)
    return image.upright, resize_whole(image, *cache.input_size(*image.upright))


def cache_shard(
    extractor: FeatureExtractor, source: Shard, path: Path, advance: Callable[[int, int], None]
) -> dict[str, Any]:
    """Write one shard with its features; samples whose image cannot be used are left out.

    Args:
        advance: called with the images and the bytes that were added.

    Returns:
        What the manifest tells of it.

    Raises:
        UserError: another process writes the same shard, or the teacher's features are not finite.
    """
    left_out: Counter[str] = Counter()
    temporary, samples = path.with_name(f".{path.name}.writing"), 0
    with _exclusive(temporary, path) as file:
        try:
            with tarfile.open(fileobj=file, mode="w") as tar, ThreadPoolExecutor(1) as writer:
                writing: deque[Future] = deque()
                for key, members, stored in _extracted(extractor, source, left_out):
                    samples += 1
                    named = {**members, f"{key}.{TEACHER}": to_bytes(stored)}
                    writing.append(writer.submit(_write, tar, named))
                    if len(writing) > 2 * extractor.batch:
                        writing.popleft().result()
                    advance(1, sum(map(len, named.values())))
                for one in writing:
                    one.result()
            file.flush()
            os.fsync(file.fileno())
            record = {
                "samples": samples,
                "left_out": dict(left_out),
                "sha256": sha256_of(temporary),
                "source": source.digest,
            }
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return record


def _extracted(
    extractor: FeatureExtractor, source: Shard, left_out: Counter[str]
) -> Iterator[tuple[str, dict[str, bytes], QuantizedFeatures]]:
    """Key, members and features of a shard's samples; decoding, teacher and packing overlap."""
    started: deque[tuple] = deque()
    samples = _decoded(extractor, source, left_out)
    while (batch := list(itertools.islice(samples, extractor.batch))) or started:
        if batch:
            started.append((batch, *extractor.start(batch)))
        if batch and len(started) < 2:
            continue  # a batch is packed while the teacher is at the next one
        ready, stored, wait = started.popleft()
        wait()
        for (key, members, _, _), one in zip(ready, stored, strict=True):
            try:
                yield key, members, pack(one)
            except BadSample as error:
                raise UserError(
                    f"the teacher's {error} for {key} of {source.url}, computed in "
                    f"{extractor.cache.precision}; look at the checkpoint, or take --precision "
                    "fp32 and --dtype int8"
                ) from error


def _decoded(extractor: FeatureExtractor, source: Shard, left_out: Counter[str]) -> Iterator[tuple]:
    """Key, members, size and pixels of the samples that can be used, decoded ahead in threads."""

    def load(members: dict[str, bytes]) -> tuple[tuple[int, int], np.ndarray]:
        name = next((name for name in members if (split_name(name) or "  ")[1] == IMAGE), None)
        if name is None:
            raise BadSample("cut off in shard")
        return prepare(members[name], extractor.cache)

    with ThreadPoolExecutor(extractor.workers) as pool:
        ahead: deque[tuple[str, dict[str, bytes], Future]] = deque()
        samples = read_whole(source.url)
        while True:
            for key, members in itertools.islice(samples, 2 * extractor.batch - len(ahead)):
                own = {name: data for name, data in members.items() if not name.endswith(TEACHER)}
                ahead.append((key, own, pool.submit(load, own)))
            if not ahead:
                return
            key, members, future = ahead.popleft()
            try:
                yield key, members, *future.result()
            except BadSample as error:
                left_out[str(error)] += 1


def _write(tar: tarfile.TarFile, members: dict[str, bytes]) -> None:
    for name, data in members.items():
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


@contextlib.contextmanager
def _exclusive(path: Path, wanted: Path) -> Iterator[BinaryIO]:
    """A file that this process alone writes, empty; the lock goes with the process."""
    with contextlib.ExitStack() as stack:
        file = None
        with contextlib.suppress(BlockingIOError):
            file = stack.enter_context(locked(path, wait=False))
        require(
            file is not None and is_named(path, file),
            f"{wanted} is being written by another process; are there two of one slice?",
        )
        file.truncate(0)
        yield file


def verify(
    extractor: FeatureExtractor, shards: list[Shard], rows: list[np.ndarray], manifest: Manifest
) -> tuple[int, float]:
    """Recompute some samples of cached shards and compare; and every shard's checksum.

    Args:
        rows: for each shard those that are recomputed.

    Returns:
        How many were compared, and the largest relative difference.

    Raises:
        UserError: a shard or a sample differs.
    """
    worst, compared, records = 0.0, 0, manifest.finished()
    for shard, some in zip(shards, rows, strict=True):
        path = Path(shard.url)
        require(
            sha256_of(path) == records[path.name]["sha256"],
            f"{path} is not the file that {manifest.path} tells of; delete it and run the same "
            "command without --verify",
        )
        samples = iter(read_samples(shard, some, (IMAGE, TEACHER)))
        while batch := list(itertools.islice(samples, extractor.batch)):
            read = [_read_back(extractor.cache, path, sample) for sample in batch]
            features = extractor.extract([pixels for _, pixels, _ in read])
            for sample, (size, _, stored), one in zip(batch, read, features, strict=True):
                again = pack(quantise(one, extractor.cache, size)).restored()
                change = np.linalg.norm(again - stored.restored())
                difference = float(change / max(np.linalg.norm(again), 1e-12))
                worst, compared = max(worst, difference), compared + 1
                require(
                    difference <= TOLERANCE,
                    f"{sample.key} in {path} differs from what the teacher gives by "
                    f"{difference:.1%}, more than {TOLERANCE:.0%}; delete the shard and run the "
                    "same command without --verify",
                )
    return compared, worst


def _read_back(
    cache: Cache, path: Path, sample: RawSample
) -> tuple[tuple[int, int], np.ndarray, QuantizedFeatures]:
    """A cached sample's size, pixels and features."""
    try:
        size, pixels = prepare(sample.part(IMAGE), cache)
        return size, pixels, from_bytes(sample.part(TEACHER), cache, size)
    except BadSample as error:
        raise UserError(
            f"{sample.key} in {path} is unusable ({error}); delete the shard and run the same "
            "command without --verify"
        ) from error
