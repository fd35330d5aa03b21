"""Titans' long-term memory (Behrouz, Zhong & Mirrokni 2024, arXiv:2501.00663)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.layer import FRESH, advanced
from altx.memory import Memory, Read, Scan
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_kernels.autocast import no_autocast
from altx_titans.config import TitansConfig, capabilities
from altx_titans.fast import Network, Norm
from altx_titans.grid import Grid, lay
from altx_titans.kernels.learn import LEARN
from altx_titans.kernels.learn.reference import Chunks

PLAIN = Norm(1.0, 0.0)
KEPT = Leaf(kind="memory", fp32=True)


class Titans(Memory):
    """A network per head that is trained, token by token, to give v for k; its weights are the memory.

        S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2,    W_t = (1 - alpha_t) W_{t-1} + S_t       (13, 14)

    with the mean over the channels as |.|^2, and the gradient at the weights before the chunk's first token (section
    3.2). Momentum and decay act at every token, and every token reads the weights of its own time.

    Parameters are called as in titans-pytorch.

    Args:
        config: sizes and order.
        dim: model width D.

    Shape: x (B, T, D) to a read value (B, T, D). State, in at least float32: each weight of the network (B, H, ...)
    now, at the chunk's start (`start_...`) and its momentum (`momentum_...`); offset (B,), tokens of the open chunk.
    """

    def __init__(self, config: TitansConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = capabilities(config)
        heads, width = config.heads, config.width(dim)
        self.network = Network(
            config.depth, config.residual_norm, eps=config.norm_eps, factor=2 / width, bound=config.max_grad_norm
        )
        self.max_lr = config.step(dim)
        hidden = [width, *[int(width * config.expansion)] * (config.depth - 1), width]
        shapes = {"scale": (heads, width)} if config.residual_norm else {}
        self.names = [*shapes, *(f"w{n}" for n in range(1, config.depth + 1))]
        self.memory_model_parameters = nn.ParameterList(
            nn.Parameter(torch.empty(shape))
            for shape in [*shapes.values(), *((heads, *each) for each in pairwise(hidden))]
        )

        def projection() -> nn.Module:
            linear = nn.Linear(dim, heads * width, bias=False)
            return nn.Sequential(linear, nn.SiLU()) if config.activation == "silu" else linear

        self.to_queries, self.to_keys, self.to_values = projection(), projection(), projection()
        self.to_adaptive_step = nn.Sequential(nn.Linear(dim, heads))
        self.to_momentum = nn.Sequential(nn.Linear(dim, heads)) if config.momentum else None
        self.to_decay_factor = nn.Sequential(nn.Linear(dim, heads))
        self.retrieve_gate = nn.Sequential(nn.Linear(dim, heads, bias=False), nn.Sigmoid()) if heads > 1 else None
        whole = heads == 1 and width == dim
        self.combine_heads = nn.Identity() if whole else nn.Linear(heads * width, dim, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """As titans-pytorch: Glorot for the network's matrices, the norm's scale 1."""
        for name, start in zip(self.names, self.memory_model_parameters, strict=True):
            if name == "scale":
                nn.init.zeros_(start)
            else:
                for head in start:
                    nn.init.xavier_uniform_(head)
        # Half of everything would be forgotten at each token, where titans-pytorch forgets once per chunk.
        for name, bias in self.to_decay_factor.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(bias, self.config.decay_bias)

    def param_groups(self) -> dict[str, dict[str, float]]:
        """The norm's scale is no matrix: no decay."""
        return {"memory_model_parameters.0": {"weight_decay": 0.0}} if self.config.residual_norm else {}

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        like = self.memory_model_parameters[0]
        device = torch.device(device or like.device)
        weights = self._fresh(batch, device, torch.promote_types(dtype or like.dtype, torch.float32))
        leaves = {**weights, **{f"start_{name}": w.clone() for name, w in weights.items()}}
        if self.config.momentum:
            leaves |= {f"momentum_{name}": torch.zeros_like(w) for name, w in weights.items()}
        spec = {**dict.fromkeys(leaves, KEPT), "offset": Leaf(kind="counter")}
        none = torch.zeros(batch, dtype=torch.int64, device=device)
        return State({**leaves, "offset": none}, spec, seen=none.clone())

    def _fresh(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The network before the first token."""

        def rows(name: str, start: Tensor) -> Tensor:
            start = start.to(device, dtype)
            return (start[:, None] if name == "scale" else start).repeat(batch, 1, 1, 1)

        return {n: rows(n, start) for n, start in zip(self.names, self.memory_model_parameters, strict=True)}

    def _held(self, state: State, prefix: str = "") -> dict[str, Tensor]:
        return {name: state[prefix + name] for name in self.names if prefix + name in state.leaves}

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        """Read T times from the weights as they are; the state stays.

        From a reset on, from the initial weights; in order "write-read" the write came first and has reset them.
        """
        weights = self._held(state)
        real = q if ctx.mask is None else q.masked_fill(~ctx.mask[..., None], 0)
        queries = self._split(self.to_queries(real), weights["w1"].dtype, self.config.qk_norm == "l2")
        with no_autocast(q.device):
            value = self.network.read(weights, {}, queries, PLAIN)
            if ctx.reset is not None and self.config.order == "read-write":
                reset = ctx.reset if ctx.mask is None else ctx.reset & ctx.mask
                fresh = self._fresh(len(q), q.device, queries.dtype)
                after = (reset.long().cumsum(1) > 0)[:, None, :, None]
                value = torch.where(after, self.network.read(fresh, {}, queries, PLAIN), value)
        return Read(self._combined(value, real)), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        """Write T times without reading."""
        return self._learn(u, state, ctx, reads=False)[1], {}

    def scan(self, x: Tensor, state: State, ctx: Context = FRESH) -> Scan:
        """Read and write token by token, in the config's order: chunk by chunk, a chunk's tokens together."""
        if not x.shape[1]:
            return Scan(self.read(x, state, ctx)[0], state)
        value, state = self._learn(x, state, ctx, reads=True)
        assert value is not None
        return Scan(Read(value), state)

    def _learn(self, x: Tensor, state: State, ctx: Context, *, reads: bool) -> tuple[Tensor | None, State]:
        """The state after x, and what its tokens read."""
        if not x.shape[1]:
            return None, state
        grid = lay(x, ctx, state["offset"], self.config.chunk)
        tokens, chunks = grid.x.flatten(1, 2), grid.x.shape[1]
        weights, start, momentum = (self._held(state, prefix) for prefix in ("", "start_", "momentum_"))
        dtype = weights["w1"].dtype

        def cut(linear: nn.Module, normal: bool) -> Tensor:
            """What a projection gives, chunk by chunk: (B, H, N, C, d)."""
            split: Tensor = self._split(linear(tokens), dtype, normal).unflatten(2, (chunks, -1))
            return split

        l2 = self.config.qk_norm == "l2"
        key, value = cut(self.to_keys, l2), cut(self.to_values, False)
        query = cut(self.to_queries, l2) if reads else None
        fresh = {} if grid.fresh is None else self._fresh(len(x), x.device, dtype)
        with no_autocast(x.device):
            made = self._chunks(key, value, query, tokens, grid)
            found = LEARN(self.network, made, weights, start, momentum, fresh, PLAIN)
        parts = {"": found.weights, "start_": found.start, "momentum_": found.moving}
        leaves = {f"{prefix}{name}": w for prefix, part in parts.items() for name, w in part.items()}
        state = state.replace(seen=advanced(state.seen, x, ctx), offset=grid.offset, **leaves)
        if found.value is None:
            return None, state
        read = self._combined(found.value.flatten(2, 3), tokens)
        return grid.restore(read.unflatten(1, (chunks, -1))).to(x.dtype), state

    def _chunks(self, key: Tensor, value: Tensor, query: Tensor | None, tokens: Tensor, grid: Grid) -> Chunks:
        """With the coefficients of momentum and decay."""
        real, dtype = grid.real[:, None], key.dtype

        def rate(linear: nn.Sequential) -> Tensor:
            """(B, H, N, C)."""
            weight, bias = (p.to(dtype) for p in linear.parameters())
            wide: Tensor = F.linear(tokens.to(dtype), weight, bias).mT.unflatten(2, grid.real.shape[1:])
            return wide

        # A slot without a token keeps everything: it takes no step, forgets nothing, and its momentum moves nothing.
        step = (self.max_lr * torch.sigmoid(rate(self.to_adaptive_step))).masked_fill(~real, 0)
        kept = F.logsigmoid(-rate(self.to_decay_factor)).masked_fill(~real, 0)
        # Before the first token, and after each.
        keep = F.pad(kept.cumsum(-1), (1, 0)).exp()
        share = F.pad(spans(kept), (0, 0, 1, 0)) * real[..., None, :]
        lasting = from_before = drift = None
        if self.to_momentum is not None:
            momentum = rate(self.to_momentum)
            lasts = F.logsigmoid(momentum).masked_fill(~real, 0)
            step = step * torch.sigmoid(-momentum) if self.config.dampening else step
            lasting, from_before = spans(lasts), lasts.cumsum(-1).exp()
            drift = (share @ from_before[..., None])[..., 0]
            share = share @ lasting
        share = share * step[..., None, :]
        reading = slice(-1) if self.config.order == "read-write" else slice(1, None)
        return Chunks(
            key,
            value,
            query,
            keep=keep[..., reading],
            drift=None if drift is None else drift[..., reading],
            share=share[..., reading, :],
            last_keep=keep[..., -1],
            last_drift=None if drift is None else drift[..., -1],
            last_share=share[..., -1, :],
            moving_keep=None if from_before is None else from_before[..., -1],
            moving_share=None if lasting is None else lasting[..., -1, :] * step,
            full=grid.full,
            anew=grid.fresh,
        )

    def _split(self, x: Tensor, dtype: torch.dtype, normal: bool) -> Tensor:
        """(B, T, H d) to (B, H, T, d) in the memory's dtype."""
        x = x.to(dtype).unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
        return F.normalize(x, dim=-1) if normal else x

    def _combined(self, value: Tensor, x: Tensor) -> Tensor:
        """What the heads read (B, H, T, d) as a value (B, T, D) of x's dtype."""
        value = value.to(x.dtype)
        if self.retrieve_gate is not None:
            value = value * self.retrieve_gate(x).mT[..., None]
        joined: Tensor = self.combine_heads(value.transpose(1, 2).flatten(2))
        return joined.to(x.dtype)


def spans(log: Tensor) -> Tensor:
    """exp of the sums of log (..., C) over each span: [..., t, s] is of s+1..t for s <= t, and 0 for s > t."""
    size = log.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log.device)
    steps = log[..., None].expand(*log.shape, size).masked_fill(~ones.tril(-1), 0)
    return steps.cumsum(-2).exp().masked_fill(~ones.tril(), 0)


def build(config: TitansConfig, ctx: BuildContext) -> Memory:
    return Titans(config, ctx.dim)
