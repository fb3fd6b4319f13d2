"""Learning-rate schedules by the number of steps, which only the trainer knows."""

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from seg_torch.errors import InputError, reason
from seg_torch.training.optimizers import arguments

MANY_STEPS = 1_000_000  # of a training, to try a schedule before there is one

# poly and cosine compute the rate from the step alone. torch's PolynomialLR and CosineAnnealingLR
# multiply the last rate, so a finished run that is resumed for more epochs would stay at zero.


def one_cycle(
    optimizer: Optimizer, total_steps: int, warmup: float = 0.3, final_divisor: float = 1e4
) -> LRScheduler:
    """Return a schedule up to the optimizer's rate and down again along cosines.

    Source: Smith & Topin, Super-Convergence (2018).

    Args:
        optimizer: Its rate is the peak.
        total_steps: Optimizer steps of the whole training.
        warmup: Share of the steps before the peak.
        final_divisor: The last rate is the first (a 25th of the peak) divided by this.
    """
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=total_steps,
        pct_start=warmup,
        final_div_factor=final_divisor,
    )


def poly(optimizer: Optimizer, total_steps: int, power: float = 0.9) -> LRScheduler:
    """Return the schedule rate x (1 - step / total_steps) ** power.

    Source: Chen et al., DeepLab (2017), section 4.1.

    Args:
        optimizer: Its rate is the first.
        total_steps: Optimizer steps of the whole training.
        power: Exponent.
    """
    return LambdaLR(optimizer, lambda step: max(1 - step / total_steps, 0) ** power)


def cosine(optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Return the schedule rate x (1 + cos(pi x step / total_steps)) / 2.

    Source: Loshchilov & Hutter, SGDR (2017), equation 5, without restarts.

    Args:
        optimizer: Its rate is the first.
        total_steps: Optimizer steps of the whole training.
    """
    return LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * min(step / total_steps, 1))) / 2
    )


def check_scheduler(make_scheduler: Callable[..., LRScheduler], optimizer: Optimizer) -> None:
    """Refuse what a schedule refuses, by building it and taking its first step.

    Args:
        make_scheduler: As for `scheduler_config`.
        optimizer: Of parameters that are not needed: its rates change.

    Raises:
        InputError: A setting is missing, unknown or impossible.
    """
    config = scheduler_config(make_scheduler, optimizer, total_steps=MANY_STEPS)
    optimizer.step()  # which a schedule waits for; without gradients nothing happens
    try:
        config["scheduler"].step(*([0.0] if config["reduce_on_plateau"] else []))
    except Exception as error:
        raise _refused(error, arguments(make_scheduler)) from error


def _refused(error: Exception, settings: list[str]) -> InputError:
    return InputError(f"scheduler: {reason(error)} (its settings: {', '.join(settings)})")


def scheduler_config(
    make_scheduler: Callable[..., LRScheduler], optimizer: Optimizer, total_steps: int
) -> dict[str, Any]:
    """Build a schedule and tell Lightning when to step it.

    Args:
        make_scheduler: Function or class of (optimizer, ...) with its settings, as a partial. One
            that takes `total_steps` gets it by name, unless it is set, and steps after each
            optimizer step; every other one steps after each epoch.
        optimizer: The optimizer.
        total_steps: Optimizer steps of the whole training.

    Returns:
        Lightning's `lr_scheduler` dictionary: `scheduler`, `interval` ("step" or "epoch"),
        `reduce_on_plateau` (it is stepped on the `monitor` value), `monitor` and `strict`.

    Raises:
        InputError: A setting is missing, unknown or impossible.
    """
    settings = arguments(make_scheduler)
    by_step = "total_steps" in settings
    options = {}
    if by_step and getattr(make_scheduler, "keywords", {}).get("total_steps") is None:
        # Training for 0 epochs only scores, and some schedules refuse a length of 0.
        options["total_steps"] = max(total_steps, 1)
    try:
        scheduler = make_scheduler(optimizer, **options)
    except Exception as error:  # of any type: PyTorch looks at few of its settings itself
        raise _refused(error, settings) from error
    on_plateau = isinstance(scheduler, ReduceLROnPlateau)
    return {
        "scheduler": scheduler,
        "interval": "step" if by_step and not on_plateau else "epoch",
        "reduce_on_plateau": on_plateau,
        "monitor": "val/loss",
        "strict": False,  # epochs without validation have no value to monitor
    }
