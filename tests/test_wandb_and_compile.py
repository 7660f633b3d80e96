"""The two options that lean on something large: wandb's offline mode and torch.compile."""

import json
import shutil
import struct

import pytest
import torch
import torch._dynamo
import torch._inductor.config

from sami.pretrain import main
from tests.runs import arguments, command, numbers, run, write_shards


def wandb_records(path):
    """The records of a .wandb file: a LevelDB log of protobuf messages behind a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_offline_gets_metrics_config_and_images(tmp_path):
    shards = write_shards(tmp_path / "shards")
    options = {"run.wandb": "offline", "run.picture_every": 4, "train.steps": 8, "run.log_every": 2}
    options |= {"data.val_shards": shards, "data.allow_val_in_train": "true", "eval.every": 4}
    done = run(command(arguments(tmp_path / "run", shards, **options)))
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    losses, config, images = {}, {}, 0
    for record in wandb_records(file):
        for item in record.run.config.update:
            config["/".join(item.nested_key) or item.key] = item.value_json
        row = {
            "/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
        }
        if "loss" in row:
            losses[row["step"]] = row["loss"]
            assert {"lr", "images_per_second", "data_wait"} <= row.keys()
            assert ("val_r2" in row) == (row["step"] % 4 == 0)
        images += any(key.startswith("reconstruction") for key in row)
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads(config["environment"])["commit"] == told["commit"]
    assert json.loads(config["facts"])["teacher"] == told["teacher"]
    assert losses == {line["step"]: line["loss"] for line in numbers(tmp_path / "run")}
    assert json.loads(config["train"])["steps"] == 8
    assert images == 2
    assert len(list(file.parent.rglob("reconstruction*.png"))) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
@pytest.mark.filterwarnings("default")  # of the compiler
def test_compiled_run_equals_the_plain_one(tmp_path, in_process):
    shards = write_shards(tmp_path / "shards")
    # Without vector instructions, which are probed for 8 s, and without workers that import torch.
    quick = {"compile_threads": 1, "cpp.vec_isa_ok": False}
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        options = {"train.compile": compiled, "train.steps": 3, "encoder.depth": 1}
        with torch._inductor.config.patch(quick):
            code, error = in_process(main, arguments(tmp_path / name, shards, **options))
        assert code == 0, error
    for a, b in zip(numbers(tmp_path / "plain"), numbers(tmp_path / "compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    torch._dynamo.reset()
