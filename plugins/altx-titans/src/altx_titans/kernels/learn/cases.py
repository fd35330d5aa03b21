"""Calls of the loop over chunks to verify and to time its backends with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from altx_kernels.examples import Example, Workload, randn
from altx_kernels.trees import map_leaves
from altx_titans.fast import Network, Norm
from altx_titans.kernels.learn.reference import Chunks


def network(width: int, **form: Any) -> Network:
    """One layer, with the mean's gradient."""
    return Network(1, **{"norm": True, "eps": 1e-2, "factor": 2 / width, **form})


def call(
    batch: int, heads: int, chunks: int, tokens: int, width: int, *, biased: bool = False, scaled: bool = False,
    momentum: bool = True, reads: bool = True, learned: bool = False, anew: bool = False, **form: Any,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of a call with random numbers.

    Args:
        batch: B, and so on: H, N, C, d.
        biased: whether the layer has a bias.
        scaled: whether the norm's scale is one of the weights.
        momentum: whether there is any.
        reads: whether there are queries.
        learned: whether the norm has a gain and a bias of the model's.
        anew: whether some rows start afresh on the way.
        form: of the network.
    """

    def state(seed: int, size: float = 0.3) -> dict[str, Tensor]:
        shapes = {"w1": (width, width)} | ({"b1": (1, width)} if biased else {})
        shapes |= {"scale": (1, width)} if scaled else {}
        return {name: size * randn(batch, heads, *s, seed=seed + i) for i, (name, s) in enumerate(shapes.items())}

    lead = (batch, heads, chunks)
    share = 0.3 * randn(*lead, tokens, tokens, seed=4).sigmoid().tril()
    given = Chunks(
        key=torch.nn.functional.normalize(randn(*lead, tokens, width, seed=1), dim=-1),
        value=randn(*lead, tokens, width, seed=2),
        query=randn(*lead, tokens, width, seed=3) if reads else None,
        keep=randn(*lead, tokens, seed=5).sigmoid(),
        drift=randn(*lead, tokens, seed=6).sigmoid() if momentum else None,
        share=share,
        last_keep=randn(*lead, seed=7).sigmoid(),
        last_drift=randn(*lead, seed=8).sigmoid() if momentum else None,
        last_share=0.3 * randn(*lead, tokens, seed=9).sigmoid(),
        moving_keep=randn(*lead, seed=10).sigmoid() if momentum else None,
        moving_share=0.3 * randn(*lead, tokens, seed=11).sigmoid() if momentum else None,
        full=torch.arange(batch * chunks).view(batch, chunks) % 3 != 1,
        anew=torch.arange(batch * chunks).view(batch, chunks) % 4 == 2 if anew else None,
    )
    arguments = {
        "network": network(width, **form),
        "chunks": given,
        "weights": state(20),
        "start": state(30),
        "moving": state(40) if momentum else {},
        "fresh": state(50) if anew else {},
        "norm": Norm(1 + 0.2 * randn(heads, 1, width, seed=60), 0.2 * randn(heads, 1, width, seed=61))
        if learned
        else Norm(1.0, 0.0),
    }
    return {name: map_leaves(_leaf, value) for name, value in arguments.items()}


def _leaf(name: str, tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def examples() -> Iterator[Example]:
    """Small calls: ragged sizes, with and without each of norm, bias, scale, momentum, bound, queries, resets."""
    settings: list[tuple[tuple[int, int, int, int, int], dict[str, Any]]] = [
        ((2, 2, 3, 4, 6), {"biased": True, "learned": True}),
        ((1, 3, 2, 5, 17), {"scaled": True, "bound": 0.3}),
        ((3, 1, 4, 3, 8), {"norm": False, "anew": True, "bound": 0.1}),
        ((2, 1, 3, 2, 5), {"biased": True, "scaled": True, "learned": True, "anew": True}),
        ((2, 2, 2, 16, 16), {"momentum": False, "learned": True}),
        ((2, 1, 1, 1, 4), {"reads": False, "scaled": True}),
        ((0, 2, 2, 3, 4), {}),
    ]
    for sizes, rest in settings:
        label = " ".join(f"{letter}={size}" for letter, size in zip("BHNCd", sizes, strict=True))
        yield Example(" ".join([label, *rest]), call(*sizes, **rest))


def workloads() -> Iterator[Workload]:
    """1,024 tokens of TTT-Linear, and of Titans with a matrix."""
    batch, heads, chunks, tokens, width = sizes = (1, 4, 64, 16, 64)
    for label, form in (("TTT-Linear", {"biased": True, "learned": True}), ("Titans", {"scaled": True, "bound": 1.0})):
        numbers = batch * heads * (chunks * tokens * (4 * width + tokens + 4) + 6 * width * width)
        products = 2 * chunks * tokens * width * (5 * width + 2 * tokens)
        yield Workload(
            f"{label} B={batch} H={heads} N={chunks} C={tokens} d={width}",
            partial(_timed, sizes, form),
            bytes=partial(_bytes, numbers),
            flops=batch * heads * products,
        )


def _bytes(numbers: int, dtype: torch.dtype) -> float:
    return numbers * dtype.itemsize


def _timed(sizes: tuple[int, ...], form: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    def cast(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device)
        return tensor.detach().to(device, dtype).requires_grad_()

    return {name: map_leaves(cast, value) for name, value in call(*sizes, **form).items()}
