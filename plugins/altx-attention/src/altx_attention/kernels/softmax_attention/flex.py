"""PyTorch's FlexAttention (Dong et al. 2024, arXiv:2412.05496): what a query sees and the soft cap are compiled into a
kernel, which skips the blocks that nobody sees."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from altx_kernels.autocast import no_autocast


def absent() -> str | None:
    """Why it cannot run anything here, or None."""
    return (
        None
        if torch.cuda.is_available()
        else "there is no CUDA device, and on others torch's FlexAttention has no gradient"
    )


# A compiled graph knows it as a constant; see altx_kernels.native.library.
absent._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unavailable(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    """Why it cannot run a call, or None."""
    if q.device.type != "cuda":
        return f"q is on {q.device}, and it is for CUDA"
    if not q.numel() or not k.numel():
        return "there is nothing to attend to"
    if q.dtype == torch.float64:
        return "it does not compute in float64"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"heads are {max(q.shape[-1], v.shape[-1])} wide, and more than 256 do not fit its kernels"
    return None


@cache
def compiled(fn: Any) -> Any:
    """A function compiled when first called, for any length."""
    return torch.compile(fn, dynamic=True)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, offset: Tensor | None = None,
    document: Tensor | None = None, slot_document: Tensor | None = None, scale: float | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, fused: bool = True,
) -> Tensor:  # fmt: skip
    """As the reference; `fused=False` runs the same functions uncompiled, on any device."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    batch, count, heads, _ = q.shape
    slots, groups = k.shape[1:3]

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        place = t + (slots - count) if offset is None else t + offset[b]
        visible = s >= 0
        if causal:
            visible = visible & (s <= place)
        if window is not None:
            visible = visible & (s > place - window)
            if not causal:
                visible = visible & (s < place + window)
        if document is not None and slot_document is not None:
            visible = visible & (document[b, t] == slot_document[b, s])
        return visible

    def cap(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    everything = not causal and window is None and document is None
    alike = offset is None and document is None
    fuse = fused and not torch.compiler.is_compiling()
    kernel: Any = compiled(flex_attention) if fuse else flex_attention
    blocks: Any = compiled(create_block_mask) if fuse else create_block_mask
    with no_autocast(q.device):
        mask = None if everything else blocks(sees, None if alike else batch, None, count, slots, device=q.device)
        found = kernel(
            *(t.transpose(1, 2) for t in (q, k, v)), score_mod=None if softcap is None else cap, block_mask=mask,
            scale=scale, enable_gqa=heads != groups, return_aux=None if sinks is None else AuxRequest(lse=True),
        )  # fmt: skip
        y: Tensor = found if sinks is None else found[0]
        if sinks is not None:
            # The second is the logarithm of the sum of what slots weigh, to which a sink adds exp(sink).
            sink = sinks.to(found[1].lse.dtype).expand(batch, count, heads).transpose(1, 2)
            y = y * torch.sigmoid(found[1].lse - sink)[..., None].to(y.dtype)
    return y.transpose(1, 2)
