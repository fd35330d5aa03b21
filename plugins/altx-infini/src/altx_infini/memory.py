"""The compressive memory of Infini-attention (Munkhdalai et al. 2024, arXiv:2404.07143, section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.context import Context
from altx.errors import ConfigError
from altx.layer import FRESH, advanced
from altx.memory import NOTHING, Attended, Memory, Read, split_heads
from altx.segments import Piece, split
from altx.spec import BuildContext, Heads
from altx.state import Leaf, State
from altx_infini.config import InfiniConfig, capabilities
from altx_kernels.autocast import no_autocast

KEPT = Leaf(kind="memory", fp32=True)
SPEC = {**dict.fromkeys(("memory", "norm", "new_memory", "new_norm"), KEPT), "offset": Leaf(kind="counter")}


class Infini(Memory):
    """All finished segments in a matrix per head, which a linear attention reads.

        A_mem = s(Q) M_{s-1} / (s(Q) z_{s-1}),                                   s(x) = elu(x) + 1          (3)
        M_s = M_{s-1} + s(K)^T V,    z_s = z_{s-1} + sum_t s(K_t)                                           (4)
        M_s = M_{s-1} + s(K)^T (V - s(K) M_{s-1} / (s(K) z_{s-1}))               in place of it: "delta"    (5)
        A = sigmoid(b) A_mem + (1 - sigmoid(b)) A_local                                                     (10)

    Attached as "kv", Q, K and V are the attention's own without their positions, and A_local is its output. Attached
    otherwise they are projections of this memory's, its value is W_o (sigmoid(b) A_mem), and the mixer is what is near.
    Before the first segment has ended there is nothing: A is A_local, and the value 0.

    Args:
        config: sizes, the rule of writing.
        dim: model width D.
        heads: what an attention hands over, or None.

    Shape: x (B, T, D or heads.width) to a value (B, T, D) or attention (B, T, H, V). State, in at least float32: memory
    (B, G, K, V) and norm (B, G, K), M and z of the finished segments; new_memory and new_norm, what the open one adds
    to them; offset (B,), its tokens.
    """

    def __init__(self, config: InfiniConfig, dim: int, heads: Heads | None = None) -> None:
        super().__init__()
        self.capabilities = capabilities(config)
        self.delta = config.update == "delta"
        self.attention = heads
        if heads is None:
            count, width = config.sizes(dim)
            heads = Heads(query=count, kv=count, key_dim=width, value_dim=width)
            self.qkv_proj = nn.Linear(dim, heads.width, bias=False)
            self.o_proj = nn.Linear(count * width, dim, bias=False)
        self.heads = heads
        self.gate = nn.Parameter(torch.full((heads.query,), config.gate))

    def param_groups(self) -> dict[str, dict[str, float]]:
        """The gate is no matrix: no decay."""
        return {"gate": {"weight_decay": 0.0}}

    def init_state(
        self,
        batch: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        norm = self.heads.kv, self.heads.key_dim
        memory = *norm, self.heads.value_dim
        shapes = {"memory": memory, "norm": norm, "new_memory": memory, "new_norm": norm, "offset": ()}
        return State.zeros(batch, shapes, SPEC, self.gate, device, dtype)

    def offset(self, state: State) -> list[int]:
        return state["offset"].tolist()

    def read(self, q: Tensor, state: State, ctx: Context = FRESH) -> tuple[Read, State]:
        """Read what the finished segments hold (equation 3); the state stays. From a reset on, there is nothing."""
        queries = self._features(self._split(q)[0].to(state["norm"].dtype))
        with no_autocast(q.device):
            value, weight = _recalled(queries, state["memory"], state["norm"])
            value, weight = value.flatten(2, 3), weight.flatten(2, 3)
            there = weight > 0
            if ctx.reset is not None:
                begun = (ctx.reset if ctx.mask is None else ctx.reset & ctx.mask).cumsum(1) > 0
                there = there & ~begun[..., None]
            share = torch.sigmoid(self.gate.to(value.dtype)) * there
            if self.attention is not None:
                log = torch.where(there, weight, 1).log().masked_fill(~there, NOTHING)
                value = value.masked_fill(~there[..., None], 0)
                return Read(attended=Attended(value.to(q.dtype), log, share)), state
            value = (share[..., None] * value).flatten(2)
        out: Tensor = self.o_proj(value.to(q.dtype))
        return Read(out.to(q.dtype)), state

    def write(self, u: Tensor, state: State, ctx: Context = FRESH) -> tuple[State, Mapping[str, Tensor]]:
        """Add each segment's keys and values when its last token has come (equations 4 and 5)."""
        seen = advanced(state.seen, u, ctx)
        for piece, part in split(u, ctx, self.offset(state), self.capabilities.chunk):
            state = self._held(part, state, piece)
        return state.replace(seen=seen), {}

    def _held(self, u: Tensor, state: State, piece: Piece) -> State:
        """The state after tokens u (B, n, ...) of one segment of each row."""
        held = [state[name] for name in ("memory", "norm", "new_memory", "new_norm")]
        if any(piece.reset):
            held = [x.masked_fill(_rows(piece.reset, x), 0) for x in held]
        memory, norm, new_memory, new_norm = held
        _, k, v = (x.to(norm.dtype) for x in self._split(u))
        keys = self._features(k)
        if piece.mask is not None:
            keys = keys * piece.mask[..., None, None]
        with no_autocast(u.device):
            if self.delta:
                v = v - _recalled(keys[:, :, :, None], memory, norm)[0][:, :, :, 0]
            new_memory = new_memory + torch.einsum("bngk,bngv->bgkv", keys, v)
            new_norm = new_norm + keys.sum(1)
            if any(piece.last):
                ended = _rows(piece.last, norm)
                memory = torch.where(ended[..., None], memory + new_memory, memory)
                norm = torch.where(ended, norm + new_norm, norm)
                new_memory = new_memory.masked_fill(ended[..., None], 0)
                new_norm = new_norm.masked_fill(ended, 0)
        offset = torch.tensor(piece.offset, device=u.device)
        return state.replace(memory=memory, norm=norm, new_memory=new_memory, new_norm=new_norm, offset=offset)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, G, H / G, K) that nothing scales, keys (B, T, G, K), values (B, T, G, V)."""
        q, k, v = split_heads(self.qkv_proj(x) if self.attention is None else x, self.heads)
        if self.attention is not None:
            # As attention hands them over, they are scaled, by the usual scale unless it was told another.
            q = q * self.heads.key_dim**0.5
        return q.unflatten(2, (self.heads.kv, -1)), k, v

    @staticmethod
    def _features(x: Tensor) -> Tensor:
        """elu(x) + 1, whose small values are not the difference of two that are nearly 1."""
        return F.relu(x) + x.clamp(max=0).exp()


def _recalled(queries: Tensor, memory: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """What M (B, G, K, V) and z (B, G, K) give for s(q) (B, T, G, R, K): (B, T, G, R, V), 0 if empty; and s(q) z."""
    weight = torch.einsum("btgrk,bgk->btgr", queries, norm)
    found = torch.einsum("btgrk,bgkv->btgrv", queries, memory)
    return found / torch.where(weight > 0, weight, 1)[..., None], weight


def _rows(chosen: list[bool], like: Tensor) -> Tensor:
    """Of each row whether it is chosen, to go with a tensor (B, ...)."""
    return torch.tensor(chosen, device=like.device).reshape(-1, *[1] * (like.dim() - 1))


def build(config: InfiniConfig, ctx: BuildContext) -> Memory:
    if ctx.heads is not None:
        for name, own in (("heads", ctx.heads.query), ("head_dim", ctx.heads.key_dim)):
            if getattr(config, name) not in ("auto", own):
                raise ConfigError(
                    f"infini, attached as kv, has the attention's {name} of {own}, not {getattr(config, name)}",
                    hint=f"leave {name} at auto, or attach it as residual or gate",
                )
    return Infini(config, ctx.dim, ctx.heads)
