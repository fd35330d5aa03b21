"""How the authors' code starts parameters, where it departs from torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def initial_dt_bias(size: int, dt_min: float, dt_max: float, floor: float) -> Tensor:
    """Biases (size,) whose softplus is log-uniform between dt_min and dt_max, and nowhere below `floor`."""
    dt = torch.empty(size).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


@torch.no_grad()
def zero_biases(*layers: nn.Linear) -> None:
    """Start the biases of these, where they have them, at zero."""
    for layer in layers:
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
