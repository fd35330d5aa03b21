"""The CUDA kernels of the package causal-conv1d (Tri Dao), where it is installed."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from altx_kernels.causal_conv1d.torch import last_inputs


@cache
def probe() -> str | None:
    """Why it cannot run anything here, or None."""
    if find_spec("causal_conv1d") is None:
        return "the package causal-conv1d is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        importlib.import_module("causal_conv1d")
    except Exception as error:  # a broken extension fails in many ways
        return f"importing causal_conv1d fails: {error}"
    return None


def absent() -> str | None:
    """As `probe`, which a compiled graph knows as a constant."""
    return probe()


# All that torch.compiler.assume_constant_result does, but for the time that it takes to import the compiler.
absent._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unavailable(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> str | None:
    """Why it cannot run a call, or None."""
    if x.device.type != "cuda":
        return f"x is on {x.device}, and it is for CUDA"
    if not x.numel():
        return "there are no tokens"
    if not 2 <= weight.shape[1] <= 4:
        return f"weight has {weight.shape[1]} taps, and it is for 2 to 4"
    if any(t is not None and t.dtype == torch.float64 for t in (x, weight, bias, initial_state)):
        return "it does not compute in float64"
    if initial_state is not None and (reset is not None or cu_seqlens is not None):
        return "it takes an initial state or several sequences in a row, not both"
    if x.shape[2] % 8 or (x.stride(2) == 1 and (x.stride(0) % 8 or x.stride(1) % 8)):
        return "channels and strides are no multiples of 8"
    return None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: bool = False,
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    fn = importlib.import_module("causal_conv1d").causal_conv1d_fn
    x = x if x.stride(2) == 1 else x.contiguous()
    starts = reset
    if cu_seqlens is not None:
        # Empty sequences at the end start behind the last token.
        first = torch.zeros(1, x.shape[1] + 1, dtype=torch.bool, device=x.device)
        first[:, cu_seqlens[:-1].long()] = True
        starts = first[:, :-1] if reset is None else first[:, :-1] | reset
    y = fn(
        x.transpose(1, 2),
        weight,
        None if bias is None else bias.to(weight.dtype),
        seq_idx=None if starts is None else starts.cumsum(1).to(torch.int32),
        # With the strides of x, whose channels lie side by side.
        initial_states=None if initial_state is None else initial_state.to(x.dtype).contiguous().transpose(1, 2),
        activation="silu" if activation else None,
    )
    return y.transpose(1, 2), _final(x, weight.shape[1], initial_state, starts, cu_seqlens, lengths)


def _final(
    x: Tensor,
    width: int,
    initial_state: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    window = torch.cat([initial_state.to(x.dtype), x], 1)
    if cu_seqlens is None:
        return last_inputs(window, width, starts, lengths).to(initial_state.dtype)
    # As many rows as sequences, each of which ends where its sequence does.
    count = len(cu_seqlens) - 1
    assert starts is not None
    inputs = last_inputs(window.expand(count, -1, -1), width, starts.expand(count, -1), cu_seqlens[1:].long())
    return torch.where((cu_seqlens.diff() == 0)[:, None, None], 0, inputs)
