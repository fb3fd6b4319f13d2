"""Learning-rate schedules by the number of steps, which only the trainer knows."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, PolynomialLR


def one_cycle(
    optimizer: Optimizer, total_steps: int, warmup: float = 0.3, final_divisor: float = 1e4
) -> LRScheduler:
    """Up to the optimiser's rate and down again along cosines (Smith & Topin 2018).

    Args:
        optimizer: whose rate is the peak.
        total_steps: optimiser steps of the whole training.
        warmup: share of the steps before the peak.
        final_divisor: the last rate is the first (a 25th of the peak) divided by this.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(
        optimizer,
        max_lr=peaks,
        total_steps=total_steps,
        pct_start=warmup,
        final_div_factor=final_divisor,
    )


def poly(optimizer: Optimizer, total_steps: int, power: float = 0.9) -> LRScheduler:
    """rate x (1 - step / total_steps) ** power (Chen et al., DeepLab, 2017, section 4.1)."""
    return PolynomialLR(optimizer, total_iters=total_steps, power=power)
