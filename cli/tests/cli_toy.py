"""A plugin for the tests of the command line: one mixer, and a memory that shares its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from altx import BuildContext, MemorySpec, MixerSpec, hookimpl
from altx.capabilities import Capabilities, MemoryCapabilities
from altx.config import Config

if TYPE_CHECKING:
    from collections.abc import Iterable


class AverageConfig(Config):
    """Config of `average`."""

    deaf: bool = Field(False, description="break the law of gradients")
    curious: bool = Field(False, description="look at values, which a model on meta does not have")
    silent: bool = Field(False, description="return one channel")
    rate: float = Field(0.5, gt=0, description="not used")

    def fit(self, dim: int) -> None:
        if dim % 8:
            raise ValueError("it is not a multiple of 8")


def capabilities(config: AverageConfig) -> Capabilities:
    return Capabilities(growth="constant", rollback="snapshot")


def memory_capabilities(config: AverageConfig) -> MemoryCapabilities:
    return MemoryCapabilities(growth="constant", rollback="snapshot")


def build(config: AverageConfig, ctx: BuildContext) -> Any:
    from dataclasses import replace

    import torch

    from altx.testing.partners import MovingAverage

    print("a plugin that prints")
    mixer = MovingAverage(ctx.dim)
    if config.deaf:
        mixer.unused = torch.nn.Parameter(torch.zeros(1))
    if config.silent:
        mixer.register_forward_hook(lambda module, args, out: replace(out, y=out.y[..., :1]))
    if config.curious:
        mixer.register_forward_pre_hook(lambda module, args: (bool(args[0].sum() > 0), args)[1])
    return mixer


@hookimpl
def altx_token_mixers() -> Iterable[MixerSpec]:
    return [
        MixerSpec(
            name,
            summary="A moving average",
            description="h <- a h + (1 - a) W x",
            build="cli_toy:build",
            config="cli_toy:AverageConfig",
            capabilities="cli_toy:capabilities",
            paper="folklore",
        )
        for name in ("average", "both")
    ]


@hookimpl
def altx_memories() -> Iterable[MemorySpec]:
    return [
        MemorySpec(
            "both",
            summary="A memory with the name of a mixer",
            build="cli_toy:build",
            config="cli_toy:AverageConfig",
            capabilities="cli_toy:memory_capabilities",
            attach=("residual", "gate"),
            default_attach="residual",
            attach_note="There is also gate.",
        )
    ]
