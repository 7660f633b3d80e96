"""Parameter groups, the learning rate as a function of the step, and the guarded update."""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn

from sami.core.config import require


@dataclass
class OptimConfig:
    """AdamW with linear warm-up and a cosine or a straight line to 0 over the steps.

    Attributes:
        lr: peak learning rate at a batch of base_batch; scaled linearly to train.batch_size.
        base_batch: the batch size that lr is for.
        betas: of AdamW.
        weight_decay: none on norms, biases and tokens (docs/method.md: MAE decayed its tokens).
        schedule: what follows the warm-up, down to 0 at the run's end.
        warmup: share of the steps with a linearly rising rate, 0.1 is the paper's 40 of 400 epochs;
            from 1 on it is their number.
        layer_decay: each block's rate is so many times that of the block above; 1 for none.
        clip: largest norm of the gradient; 0 for no clipping.
        ema: largest decay of an exponential moving average of the weights, which is then what is
            evaluated and exported; it rises to that as (1 + step) / (10 + step). 0 for none.
    """

    lr: float = 2.4e-3
    base_batch: int = 4096
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup: float = 0.1
    layer_decay: float = 1.0
    clip: float = 0.0
    ema: float = 0.0

    def check(self) -> None:
        require(self.lr > 0, f"optim.lr {self.lr} must be positive, such as 2.4e-3")
        base = self.base_batch
        require(base > 0, f"optim.base_batch {base} must be positive, such as 4096")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas {list(self.betas)} must be at least 0 and under 1, such as [0.9, 0.95]",
        )
        require(self.weight_decay >= 0, f"optim.weight_decay {self.weight_decay} must be 0 or more")
        require(
            0 <= self.warmup < 1 or self.warmup == int(self.warmup) > 0,
            f"optim.warmup {self.warmup} is a share of the steps, at least 0 and under 1, or a "
            "whole number of them",
        )
        require(
            0 < self.layer_decay <= 1,
            f"optim.layer_decay {self.layer_decay} must be above 0 and at most 1 (none)",
        )
        require(self.clip >= 0, f"optim.clip {self.clip} must be 0 (no clipping) or more")
        require(
            0 <= self.ema < 1,
            f"optim.ema {self.ema} must be 0 (none) or a decay under 1, such as 0.9999",
        )


@dataclass
class TrainConfig:
    """How long, and in which pieces.

    Attributes:
        steps: optimizer steps; with epochs given too, the run ends at whichever comes first.
        epochs: passes over the samples.
        batch_size: images per optimizer step, over all processes.
        micro_batch_size: at most so many images per forward and process; what is missing to
            batch_size is accumulated. null for as many as batch_size asks for.
        compile: torch.compile the student and its decoder.
        precision: auto is bf16 where the hardware has it, else fp32.
        max_bad_steps: stop after so many updates in a row that were not finite.
    """

    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 4096
    micro_batch_size: int | None = None
    compile: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    max_bad_steps: int = 20

    def check(self) -> None:
        require(
            self.steps is not None or self.epochs is not None, "give train.steps or train.epochs"
        )
        for name in ("steps", "epochs", "batch_size", "micro_batch_size", "max_bad_steps"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name} {value} must be positive")

    def compiles(self, device: torch.device) -> bool:
        """Whether to compile.

        Raises:
            UserError: asked for on a CPU without a compiler.
        """
        compiler = os.environ.get("CXX", "g++")
        require(
            not self.compile or device.type != "cpu" or shutil.which(compiler) is not None,
            f"train.compile on a CPU needs a C++ compiler and {compiler} is not there; install one "
            "or set --train.compile false",
        )
        return self.compile

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        by_epochs = None if self.epochs is None else self.epochs * steps_per_epoch
        return min(steps for steps in (self.steps, by_epochs) if steps is not None)

    def micro_batch(self, processes: int) -> int:
        """Images per forward and process.

        Raises:
            UserError: batch_size is not a multiple of processes x micro_batch_size.
        """
        share, rest = divmod(self.batch_size, processes)
        micro = min(self.micro_batch_size or share, max(share, 1))
        whole = processes * micro
        lower, upper = self.batch_size // whole * whole, -(-self.batch_size // whole) * whole
        require(
            rest == 0 and self.batch_size % whole == 0,
            f"train.batch_size {self.batch_size} is not divisible by {processes} processes x "
            f"micro_batch_size {micro} = {whole}; try --train.batch_size "
            f"{f'{lower} or ' if lower else ''}{upper}",
        )
        return micro


def warmup_steps(config: OptimConfig, steps: int) -> int:
    """Updates of the warm-up in a run of ``steps``."""
    return round(config.warmup * steps) if config.warmup < 1 else int(config.warmup)


def unfinished_warmup(config: OptimConfig, steps: int, batch_size: int) -> str | None:
    """What to tell of a run that ends inside its warm-up; None if it does not."""
    warmup = warmup_steps(config, steps)
    if steps > warmup:
        return None
    peak = config.lr * batch_size / config.base_batch
    reached = learning_rate(config, steps - 1, steps, batch_size)
    return (
        f"the run's {steps} steps end inside the warm-up of {warmup} (optim.warmup): the learning "
        f"rate rises to {reached:.2g} of {peak:.2g} and never falls; give a share of the steps, "
        "such as --optim.warmup 0.1, or more steps"
    )


def learning_rate(config: OptimConfig, step: int, steps: int, batch_size: int) -> float:
    """The rate of the update that takes ``step`` to ``step + 1`` in a run of ``steps``.

    It rises linearly and is at its peak, lr * batch_size / base_batch, in the last update of the
    warm-up and the first after it; then half a cosine, or a line, brings it to 0 at the end of the
    run.
    """
    peak = config.lr * batch_size / config.base_batch
    warmup = warmup_steps(config, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "linear":
        return peak * (steps - step) / (steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# Tokens and positions, whatever their shape.
UNDECAYED = ("_token", "pos_embed", "attention_biases")


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    layer_id: Callable[[str], int] = lambda name: 0,
) -> list[dict]:
    """Trainable parameters: matrices decay; norms, biases, tokens and embeddings do not.

    Args:
        layer_id: from a parameter's name to the number of its layer, from the input on; its group's
            ``lr_scale`` is ``layer_decay`` to the power of how many layers lie above.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, False): [], (1.0, True): []}
    top = max((layer_id(name) for name, _ in model.named_parameters()), default=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith(UNDECAYED)
            key = layer_decay ** (top - layer_id(name)), plain or id(parameter) in embeddings
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if plain else weight_decay, "lr_scale": scale}
        for (scale, plain), parameters in groups.items()
    ]


def build_optimizer(
    model: nn.Module, config: OptimConfig, layer_id: Callable[[str], int] = lambda name: 0
) -> torch.optim.AdamW:
    """AdamW whose kernel can leave an update out on the device (``found_inf``).

    Args:
        layer_id: see :func:`parameter_groups`.
    """
    groups = parameter_groups(model, config.weight_decay, config.layer_decay, layer_id)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


class Ema:
    """Exponential moving average of a model's trainable parameters.

    Its decay rises with the step, as TensorFlow's ``ExponentialMovingAverage`` has it with
    ``num_updates``: an average with 0.9999 from the first update on would still hold 90 % of the
    initial weights after 1,000 updates; so it holds none that counts.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """``decay``: the largest, which a long run reaches."""
        self.decay, self.model = decay, model
        self.average = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def decay_at(self, step: int) -> float:
        """The decay in the update that takes ``step`` to ``step + 1``."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int, skipped: torch.Tensor) -> None:
        """Move towards the weights; bit-unchanged where ``skipped`` (a tensor) is 1."""
        parameters = dict(self.model.named_parameters())
        weight = (1 - self.decay_at(step)) * (1 - skipped)
        for name, average in self.average.items():
            average.lerp_(parameters[name], weight.to(average.dtype))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average; a second call restores both."""
        for name, parameter in self.model.named_parameters():
            if name in self.average:
                current = parameter.detach().clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(current)


class Statistics:
    """The running statistics of batch normalisation, which no gradient reaches.

    The ranks' are averaged after each update, so that all measure and save the same; where an
    update is left out, what its batch brought is left out too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.before = [tensor.clone() for norm in self.norms for tensor in _running(norm)]

    @torch.no_grad()
    def update(self, skipped: torch.Tensor, accelerator: Accelerator) -> None:
        """``skipped``: 0-dim tensor, 1 if the update was left out. Frozen statistics stay."""
        before = iter(self.before)
        for norm in self.norms:
            for now in _running(norm):
                old = next(before)
                if norm.training:
                    mean = accelerator.reduce(now, "mean") if accelerator.num_processes > 1 else now
                    old.copy_(torch.where(skipped > 0, old, mean))
                    now.copy_(old)


def _running(norm: nn.modules.batchnorm._BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    return norm.running_mean, norm.running_var


class Guard:
    """Counts updates that were left out, without asking the device until the counts are due."""

    def __init__(self, device: torch.device) -> None:
        self.skipped = torch.zeros((), device=device)  # since the start of the run
        self.in_row = torch.zeros((), device=device)
        self.worst_row = torch.zeros((), device=device)

    def count(self, skipped: torch.Tensor) -> None:
        """``skipped``: 0-dim tensor, 1 if the update was left out."""
        self.skipped += skipped
        self.in_row = (self.in_row + 1) * skipped
        self.worst_row = torch.maximum(self.worst_row, self.in_row)

    def state(self) -> list[float]:
        """Updates left out in all, in a row now, and in the longest row; waits for the device."""
        return torch.stack([self.skipped, self.in_row, self.worst_row]).tolist()

    def load(self, state: list[float]) -> None:
        values = torch.tensor(state, device=self.skipped.device)
        self.skipped, self.in_row, self.worst_row = values.unbind()


def propagate_nonfinite(loss: torch.Tensor) -> torch.Tensor:
    """The loss, or, where it is not finite, one whose every gradient is NaN.

    So one rank's bad loss reaches all ranks through the averaging of the gradients, and all leave
    the update out alike.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def guarded_step(
    optimizer: torch.optim.Optimizer, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip, then update, unless a gradient is not finite; decided on the device.

    An update left out leaves weights, moments and step counts bit-unchanged.

    Returns:
        The norm of the gradient before clipping, and 1 if the update was left out; 0-dim tensors.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if clip > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    skipped = (~norm.isfinite()).float()
    # The fused kernel's own switch, as GradScaler uses it.
    optimizer.grad_scale, optimizer.found_inf = None, skipped
    if skipped.device.type != "mps" or not skipped.item():  # Apple's kernel has no such switch
        optimizer.step()
    return norm, skipped
