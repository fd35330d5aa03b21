"""When a single token may pass a mixer as one op, past the modules that it is made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from altx.context import Context
from altx.layer import Layer
from altx.state import State
from altx_mamba.gated_norm import GatedRMSNorm
from altx_mamba.kernels.one_token import ROWS

DTYPES = (torch.float32, torch.float64)
"""In others, torch's matrix products are worth more than one op."""

PLAIN = (nn.Linear, nn.Conv1d, GatedRMSNorm)


def steps(mixer: Layer, x: Tensor, ctx: Context, state: State | None) -> bool:
    """Whether x (B, T, D) is one token of a few rows, with a state, and nothing about it or the mixer is special.

    A module that was replaced (an adapter such as LoRA's, a quantised one), parametrised, or given a hook has to be
    called: an op that only knows its weight would leave out what it adds. And where no native code would run, the
    mixer's own ops are faster than such an op's reference.
    """
    if x.shape[1] != 1 or state is None or ctx.mask is not None or ctx.reset is not None:
        return False
    if x.shape[0] > ROWS or x.dtype not in DTYPES or x.device.type != "cpu":
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    for child in mixer._modules.values():
        if child is not None and (type(child) not in PLAIN or child._forward_hooks or child._forward_pre_hooks):
            return False
    return True
