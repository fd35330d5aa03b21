"""A plugin for tests: one component of each kind, and some that refuse things."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from altx import BuildContext, MemorySpec, MixerSpec, RouterSpec, hookimpl
from altx.capabilities import Capabilities, MemoryCapabilities, RouterCapabilities
from altx.config import Config, RouterConfig
from altx.context import Context
from altx.layer import FRESH, Layer, Output, advanced
from altx.memory import Memory, Read
from altx.router import Route, Router, Targets
from altx.state import Leaf, State
from altx.testing.partners import Across, Ledger, MovingAverage, SelfAttention


class AverageConfig(Config):
    speed: float = Field(0.5, ge=0, le=1, description="for show")
    heads: int = Field(4, gt=0, description="the width must be divisible by it")

    def fit(self, dim: int) -> None:
        if dim % self.heads:
            raise ValueError(f"dim {dim} is not divisible by heads {self.heads}; use a multiple of {self.heads}")


class EmptyConfig(Config):
    pass


def average_capabilities(config: AverageConfig) -> Capabilities:
    return MovingAverage.capabilities


def build_average(config: AverageConfig, ctx: BuildContext) -> Layer:
    return MovingAverage(ctx.dim)


def whole_capabilities(config: Config) -> Capabilities:
    return Capabilities(causal=False, bidirectional=True, streaming="none")


def block_capabilities(config: Config) -> Capabilities:
    return Capabilities(streaming="none", masked=False, reset=False)


def needy_capabilities(config: Config) -> Capabilities:
    return Capabilities(requires=frozenset({"first_value"}))


def source_capabilities(config: Config) -> Capabilities:
    return replace(MovingAverage.capabilities, provides=frozenset({"first_value"}))


def sharer_capabilities(config: Config) -> Capabilities:
    return Sharer.capabilities


class Sharer(MovingAverage):
    """Adds to its input what the first of its kind was given; the first exports that."""

    capabilities = replace(MovingAverage.capabilities, shares=frozenset({"first_input"}))

    def __init__(self, dim: int, first: bool) -> None:
        super().__init__(dim)
        self.first = first

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        if not self.first:
            return super().forward(x + ctx.shared["first_input"], ctx, state)
        return replace(super().forward(x, ctx, state), exports={"first_input": x})


def build_sharer(config: Config, ctx: BuildContext) -> Layer:
    return Sharer(ctx.dim, "first_input" not in ctx.exported)


def chunky_capabilities(config: Config) -> Capabilities:
    return Capabilities(streaming="chunk", split_multiple=4, growth="constant", rollback="snapshot")


def paced_capabilities(config: Config) -> Capabilities:
    return replace(chunky_capabilities(config), partial="single")


def short_capabilities(config: Config) -> Capabilities:
    return replace(MovingAverage.capabilities, max_len=6)


def late_capabilities(config: Config) -> Capabilities:
    return Capabilities(streaming="none", requires=frozenset({"first_value"}))


class Notebook(Memory):
    """Reads the mean of what was written before."""

    capabilities = MemoryCapabilities(growth="constant", rollback="snapshot")

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.value = nn.Linear(dim, dim)

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        total = torch.zeros(batch, self.value.in_features, device=device, dtype=dtype)
        return State({"total": total}, {"total": Leaf(kind="memory")}, seen=torch.zeros(batch, dtype=torch.int64))

    def _start(self, state: State, ctx: Context) -> Tensor:
        total = state["total"]
        return total if ctx.reset is None else torch.where(ctx.reset[:, :1], 0, total)

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        return Read(self.value(q) * torch.tanh(self._start(state, ctx))[:, None]), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, dict[str, Tensor]]:
        assert u.shape[1] <= 1, "chunk 1"
        real = torch.ones(u.shape[:2], dtype=torch.bool) if ctx.mask is None else ctx.mask
        total = torch.where(
            real, 0.9 * self._start(state, ctx) + torch.where(real[..., None], u, 0).sum(1), state["total"]
        )
        loss = torch.where(real, u.square().mean(-1), 0).sum() / real.sum().clamp(min=1)
        assert state.seen is not None
        return state.replace(total=total, seen=advanced(state.seen, u, ctx)), {"size": loss}


class Pages(Memory):
    """Four tokens at a time: their mean is a page, and the last two pages and a title are read."""

    capabilities = MemoryCapabilities(
        growth="constant", rollback="snapshot", chunk=4, losses={"size": 0.1}, compiles=False
    )

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.title = nn.Parameter(torch.randn(dim))

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        empty = torch.zeros(batch, 3, len(self.title), device=device, dtype=dtype)
        leaves = {"pages": empty[:, :2], "open": empty[:, 2], "count": torch.zeros(batch, dtype=torch.int64)}
        return State(leaves, {name: Leaf(kind="memory") for name in leaves}, seen=leaves["count"])

    def offset(self, state: State) -> list[int]:
        return state["count"].tolist()

    def _start(self, state: State, ctx: Context) -> State:
        if ctx.reset is None:
            return state
        real = ctx.reset if ctx.mask is None else ctx.reset & ctx.mask
        fresh = self.init_state(len(real), dtype=state["open"].dtype)
        return fresh.where(real.any(1), state).replace(seen=state.seen)

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        assert q.shape[1] <= 4, "within a chunk"
        pages = self._start(state, ctx)["pages"]
        tokens = torch.cat([self.title.to(pages.dtype).expand(len(pages), 1, -1), pages], 1)
        return Read(value=q * tokens.mean(1, keepdim=True), tokens=tokens), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, dict[str, Tensor]]:
        start = self._start(state, ctx)
        real = torch.ones(u.shape[:2], dtype=torch.bool) if ctx.mask is None else ctx.mask
        page, count = start["open"] + torch.where(real[..., None], u, 0).sum(1) / 4, start["count"] + real.sum(1)
        assert int(count.max()) <= 4, "within a chunk"
        full = (count == 4)[:, None]
        pages = torch.where(full[..., None], torch.stack([start["pages"][:, 1], page], 1), start["pages"])
        new = state.replace(
            pages=pages, open=torch.where(full, 0, page), count=count % 4, seen=advanced(state.seen, u, ctx)
        )
        size = (u * real[..., None]).square().mean(-1).sum() / real.sum().clamp(min=1)
        return new.where(real.any(1), state), {"size": size}


class RelayConfig(Config):
    segment: int = Field(4, gt=0)


class Relay(Memory):
    """Two tokens before and after each segment; what becomes of the later ones goes to the next segment."""

    def __init__(self, dim: int, segment: int) -> None:
        super().__init__()
        self.capabilities = relay_capabilities(RelayConfig(segment=segment))
        self.start = nn.Parameter(torch.randn(2, dim))

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        return State({"held": self.start.to(device, dtype).expand(batch, -1, -1)}, {"held": Leaf(kind="memory")})

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        return Read(tokens=state["held"], after=state["held"] if ctx.causal else None), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, dict[str, Tensor]]:
        real = torch.ones(u.shape[:2], dtype=torch.bool) if ctx.mask is None else ctx.mask
        return state.replace(held=torch.where(real[..., None], torch.tanh(u), state["held"])), {}


class FirstConfig(RouterConfig):
    k: int = Field(1, gt=0)

    def fit_targets(self, n: int) -> None:
        if self.k > n:
            raise ValueError(f"k {self.k} is more than {n}")


class ToyRouter(Router):
    """Top-1 by a linear gate."""

    def __init__(self, dim: int, n: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, n)

    def route(self, x: Tensor, targets: Targets, ctx: Context = FRESH, state: State | None = None) -> Route:
        weight, target = self.gate(x).softmax(-1).max(-1)
        if ctx.mask is not None:
            target = torch.where(ctx.mask, target, -1)
        token = torch.arange(target.numel(), device=x.device)
        return Route(targets.n, token, target.reshape(-1), weight.reshape(-1))


def memory_capabilities(config: Config) -> MemoryCapabilities:
    return Notebook.capabilities


def ledger_capabilities(config: Config) -> MemoryCapabilities:
    return Ledger.capabilities


def relay_capabilities(config: RelayConfig) -> MemoryCapabilities:
    return MemoryCapabilities(
        growth="constant", rollback="snapshot", bidirectional=True, chunk=config.segment, tokens=4, scope="stack"
    )


def self_capabilities(config: Config) -> Capabilities:
    return SelfAttention.capabilities


def echo_capabilities(config: Config) -> MemoryCapabilities:
    return replace(Notebook.capabilities, feedback=True)


def oracle_capabilities(config: Config) -> RouterCapabilities:
    return RouterCapabilities(lookahead="batch", bidirectional=True)


def router_capabilities(config: Config) -> RouterCapabilities:
    return RouterCapabilities(bidirectional=True)


def seer_capabilities(config: Config) -> RouterCapabilities:
    return RouterCapabilities(lookahead="sequence", decode="forbid", causal=False, bidirectional=True, streaming="none")


def _mixer(name: str, config: str, capabilities: str, build: str = "build_average") -> MixerSpec:
    return MixerSpec(
        name,
        summary=f"{name} for tests",
        build=f"toy_plugin:{build}",
        config=f"toy_plugin:{config}",
        capabilities=f"toy_plugin:{capabilities}",
    )


def build_wrong(config: Config, ctx: BuildContext) -> object:
    return nn.Linear(2, 2)


def build_raises(config: Config, ctx: BuildContext) -> object:
    raise RuntimeError("no luck")


def build_notebook(config: Config, ctx: BuildContext) -> Memory:
    return Notebook(ctx.dim)


def build_ledger(config: Config, ctx: BuildContext) -> Memory:
    assert ctx.heads, "it is attached as kv only"
    return Ledger(ctx.heads)


def pages_capabilities(config: Config) -> MemoryCapabilities:
    return Pages.capabilities


def across_capabilities(config: Config) -> Capabilities:
    return Across.capabilities


def build_pages(config: Config, ctx: BuildContext) -> Memory:
    return Pages(ctx.dim)


def build_across(config: Config, ctx: BuildContext) -> Layer:
    return Across(ctx.dim)


def build_relay(config: RelayConfig, ctx: BuildContext) -> Memory:
    return Relay(ctx.dim, config.segment)


def build_self(config: Config, ctx: BuildContext) -> Layer:
    return SelfAttention(ctx.dim)


def build_router(config: Config, ctx: BuildContext) -> Router:
    return ToyRouter(ctx.dim, ctx.num_targets)


@hookimpl
def altx_token_mixers() -> list[MixerSpec]:
    return [
        _mixer("average", "AverageConfig", "average_capabilities"),
        _mixer("whole", "EmptyConfig", "whole_capabilities"),
        _mixer("block", "EmptyConfig", "block_capabilities"),
        _mixer("needy", "EmptyConfig", "needy_capabilities"),
        _mixer("source", "EmptyConfig", "source_capabilities"),
        _mixer("late", "EmptyConfig", "late_capabilities"),
        _mixer("sharer", "EmptyConfig", "sharer_capabilities", "build_sharer"),
        _mixer("chunky", "EmptyConfig", "chunky_capabilities"),
        _mixer("paced", "EmptyConfig", "paced_capabilities"),
        _mixer("short", "EmptyConfig", "short_capabilities"),
        _mixer("across", "EmptyConfig", "across_capabilities", "build_across"),
        _mixer("self", "EmptyConfig", "self_capabilities", "build_self"),
        _mixer("wrong", "EmptyConfig", "average_capabilities", "build_wrong"),
        _mixer("raises", "EmptyConfig", "average_capabilities", "build_raises"),
        _mixer("nowhere", "Missing", "average_capabilities"),
    ]


@hookimpl
def altx_memories() -> list[MemorySpec]:
    return [
        MemorySpec(
            name,
            summary=f"{name} for tests",
            build="toy_plugin:build_notebook",
            config="toy_plugin:EmptyConfig",
            capabilities=f"toy_plugin:{capabilities}",
            attach=("residual", "gate", "controller", "kv", "ffn"),
            default_attach="residual",
            attach_note="There is also controller.",
        )
        for name, capabilities in (("notebook", "memory_capabilities"), ("echo", "echo_capabilities"))
    ] + [
        MemorySpec(
            "ledger",
            summary="every key and value",
            build="toy_plugin:build_ledger",
            config="toy_plugin:EmptyConfig",
            capabilities="toy_plugin:ledger_capabilities",
            attach=("kv",),
            default_attach="kv",
        ),
        MemorySpec(
            "pages",
            summary="means of four tokens",
            build="toy_plugin:build_pages",
            config="toy_plugin:EmptyConfig",
            capabilities="toy_plugin:pages_capabilities",
            attach=("context", "residual", "gate"),
            default_attach="context",
        ),
        MemorySpec(
            "relay",
            summary="tokens around segments",
            build="toy_plugin:build_relay",
            config="toy_plugin:RelayConfig",
            capabilities="toy_plugin:relay_capabilities",
            attach=("tokens",),
            default_attach="tokens",
        ),
    ]


@hookimpl
def altx_routers() -> list[RouterSpec]:
    return [
        RouterSpec(
            name,
            summary=f"{name} for tests",
            build="toy_plugin:build_router",
            config="toy_plugin:FirstConfig",
            capabilities=f"toy_plugin:{name}_capabilities",
        )
        for name in ("router", "seer", "oracle")
    ]
