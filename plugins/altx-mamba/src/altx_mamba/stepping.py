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

PLAIN = (nn.Linear, nn.Conv1d, nn.RMSNorm, GatedRMSNorm)


def steps(mixer: Layer, x: Tensor, ctx: Context, state: State | None, norm: nn.Module | None = None) -> bool:
    """Whether x (B, T, D) is one token of a few rows, with a state, and nothing about it or the mixer is special.

    A module that was replaced (an adapter such as LoRA's, a quantised one), parametrised, or given a hook has to be
    called: an op that only knows its weight would leave out what it adds. And where no native code would run, the
    mixer's own ops are faster than such an op's reference.

    Args:
        norm: the norm that the op would apply as well, in a call that passes the mixer's own `forward` by.
    """
    if x.shape[1] != 1 or state is None or ctx.mask is not None or ctx.reset is not None:
        return False
    if x.shape[0] > ROWS or x.dtype not in DTYPES or not x.is_cpu:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    for child in mixer._modules.values():
        if child is not None and not plain(child):
            return False
    return norm is None or (type(norm) is nn.RMSNorm and plain(norm) and not hooked(mixer) and norm.eps is not None)


def plain(module: nn.Module) -> bool:
    """Whether a module is no more than its weights."""
    return type(module) in PLAIN and not hooked(module)


def hooked(module: nn.Module) -> bool:
    """Whether somebody wants to know of a module's calls, or changes them."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def weight_and_eps(norm: nn.Module | None) -> tuple[Tensor | None, float]:
    """Of an RMSNorm, if there is one."""
    return (norm._parameters["weight"], norm.eps or 0.0) if isinstance(norm, nn.RMSNorm) else (None, 0.0)


def counter(state: State, ctx: Context) -> Tensor:
    """(B,) int64, the tokens that each row has seen: the state's own where it was given up, for an op to move on."""
    seen = state.seen
    assert seen is not None
    return seen if ctx.donate_state and seen.is_contiguous() else seen.clone(memory_format=torch.contiguous_format)
