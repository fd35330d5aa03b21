"""Configs and capabilities of `titans` and `ttt`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from altx.capabilities import MemoryCapabilities
from altx.config import Config


class TitansConfig(Config):
    """Config of `titans`.

    The defaults are the paper's deep memory. They learn what is told once; in chunks of 4 they learned it worse, at
    three times the cost. A matrix alone (depth 1, no residual_norm) wants such chunks, or a larger max_lr: with `auto`,
    a token in a chunk of 16 stores a 16th of its value at most. README of altx-titans has the figures.
    """

    heads: int = Field(4, gt=0, description="memories side by side H")
    head_dim: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto", description="width d of keys, values and queries; auto: 64, or model width / heads where that is less"
    )
    depth: Literal[1, 2] = Field(2, description="layers of the network that is the memory: 1 is a matrix, 2 an MLP")
    expansion: float = Field(4.0, gt=0, description="hidden width of an MLP as a multiple of head_dim")
    residual_norm: bool = Field(
        True, description="normalise what the network gives and add its input; the norm's scale is learned with it"
    )
    chunk: int = Field(16, gt=0, description="tokens whose surprise is measured at the same weights, C")
    norm_eps: float = Field(
        0.01, gt=0, description="of residual_norm's variance; what is forgotten shrinks, and gradients grow by its root"
    )
    momentum: bool = Field(True, description="past surprise lasts beyond its token")
    dampening: bool = Field(True, description="a step is as large in the end, however long its momentum lasts")
    order: Literal["read-write", "write-read"] = Field(
        "read-write", description="whether a token reads before it is written, or after"
    )
    max_lr: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="largest step size; auto: head_dim / (2 chunk), with which a chunk of equal keys, all of whose "
        "steps are taken at the same weights, moves a matrix to its value and not beyond",
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="a token's gradient of a matrix is scaled down to this norm; null: never"
    )
    qk_norm: Literal["l2", "none"] = Field("l2", description="how queries and keys are normalised")
    activation: Literal["silu", "none"] = Field("silu", description="after the projections to queries, keys, values")
    decay_bias: float = Field(-7.0, description="what a token forgets at the start, before the sigmoid")

    def width(self, dim: int) -> int:
        """d at model width `dim`."""
        return max(1, min(64, dim // self.heads)) if self.head_dim == "auto" else self.head_dim

    def step(self, dim: int) -> float:
        """The largest step size at model width `dim`."""
        return self.width(dim) / (2 * self.chunk) if self.max_lr == "auto" else self.max_lr

    def fit(self, dim: int) -> None:
        width = self.width(dim)
        if self.residual_norm and width < 2:
            raise ValueError(
                f"residual_norm normalises over head_dim, which is {width} at dim {dim} with {self.heads} heads; "
                f"use {max(1, dim // 2)} heads or fewer, a head_dim of 2 or more, or residual_norm: false"
            )
        if self.depth == 2 and int(width * self.expansion) < 1:
            raise ValueError(
                f"expansion {self.expansion} of head_dim {width} leaves no hidden unit; use {1 / width} or more"
            )


def capabilities(config: TitansConfig) -> MemoryCapabilities:
    """Streams in any pieces: the state holds the weights at the start of the open chunk."""
    return MemoryCapabilities(growth="constant", rollback="snapshot", order=config.order)


class TTTConfig(Config):
    """Config of `ttt`. The defaults are those of the paper and of its authors' code."""

    layers: Literal[1, 2] = Field(1, description="of the network that is the memory: 1 is TTT-Linear, 2 is TTT-MLP")
    heads: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto", description="networks side by side H; auto: as many as are of width 64 or more"
    )
    chunk: int = Field(16, gt=0, description="tokens of a mini-batch C, whose gradients are taken at the same weights")
    base_lr: float = Field(1.0, gt=0, description="largest step size, before it is divided by a head's width")
    gate: bool = Field(False, description="multiply what is read by a gelu of the input")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary embedding within a mini-batch")

    def count(self, dim: int) -> int:
        """H at model width `dim`."""
        if self.heads != "auto":
            return self.heads
        return next((n for n in range(dim // 64, 1, -1) if dim % (2 * n) == 0), 1)

    def fit(self, dim: int) -> None:
        heads = self.count(dim)
        if dim % (2 * heads):
            fitting = [n for n in range(1, dim // 2 + 1) if dim % (2 * n) == 0]
            means = f"use {', '.join(map(str, fitting))} heads" if fitting else "use an even dim"
            raise ValueError(f"{heads} heads at dim {dim} have no even width, which turning pairs takes; {means}")


def ttt_capabilities(config: TTTConfig) -> MemoryCapabilities:
    """Streams in any pieces: the state holds the gradients of the open mini-batch."""
    return MemoryCapabilities(growth="constant", rollback="snapshot", order="write-read")
