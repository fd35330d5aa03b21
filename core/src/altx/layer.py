"""The contract: what every component is, and the one call signature of every layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.capabilities import Capabilities
from altx.context import Context
from altx.spec import Heads
from altx.state import State

FRESH = Context()
"""The default context: causal, every token real, one sequence per row."""


@dataclass(frozen=True)
class Output:
    """What a layer returns.

    Args:
        y: (B, T, D).
        state: the advanced state if one was given.
        losses: unscaled auxiliary losses, scalars.
        metrics: detached tensors to look at; never synchronises with the host.
        exports: values for later layers' `ctx.shared`, each (B, T, ...).
    """

    y: Tensor
    state: State | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    exports: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepInfo:
    """What `on_step` is told after an optimizer step.

    Args:
        step: number of optimizer steps taken.
        metrics: the step's metrics, summed over its micro-batches and ranks, by path below the receiver.
    """

    step: int
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def below(self, path: str) -> StepInfo:
        """What the component at `path` is told."""
        return StepInfo(self.step, {k[len(path) + 1 :]: v for k, v in self.metrics.items() if k.startswith(path + ".")})


class StateOptions(TypedDict, total=False):
    """Keyword arguments of every `init_state`, for those that only pass them on.

    Args:
        capacity: tokens to reserve room for, where a state grows; it still grows beyond.
        device: default: that of the parameters.
        dtype: default: that of the parameters.
    """

    capacity: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class Component(nn.Module):
    """A layer, a memory or a router.

    It owns its initialisation (done when built, never redone by what contains it), its optimizer
    options and its updates outside autograd.
    """

    capabilities: Capabilities
    built_as: str = ""
    """Kind, name, plugin and version, of what composition had a plugin build; an error in its code is told with it."""

    def param_groups(self) -> dict[str, dict[str, Any]]:
        """Optimizer options by name of one of this component's own parameters, e.g. `{"A_log": {"weight_decay": 0.0}}`.

        Options are those of `torch.optim`: "lr" (absolute), "weight_decay"; and "lr_scale", by which the rate is
        multiplied.
        """
        return {}

    def on_step(self, info: StepInfo) -> None:
        """Called once per optimizer step, outside autograd. Shapes never change.

        The default passes it on to the components inside; an override of a container calls super.
        """
        for path, child in components(self):
            child.on_step(info.below(path))


def components(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Component]]:
    """The nearest components inside a module, with their paths."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, Component):
            yield path, child
        else:
            yield from components(child, path + ".")


def descendants(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Component]]:
    """All components inside a module, however deep, with their paths."""
    for path, child in components(module, prefix):
        yield path, child
        yield from descendants(child, path + ".")


class Layer(Component):
    """Maps a sequence (B, T, D) to a sequence (B, T, D)."""

    hands: Heads | None = None
    """What a layer that `accepts_kv` hands to `ctx.recall`."""

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State | None:
        """The state before the first token, or None for a layer that carries nothing.

        Args:
            batch: number of rows.
            capacity, device, dtype: see `StateOptions`.
        """
        return None

    @abstractmethod
    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        """Apply the layer.

        `state=None` is a whole sequence at once: the layer may use its fastest stateless path, and what
        comes back as state is not to be continued from (containers return None). With a state given, the
        advanced one is returned. T may be 1 (a step), 0, or anything the capabilities allow. Neither x
        nor the state is written to.

        Args:
            x: (B, T, D).
            ctx: everything else about the tokens.
            state: from `init_state` or an earlier call.
        """

    def residual(self, x: Tensor, norm: nn.Module, ctx: Context, state: State | None) -> Output | None:
        """x + self(norm(x)) in one go, if this layer knows a faster way for it, else None.

        What stands around a layer costs as much as a short step inside it. A layer that can fuse the three overrides
        this; nothing depends on it.

        Args:
            x, ctx, state: as in `forward`.
            norm: over the last axis. An override looks at what it is.
        """
        return None


def scoped(path: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses or metrics of the component at `path`, named by where it sits."""
    return {f"{path}.{name}": value for name, value in values.items()} if values else {}


def advanced(seen: Tensor | None, x: Tensor, ctx: Context) -> Tensor:
    """`seen` after the real tokens of x (B, T, ...): one number for each row, or for each packed sequence."""
    if ctx.cu_seqlens is not None:
        count = ctx.cu_seqlens if ctx.mask is None else F.pad(ctx.mask[0].cumsum(0), (1, 0))[ctx.cu_seqlens]
        count = count.diff()
    elif seen is not None and ctx.mask is None:
        return seen + x.shape[1]
    else:
        count = ctx.lengths(x)
    return count if seen is None else seen + count
