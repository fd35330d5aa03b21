"""Batches of sequences as an op sees them: rows of a batch, or sequences end to end in one row."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from altx_kernels.op import KernelError


def bounds(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where each sequence starts among the B * T tokens of x (B, T, ...), and where the last ends.

    What reads memory by them asks here, where their values are looked at: a compiled graph has not done so.

    Returns:
        (N+1,) int64 on the CPU; N is B without cu_seqlens.

    Raises:
        KernelError: if cu_seqlens does not cut x into sequences.
    """
    if cu_seqlens is None:
        return torch.arange(x.shape[0] + 1) * x.shape[1]
    cuts = cu_seqlens.to("cpu", torch.int64).contiguous()
    check_cu_seqlens(x, cuts)
    return cuts


def check_cu_seqlens(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Number of sequences in x (B, T, ...).

    Raises:
        KernelError: if cu_seqlens does not cut x into sequences.
    """
    if cu_seqlens is None:
        return x.shape[0]
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or not len(cu_seqlens):
        raise KernelError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}",
            hint="pass the N+1 bounds of N sequences: one dimension, int64, e.g. torch.tensor([0, 5, 12])",
        )
    if x.shape[0] != 1:
        raise KernelError(
            f"a packed batch has one row, not {x.shape[0]}", hint="lay the sequences end to end: x of shape (1, T, ...)"
        )
    # Values are only looked at where that costs no synchronisation and breaks no graph.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        steps = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != x.shape[1] or bool((steps < 0).any()):
            raise KernelError(
                f"cu_seqlens {cu_seqlens.tolist()[:8]} does not rise from 0 to the {x.shape[1]} tokens",
                hint="it starts with 0, never falls, and ends with the number of tokens",
            )
    return len(cu_seqlens) - 1


def token_rows(x: Tensor) -> tuple[Tensor, int]:
    """x (B, T, ...) so that one stride leads from each of its B * T tokens to the next, each contiguous.

    Returns:
        x itself, or a copy where it lies otherwise; the stride.
    """
    batch, length = x.shape[:2]
    width = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != width:
            return x.contiguous(), x.shape[2:].numel()
        width *= size
    if length == 1:
        return x, x.stride(0)
    if batch == 1 or x.stride(0) == length * x.stride(1):
        return x, x.stride(1)
    return x.contiguous(), width


def one_by_one(
    fn: Callable[..., tuple[Tensor, Tensor]], cu_seqlens: Tensor, per_token: dict[str, Tensor | None],
    initial_state: Tensor | None, **rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A packed batch by calls of `fn` with one sequence each: what a backend without packing does.

    Args:
        fn: takes the tensors of `per_token`, `initial_state` and `rest` by name; returns (y, state).
        cu_seqlens: (N+1,).
        per_token: tensors (1, T, ...), cut at cu_seqlens.
        initial_state: (N, ...) or None.
        rest: what every call gets.

    Returns:
        y (1, T, ...) and states (N, ...).
    """
    cuts = cu_seqlens.tolist()
    if len(cuts) == 1:  # no sequence: what one without tokens would give, but for its state
        y, none = fn(**per_token, initial_state=None, **rest)
        return y, none[:0]
    ys, states = [], []
    for n, (start, stop) in enumerate(pairwise(cuts)):
        piece = {name: None if value is None else value[:, start:stop] for name, value in per_token.items()}
        state = None if initial_state is None else initial_state[n : n + 1]
        y, state = fn(**piece, initial_state=state, **rest)
        ys.append(y)
        states.append(state)
    return torch.cat(ys, 1), torch.cat(states, 0)
