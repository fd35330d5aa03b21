"""TTT, a layer that learns at test time (Sun et al. 2024, arXiv:2407.04620), as a memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.layer import FRESH, advanced
from altx.memory import Memory, Read, Scan
from altx.spec import BuildContext
from altx.state import Leaf, State
from altx_kernels.autocast import no_autocast
from altx_titans.config import TTTConfig, ttt_capabilities
from altx_titans.fast import Network, Norm
from altx_titans.grid import lay
from altx_titans.kernels.learn import LEARN
from altx_titans.kernels.learn.reference import Chunks

KEPT = Leaf(kind="memory", fp32=True)


class TTT(Memory):
    """A network per head, f(x) = x + norm(x W1 + b1) or with a second layer, trained to give v for k.

        W_t = W_0 - rate_t sum_{i <= t} lr_i grad 1/2 |f(k_i; W_0) - v_i|^2,    rate_t = 1/t + learned    (4)

    with W_0 the weights at the start of the mini-batch of C tokens and t counted in it; a token is written, then read.
    Queries and keys are turned by their place in the mini-batch.

    Parameters are called as in ttt-lm-pytorch.

    Args:
        config: sizes.
        dim: model width D.

    Shape: x (B, T, D) to a read value (B, T, D). State, in at least float32: each weight of the network (B, H, ...) at
    the mini-batch's start, and the gradients since, each times its lr (`gradient_...`); offset (B,), tokens of the open
    mini-batch.
    """

    def __init__(self, config: TTTConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.capabilities = ttt_capabilities(config)
        self.heads = config.count(dim)
        width = dim // self.heads
        self.network = Network(config.layers, norm=True, eps=1e-6, factor=1.0, gelu="tanh")
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.g_proj = nn.Linear(dim, dim, bias=False) if config.gate else None
        self.post_norm = nn.LayerNorm(dim, eps=1e-6)
        self.learnable_token_idx = nn.Parameter(torch.zeros(config.chunk))
        self.learnable_ttt_lr_weight = nn.Parameter(torch.empty(self.heads, 1, dim))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.zeros(self.heads, 1))
        self.ttt_norm_weight = nn.Parameter(torch.ones(self.heads, width))
        self.ttt_norm_bias = nn.Parameter(torch.zeros(self.heads, width))
        hidden = width if config.layers == 1 else 4 * width
        self.W1 = nn.Parameter(torch.empty(self.heads, width, hidden))
        self.b1 = nn.Parameter(torch.zeros(self.heads, 1, hidden))
        if config.layers == 2:
            self.W2 = nn.Parameter(torch.empty(self.heads, hidden, width))
            self.b2 = nn.Parameter(torch.zeros(self.heads, 1, width))
        self._initialise()

    def _initialise(self) -> None:
        """Every matrix from a normal distribution of deviation 0.02."""
        for name, parameter in self.named_parameters():
            if (name.endswith("weight") and "norm" not in name) or name in ("W1", "W2"):
                nn.init.normal_(parameter, std=0.02)

    def param_groups(self) -> dict[str, dict[str, float]]:
        """Biases and norms: no decay."""
        names = [name for name, _ in self.named_parameters() if "bias" in name or "norm" in name or "token_idx" in name]
        names += [f"b{n}" for n in range(1, self.config.layers + 1)]
        return {name: {"weight_decay": 0.0} for name in names}

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        device = torch.device(device or self.W1.device)
        weights = self._fresh(batch, device, torch.promote_types(dtype or self.W1.dtype, torch.float32))
        leaves = {**weights, **{f"gradient_{name}": torch.zeros_like(w) for name, w in weights.items()}}
        spec = {**dict.fromkeys(leaves, KEPT), "offset": Leaf(kind="counter")}
        none = torch.zeros(batch, dtype=torch.int64, device=device)
        return State({**leaves, "offset": none}, spec, seen=none.clone())

    def _fresh(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The network before the first token."""
        start = {"w1": self.W1, "b1": self.b1}
        if self.config.layers == 2:
            start |= {"w2": self.W2, "b2": self.b2}
        return {name: w.to(device, dtype).repeat(batch, 1, 1, 1) for name, w in start.items()}

    def _norm(self, dtype: torch.dtype) -> Norm:
        return Norm(self.ttt_norm_weight[:, None].to(dtype), self.ttt_norm_bias[:, None].to(dtype))

    def _held(self, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        names = [name for name in state.leaves if f"gradient_{name}" in state.leaves]
        return {n: state[n] for n in names}, {n: state[f"gradient_{n}"] for n in names}

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        """Read T times from the weights as they are, as the token that was written last; the state stays.

        A reset is the write's, which comes first.
        """
        weights, gradient = self._held(state)
        dtype = weights["w1"].dtype
        real = q if ctx.mask is None else q.masked_fill(~ctx.mask[..., None], 0)
        last = ((state["offset"] - 1) % self.config.chunk)[:, None]
        queries = self._turned(self.q_proj(real), last, dtype)
        with no_autocast(q.device):
            rate = self._rate(last, dtype)[:, None, :, None]
            weights = {name: w - rate * gradient[name] for name, w in weights.items()}
            value = self.network.read(weights, {}, queries, self._norm(dtype))
        return Read(self._out(value, real)), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        """Write T times without reading."""
        return self._learn(u, state, ctx, reads=False)[1], {}

    def scan(self, x: Tensor, state: State, ctx: Context = FRESH) -> Scan:
        """Write and read token by token: mini-batch by mini-batch, its tokens together."""
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
        tokens, place, chunks = grid.x.flatten(1, 2), grid.position.flatten(1, 2), grid.x.shape[1]
        weights, gradient = self._held(state)
        dtype = weights["w1"].dtype

        def cut(y: Tensor) -> Tensor:
            """(B, H, N C, d) chunk by chunk, (B, H, N, C, d)."""
            apart: Tensor = y.unflatten(2, (chunks, -1))
            return apart

        key, value = cut(self._turned(self.k_proj(tokens), place, dtype)), cut(self._split(self.v_proj(tokens), dtype))
        query = cut(self._turned(self.q_proj(tokens), place, dtype)) if reads else None
        fresh = {} if grid.fresh is None else self._fresh(len(x), x.device, dtype)
        with no_autocast(x.device):
            rate, full = self._rate(grid.position, dtype)[:, None].expand(-1, self.heads, -1, -1), grid.full[:, None]
            step = cut(self._step(tokens, dtype).masked_fill(~grid.real.flatten(1, 2)[:, None], 0))
            # Gradients add up until a mini-batch is full; then they move the weights.
            last = torch.where(full, rate[..., -1], 0)
            made = Chunks(
                key, value, query, torch.ones_like(rate), -rate, (rate[..., None] * step[..., None, :]).tril(),
                torch.ones_like(last), -last, last[..., None] * step,
                torch.ones_like(last).masked_fill(full, 0), -step.masked_fill(full[..., None], 0),
                grid.full, grid.fresh,
            )  # fmt: skip
            found = LEARN(self.network, made, weights, weights, gradient, fresh, self._norm(dtype))
        leaves = {**found.weights, **{f"gradient_{name}": g for name, g in found.moving.items()}}
        state = state.replace(seen=advanced(state.seen, x, ctx), offset=grid.offset, **leaves)
        if found.value is None:
            return None, state
        read = self._out(found.value.flatten(2, 3), tokens)
        return grid.restore(read.unflatten(1, (chunks, -1))), state

    def _rate(self, place: Tensor, dtype: torch.dtype) -> Tensor:
        """rate_t for places (...) in the mini-batch, counted from 0."""
        return (1 / (place + 1).to(dtype) + self.learnable_token_idx.to(dtype)[place]).clamp(min=0)

    def _step(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """lr_i of the tokens x (B, T, D): (B, H, T)."""
        weight, bias = self.learnable_ttt_lr_weight[:, 0].to(dtype), self.learnable_ttt_lr_bias[:, 0].to(dtype)
        width = self.ttt_norm_weight.shape[1]
        step: Tensor = self.config.base_lr / width * torch.sigmoid(F.linear(x.to(dtype), weight, bias)).mT
        return step

    def _split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, D) to (B, H, T, d) in the memory's dtype."""
        split: Tensor = x.to(dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return split

    def _turned(self, x: Tensor, place: Tensor, dtype: torch.dtype) -> Tensor:
        """x (B, T, D) to (B, H, T, d), neighbours turned as pairs by their place (B, T or 1) in the mini-batch."""
        x = self._split(x, dtype)
        width = x.shape[-1]
        speed = self.config.rope_theta ** (-torch.arange(0, width, 2, device=x.device, dtype=dtype) / width)
        angle = (place[..., None].to(dtype) * speed)[:, None]
        even, odd, cos, sin = x[..., 0::2], x[..., 1::2], angle.cos(), angle.sin()
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    def _out(self, value: Tensor, x: Tensor) -> Tensor:
        """What the heads read (B, H, T, d) as a value (B, T, D) of x's dtype."""
        y: Tensor = self.post_norm(value.transpose(1, 2).flatten(2).to(x.dtype))
        if self.g_proj is not None:
            y = F.gelu(self.g_proj(x), approximate="tanh") * y
        y = self.o_proj(y)
        return y.to(x.dtype)


def build(config: TTTConfig, ctx: BuildContext) -> Memory:
    return TTT(config, ctx.dim)
