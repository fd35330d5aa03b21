"""AdamW's state as named tensors, for a file that holds data and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from altx.errors import CheckpointError

KEYS = {"exp_avg", "exp_avg_sq", "step"}
"""What AdamW keeps of a parameter."""


def _named(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Parameters by the names that `altx.optim.optimizer_groups` gives them."""
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def pack(optimizer: Optimizer) -> dict[str, Tensor]:
    """The moments and step counts of every parameter, as "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME"."""
    return {
        f"{key}/{name}": value.detach().contiguous()
        for name, parameter in _named(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def unpack(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer the state that `pack` took from one over the same parameters.

    Raises:
        CheckpointError: if the tensors belong to other parameters.
    """
    state: dict[Tensor, dict[str, Any]] = {}
    parameters = dict(_named(optimizer))
    for key_and_name, tensor in tensors.items():
        key, _, name = key_and_name.partition("/")
        parameter = parameters.get(name)
        if parameter is None or tensor.shape != (() if key == "step" else parameter.shape):
            raise CheckpointError(
                f"the optimizer's state has {key_and_name!r} {tuple(tensor.shape)}, which fits nothing"
            )
        # A step count stays on the CPU; moments live, laid out alike, beside their parameter.
        own = torch.empty_like(parameter).copy_(tensor) if key != "step" else tensor.clone()
        state.setdefault(parameter, {})[key] = own
    for name, parameter in parameters.items():
        if parameter in state and state[parameter].keys() != KEYS:
            raise CheckpointError(f"the optimizer's state of {name!r} has {', '.join(sorted(state[parameter]))}",
                                  hint=f"it needs {', '.join(sorted(KEYS))}")  # fmt: skip
    optimizer.state.update(state)
