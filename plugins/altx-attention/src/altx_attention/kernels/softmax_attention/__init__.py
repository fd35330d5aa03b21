"""Softmax attention: the op."""

from __future__ import annotations

from torch import Tensor

from altx_attention.kernels.softmax_attention import cases, flash, flex, native, reference, sdpa
from altx_attention.kernels.softmax_attention.narrowing import narrowed, one_document, readable
from altx_attention.kernels.softmax_attention.torch import attention as by_products
from altx_kernels.arguments import check_floats, check_shapes
from altx_kernels.op import Backend, KernelError, Op

OP: Op[Tensor] = Op(
    "softmax-attention",
    reference.attention,
    [
        Backend("flash-attn", flash.attention, flash.unavailable, flash.absent),
        Backend("native", native.attention, native.unavailable, native.LIBRARY.problem),
        Backend("sdpa", sdpa.attention, sdpa.unavailable),
        Backend("flex", flex.attention, flex.unavailable, flex.absent),
        Backend("torch", by_products),
    ],
    summary="softmax attention with shared heads, a window, documents, a soft cap and sinks",
    examples=cases.examples,
    workloads=cases.workloads,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    offset: Tensor | None = None,
    document: Tensor | None = None,
    slot_document: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Every query's mean of the values, weighted by the softmax of its products with their keys.

        y_t = sum_s exp(a_ts) v_s / (exp(sink) + sum_s exp(a_ts)),    a_ts = cap(scale q_t . k_s)

    over the slots s that query t sees. A query that sees none gets 0. Without sinks exp(sink) is 0; cap(a) is
    softcap tanh(a / softcap), without a soft cap it is a.

    Args:
        q: (B, T, H, D).
        k: (B, S, G, D), G divides H: head h belongs to group h // (H // G).
        v: (B, S, G, E).
        causal: a query sees no slot behind the one that it stands at.
        window: and none that is `window` slots or more away.
        offset: (B,) int64, the slot at which each row's first query stands; default: S - T, so that the last query
            stands at the last slot.
        document, slot_document: (B, T) and (B, S) integers; a query sees the slots of its own document. Both or none.
        scale: default: D ** -0.5.
        softcap: (Gemma Team 2024, arXiv:2408.00118, section 2).
        sinks: (H,) (gpt-oss, arXiv:2508.10925, section 2.2; Miller 2023, "attention is off by one", where they are 0);
            or (B, T, H), what else takes part in each query's softmax: the logarithm of its sum of exponentials.
        backend: pins a backend by name.

    Returns:
        (B, T, H, E) in the dtype of v.

    Raises:
        KernelError: if the arguments do not fit together.
    """
    check_shapes(
        OP.name, {}, q=(q, "B T H D"), k=(k, "B S G D"), v=(v, "B S G E"), offset=(offset, "B"),
        document=(document, "B T"), slot_document=(slot_document, "B S"),
        sinks=(sinks, "B T H" if sinks is not None and sinks.dim() > 1 else "H"),
    )  # fmt: skip
    check_floats(OP.name, q=q, k=k, v=v, sinks=sinks)
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise KernelError(f"op {OP.name!r}: {q.shape[2]} heads cannot share {k.shape[2]}", hint="let G divide H")
    if (document is None) != (slot_document is None):
        raise KernelError(f"op {OP.name!r}: document and slot_document go together", hint="pass both or none")
    for name, value in (("window", window), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise KernelError(f"op {OP.name!r}: {name} is {value}", hint=f"pass a positive {name}, or None for none")
    if readable(q, offset, document, slot_document):
        if causal and offset is not None and len(offset):
            k, v, offset, slot_document = narrowed(q, k, v, offset, slot_document)
        if document is not None and slot_document is not None and one_document(document, slot_document):
            document = slot_document = None
    return OP(
        q, k, v, causal=causal, window=window, offset=offset, document=document, slot_document=slot_document,
        scale=scale, softcap=softcap, sinks=sinks, backend=backend,
    )  # fmt: skip
