"""What a model costs: parameters, state, FLOPs; and the width that a parameter budget buys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from altx.adapters import Unpack
from altx.block import Residual
from altx.config import ModelConfig, TokensInput
from altx.errors import AltxError, ConfigError
from altx.layer import FRESH, Layer, components
from altx.model import Model
from altx.resolve import Blueprint
from altx.segment_loop import SegmentLoop


@dataclass(frozen=True)
class Costs:
    """Costs of a model, or of one of its layers.

    Args:
        parameters: number of them, shared ones once.
        state_bytes: of one sequence before its first token, with no room reserved.
        state_bytes_per_token: by which each token grows it.
        flops_per_token: forward, matrix products and elementwise work, averaged over a fresh sequence.
    """

    parameters: int
    state_bytes: int | None
    state_bytes_per_token: float | None
    flops_per_token: float


def num_parameters(module: nn.Module) -> int:
    """Parameters of a module, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def state_growth(layer: Layer | Model) -> tuple[int | None, float | None]:
    """Bytes of a fresh state, and bytes that each token adds; None for a layer that cannot stream."""
    if layer.capabilities.streaming == "none":
        return None, None
    few, many = 1024, 2048
    sizes = []
    for capacity in (0, few, many):
        state = layer.init_state(1, capacity=capacity)
        sizes.append(state.bytes() if state else 0)
    return sizes[0], (sizes[2] - sizes[1]) / (many - few)


class _Flops(TorchDispatchMode):
    """Counts FLOPs of what runs: torch's own formulas for matrix products, one per element for the rest."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it bare
        self.total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += int(flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out))
        elif torch.Tag.pointwise in func.tags and isinstance(out, Tensor):
            self.total += out.numel()
        elif torch.Tag.reduction in func.tags and isinstance(args[0], Tensor):
            self.total += args[0].numel()
        return out


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of a call, without gradients."""
    counter = _Flops()
    with torch.no_grad(), counter:
        call()
    return counter.total


def costs(model: Model, length: int = 64) -> Costs:
    """Costs of a model. A model on the meta device is measured without being computed."""
    length = min(length, model.capabilities.max_len or length)
    inputs = example_inputs(model, 1, length)
    state, growth = state_growth(model)
    return Costs(num_parameters(model), state, growth, count_flops(lambda: model(inputs)) / length)


def layer_costs(layer: Layer, dim: int, length: int = 64, shared: dict[str, Tensor] | None = None) -> Costs:
    """Costs of one layer by itself.

    Args:
        shared: what earlier layers exported over `length` tokens; receives what this one exports.
    """
    shared = {} if shared is None else shared
    length = min(length, layer.capabilities.max_len or length)
    weight = next(layer.parameters(), torch.empty(0))
    x = torch.zeros(1, length, dim, device=weight.device, dtype=weight.dtype)
    if "token_ids" in layer.capabilities.requires:
        shared.setdefault("token_ids", torch.zeros(1, length, dtype=torch.int64, device=x.device))
    ctx = FRESH.replace(causal=layer.capabilities.causal, shared=dict(shared))
    state, growth = state_growth(layer)
    flops = count_flops(lambda: shared.update(layer(x, ctx).exports))
    return Costs(num_parameters(layer), state, growth, flops / length)


def example_inputs(model: Model, batch: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Random inputs of the shape and dtype that a model takes, on its device."""
    weight = next(model.parameters())
    if isinstance(model.config.input, TokensInput):
        tokens = torch.randint(model.config.input.vocab, (batch, length), generator=generator)
        return tokens.to(weight.device)
    vectors = torch.randn(batch, length, model.config.input.size, generator=generator, dtype=torch.float64)
    return vectors.to(weight.device, weight.dtype)


def solve_width(config: ModelConfig, budget: int, build: Callable[[ModelConfig], Model], step: int = 16) -> ModelConfig:
    """The config at the width, a multiple of `step`, whose parameter count is nearest to a budget.

    Args:
        build: builds a model on the meta device.

    Raises:
        ConfigError: if no width that all parts accept comes within 20 % of the budget.
    """

    def size(width: int) -> int | None:
        try:
            return num_parameters(build(config.model_copy(update={"dim": width})))
        except AltxError:
            return None

    def nearby(width: int) -> tuple[int, int] | None:
        # Heads and groups make some widths illegal, so look around a little.
        for offset in (o for k in range(9) for o in ((k, -k) if k else (0,))):
            candidate = width + offset * step
            if candidate > 0 and (count := size(candidate)) is not None:
                return candidate, count
        return None

    low, high = 1, 2
    while (found := nearby(high * step)) and found[1] < budget and high * step < 1 << 16:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        found = nearby(middle * step)
        if found and found[1] < budget:
            low = middle
        else:
            high = middle
    options = [found for multiple in (low, high) if (found := nearby(multiple * step))]
    if not options:
        build(config)  # Says what is wrong with the parts themselves.
        raise ConfigError("params: no width up to 65536 suits all parts")
    width, count = min(options, key=lambda found: abs(found[1] - budget))
    if abs(count - budget) > 0.2 * budget:
        raise ConfigError(
            f"params: the nearest to {budget:,} is {count:,}, at dim {width}",
            hint="change the number of layers, or give dim yourself",
        )
    return config.model_copy(update={"dim": width})


def branch_layers(model: Model, blueprint: Blueprint) -> list[tuple[int, int, Layer]]:
    """(block, sublayer, body) of every sublayer of a model."""
    stack: Any = model.body
    while isinstance(stack, (Unpack, SegmentLoop)):
        stack = stack.inner
    blocks = [[sublayer for _, sublayer in components(block)] for _, block in components(stack)]
    return [
        (b, s, sublayer.body)
        for b, s in ((b, s) for b, branches in enumerate(blueprint.blocks) for s in range(len(branches)))
        if isinstance(sublayer := blocks[b][s], Residual)
    ]
