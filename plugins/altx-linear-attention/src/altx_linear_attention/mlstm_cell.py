"""The cell of mLSTM: a matrix memory with exponential input gates, stabilised in log space.

B rows, T tokens, H heads with K key and V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx.masking import RealFirst
from altx.state import Leaf, State
from altx_kernels.linear_recurrence import linear_recurrence
from altx_linear_attention.recurrent import real


def soft_cap(gate: Tensor, most: float | None) -> Tensor:
    """The projection of a gate, never beyond +-most, in float32 at least."""
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return gate if most is None else most * torch.tanh(gate / most)


def leaves(heads: int, keys: int, values: int) -> dict[str, tuple[tuple[int, ...], Leaf]]:
    """One row of the state: C exp(-m) with n exp(-m) as its last column, and m."""
    return {"cn": ((heads, keys, values + 1), Leaf(fp32=True)), "m": ((heads,), Leaf(fp32=True))}


def cell(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, batch: RealFirst, state: State | None, *, eps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """h_t = C_t^T q_t / sqrt(K) / (max(|n_t . q_t / sqrt(K)|, 1) + eps exp(m_t)), and the state after it.

    Equations 19 to 27 of xLSTM, computed with C exp(-m) and n exp(-m).

    Args:
        q, k: (B, T, H, K).
        v: (B, T, H, V).
        i, f: (B, T, H), input and forget gates before exp and sigmoid, in float32 at least.
        batch: what says where tokens are real and where a sequence starts.
        state: that before the tokens; None is a fresh one.
        eps: see above.

    Returns:
        h (B, T, H, V) and the leaves of `leaves`.
    """
    i, f = real(i, batch, -torch.inf), real(F.logsigmoid(f), batch)
    before = i.new_zeros(i.shape[0], i.shape[2]) if state is None else state["m"].detach().to(i.dtype)
    m, held = stabilisers(f.detach(), i.detach(), before, batch.reset)
    q = q * q.shape[-1] ** -0.5
    k = k * torch.exp(i - m)[..., None].to(k.dtype)
    # n is one more column of C, that of a value which is always 1. Sums may be beyond what 16 bits hold.
    wide = v.to(i.dtype)
    o, cn = linear_recurrence(
        q, k, F.pad(wide, (0, 1), value=1.0), f + held - m,
        initial_state=state["cn"] if state else None, reset=batch.reset,
    )  # fmt: skip
    scale = torch.maximum(o[..., -1:].abs(), torch.exp(-m)[..., None]) + eps
    return (o[..., :-1] / scale).to(v.dtype), {"cn": cn, "m": m[:, -1].clone()}


class HeadNorm(nn.Module):
    """LayerNorm of each head, with a weight and perhaps a bias for every channel of all heads.

    Args:
        heads, width: H and V.
        eps: added to the variance.
        bias: whether there is one.
        offset: added to the parameter `weight`, which starts so that both make 1.
    """

    def __init__(self, heads: int, width: int, *, eps: float, bias: bool, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((heads * width,), 1 - offset))
        self.bias = nn.Parameter(torch.zeros(heads * width)) if bias else None

    def forward(self, h: Tensor) -> Tensor:
        """(B, T, H V) from h (B, T, H, V)."""
        y = F.layer_norm(h, h.shape[-1:], eps=self.eps).flatten(2) * (
            self.weight + self.offset if self.offset else self.weight
        )
        return y if self.bias is None else y + self.bias


def stabilisers(f: Tensor, i: Tensor, before: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """m_t = max(f_t + m_{t-1}, i_t) of every token, and m_{t-1}, which is 0 where a sequence starts.

    Doubles its reach log2(T) times: what a run of tokens does to m is again to add something and to take a maximum.

    Args:
        f: (B, T, H), log forget gates.
        i: (B, T, H), input gates before exp.
        before: (B, H), m before the first token.
        reset: (B, T) bool, where a sequence starts.

    Returns:
        m_t and m_{t-1}, (B, T, H).
    """
    first = before if reset is None else before.masked_fill(reset[:, :1], 0)
    added = f
    if reset is not None:
        # Nothing before a start counts, but the 0 that it starts from.
        i = torch.where(reset[..., None], torch.maximum(i, f), i)
        added = added.masked_fill(reset[..., None], -torch.inf)
    m = torch.cat([torch.maximum(i[:, :1], f[:, :1] + first[:, None]), i[:, 1:]], 1)
    reach = 1
    while reach < m.shape[1]:
        m = torch.cat([m[:, :reach], torch.maximum(m[:, reach:], m[:, :-reach] + added[:, reach:])], 1)
        added = torch.cat([added[:, :reach], added[:, reach:] + added[:, :-reach]], 1)
        reach *= 2
    held = torch.cat([first[:, None], m[:, :-1]], 1)
    return m, held if reset is None else held.masked_fill(reset[..., None], 0)
