"""How many processes a run has and on which device: what the environment may say about it."""

import os
import re
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from sami.core.config import require
from sami.core.errors import UserError

DEVICES = "auto, cpu, cuda, cuda:1 (or another number) or mps"
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = (
    *("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    *("MPI_LOCALRANKID", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
)
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER = "TORCHELASTIC_RUN_ID"  # what torchrun, and accelerate launch through it, always set
# What accelerate launch sets for a single process, all of it.
SINGLE = ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_MODE")
FRAMEWORKS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
# What would change gradients, precision or device, and what decides it here.
OVERRULED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "train.batch_size and train.micro_batch_size",
    "ACCELERATE_GRADIENT_CLIPPING": "optim.clip",
    "ACCELERATE_MIXED_PRECISION": "train.precision",
    "ACCELERATE_DOWNCAST_BF16": "train.precision",
    "ACCELERATE_FP8_BACKEND": "train.precision",
    "ACCELERATE_DYNAMO_BACKEND": "train.compile",
    "ACCELERATE_USE_CPU": "run.device",
    "ACCELERATE_TORCH_DEVICE": "run.device",
}
NEUTRAL = ("", "no", "none", "false", "0")
# What torch and the driver follow below us; nothing can be set against it from here.
BELOW = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
ANSWER = 3.0  # seconds in which a launcher that is alive answers


def choose_device(name: str, option: str = "--device") -> torch.device:
    """The device that a user names; auto is the GPU if there is one, else the CPU.

    Args:
        option: named in an error.

    Raises:
        UserError: no such device, or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    require(
        re.fullmatch(r"cpu|mps|cuda(:\d+)?", name) is not None,
        f"{option} {name} is no device; it is one of {DEVICES}",
    )
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        require(count > 0, f"{option} {name}: no GPU is visible; take cpu or mend the driver")
        last = "only cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        require((device.index or 0) < count, f"{option} {name}: there is {last}")
    if device.type == "mps":
        there = torch.backends.mps.is_available()
        require(there, f"{option} mps: this is no Mac with such a GPU; take auto or cpu")
    return device


def exact(device: torch.device) -> torch.dtype:
    """What sums over many images are kept in: fp64, which Apple's GPUs do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes, with all that it starts on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def is_launched() -> bool:
    """Whether a launcher, which may die before this process does, has started it."""
    return LAUNCHER in os.environ or all(name in os.environ for name in SINGLE)


def check_launch() -> None:
    """Refuse what another program has left in the environment: a rendezvous would not come about.

    What says no more than that this is the only process is taken away.

    Raises:
        UserError: several processes are announced, and no launcher is there that started them.
    """
    found = os.environ
    if LAUNCHER in found:
        lacking = [name for name in RENDEZVOUS if name not in found]
        require(
            not lacking,
            f"{LAUNCHER} is in the environment and {', '.join(lacking)} is not: it is left over "
            f"from another program; unset {LAUNCHER}, or start this with accelerate launch",
        )
        if found.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _require_answer(found["MASTER_ADDR"], found["MASTER_PORT"])
        return
    several = [name for name in SIZES if found.get(name, "1").strip() not in ("1", "")]
    several += [name for name in RANKS if found.get(name, "0").strip() not in ("0", "-1", "")]
    if several:
        values = ", ".join(f"{name}={found[name]}" for name in several)
        raise UserError(
            f"{values} is in the environment and no launcher has started this process: left over "
            f"from another program? unset {' '.join(several)}, or start several processes with "
            "accelerate launch --config_file configs/accelerate/gpu_8.yaml"
        )
    for name in (*SIZES, *RANKS, "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        found.pop(name, None)


def _require_answer(address: str, port: str) -> None:
    """Raise UserError if the launcher, which holds the meeting point, is not there."""
    try:
        socket.create_connection((address, int(port)), ANSWER).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"{LAUNCHER} is in the environment and no launcher answers at MASTER_ADDR {address}, "
            f"MASTER_PORT {port}: left over from another program? unset {LAUNCHER} "
            f"{' '.join(RENDEZVOUS)}, or start this with accelerate launch"
        ) from error


def make_accelerator(device: torch.device, bf16: bool) -> tuple[Accelerator, list[str]]:
    """An Accelerator that follows a run's configuration alone, and what of the environment it does
    not follow.

    The environment is how accelerate launch hands on its options and a user's own default
    configuration; Accelerate lets some of it win over what a program asks for.

    Raises:
        UserError: several processes without a launcher, or another framework is asked for.
    """
    check_launch()
    for name, framework in FRAMEWORKS.items():
        require(
            os.environ.get(name, "").lower() in NEUTRAL,
            f"Accelerate is set up for {framework} ({name}), which this project does not use; "
            "launch with --config_file configs/accelerate/gpu_8.yaml (or gpu.yaml), or unset it",
        )
    ours = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_MIXED_PRECISION": "bf16" if bf16 else "no",
        "ACCELERATE_USE_CPU": str(device.type == "cpu").lower(),
        "ACCELERATE_TORCH_DEVICE": str(device),
    }
    notes = []
    for name, decides in OVERRULED.items():
        value = os.environ.pop(name, "")
        if value.lower() not in (*NEUTRAL, ours.get(name)):
            notes.append(f"{name}={value} in the environment is passed over in favour of {decides}")
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]
    for name in BELOW:
        if os.environ.get(name):
            notes.append(f"{name}={os.environ[name]} in the environment changes fp32 products")
    if device.index is not None:  # Accelerate would take the first one
        require(
            LAUNCHER not in os.environ,
            f"run.device {device} is for one process; with several say --run.device cuda",
        )
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="bf16" if bf16 else "no",
            gradient_accumulation_steps=1,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
            ],
        )
    finally:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    return accelerator, notes
